"""Mistral against transformers at the same weights: logits, gradients, windows, saved folders, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.inference import generate
from fms_parallel.models import get_config, get_model
from fms_parallel.models.mistral import config_from_hf, config_to_hf, window_mask
from tests.models.families import assert_loads_there, assert_parity, cached_logits, reference

pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

KINDS: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "window": {"sliding_window": 7},
    "window as long as the text": {"sliding_window": 40},
    "window of one": {"sliding_window": 1},
    "head_dim": {"sliding_window": None, "head_dim": 24},
    "tied": {"sliding_window": 12, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_saved_folder_match_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    theirs = reference("Mistral", tmp_path / "theirs", **KINDS[kind])
    ours = assert_parity(theirs, tmp_path / "theirs", fused=fused)
    assert_loads_there(ours, theirs, tmp_path / "ours")


def test_mask_is_the_window_counted_by_hand() -> None:
    expected = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(window_mask(2, 4, 2, torch.device("cpu")), expected)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [30, 1, 9]], ids=["at once", "one by one", "in chunks"])
def test_window_is_the_same_through_a_cache(tmp_path: Path, pieces: list[int]) -> None:
    theirs = reference("Mistral", tmp_path, sliding_window=7)
    ours = get_model("hf_pretrained", model_path=tmp_path).eval()
    ids = torch.randint(97, (2, 40))
    with torch.no_grad():
        assert torch.allclose(cached_logits(ours, ids, pieces), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_rows_padded_on_the_left_generate_what_they_do_alone(tmp_path: Path) -> None:
    reference("Mistral", tmp_path, sliding_window=5, initializer_range=0.4)
    ours = get_model("hf_pretrained", model_path=tmp_path).eval()
    prompts = [[5, 9, 8, 44, 3, 2, 17, 20], [7, 11, 13], [1]]
    together = generate(ours, prompts, max_new_tokens=12)
    assert together == [generate(ours, [prompt], max_new_tokens=12)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("7b", 7_241_732_096), ("0.2-7b", 7_241_732_096), ("0.3-7b", 7_248_023_552), ("nemo-12b", 12_247_782_400)],
)
def test_parameters_are_those_published(variant: str, parameters: int) -> None:
    from fms_parallel.models.mistral import Mistral

    config = get_config("mistral", variant)
    with torch.device("meta"):
        assert sum(p.numel() for p in Mistral(config).parameters()) == parameters == config.parameters()


@pytest.mark.parametrize("variant", ["7b", "0.3-7b", "nemo-12b"])
def test_config_survives_the_round_trip(variant: str) -> None:
    config = get_config("mistral", variant)
    again = config_from_hf(config_to_hf(config))
    assert (again.shape(), again.rotary, again.window) == (config.shape(), config.rotary, config.window)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="window=0: a query sees at least itself"):
        get_config("mistral", "micro", window=0)
    with pytest.raises(ConfigError, match="no attention_bias"):
        config_to_hf(get_config("mistral", "micro", attention_bias=True))
