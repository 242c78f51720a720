"""Qwen3 against transformers at the same weights: logits, gradients, saved folders, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.models import get_config
from fms_parallel.models.llama import LLaMA
from fms_parallel.models.qwen3 import config_from_hf, config_to_hf
from tests.models.families import assert_loads_there, assert_parity, reference

pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

KINDS: dict[str, dict[str, Any]] = {
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 8, "num_key_value_heads": 1},
    "tied": {"head_dim": 16, "tie_word_embeddings": True},
    "biases": {"head_dim": 24, "attention_bias": True},
    "yarn rope": {
        "head_dim": 24,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            **{"original_max_position_embeddings": 16},
        },
    },
}


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_saved_folder_match_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    theirs = reference("Qwen3", tmp_path / "theirs", **KINDS[kind])
    ours = assert_parity(theirs, tmp_path / "theirs", fused=fused)
    assert_loads_there(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("0.6b", 596_049_920), ("1.7b", 1_720_574_976), ("4b", 4_022_468_096), ("8b", 8_190_735_360)],
)
def test_parameters_are_those_published(variant: str, parameters: int) -> None:
    config = get_config("qwen3", variant)
    with torch.device("meta"):
        assert sum(p.numel() for p in LLaMA(config).parameters()) == parameters == config.parameters()


@pytest.mark.parametrize("variant", ["0.6b", "8b"])
def test_config_survives_the_round_trip(variant: str) -> None:
    config = get_config("qwen3", variant)
    again = config_from_hf(config_to_hf(config))
    assert (again.shape(), again.rotary, again.norm_eps) == (config.shape(), config.rotary, config.norm_eps)


@pytest.mark.parametrize(
    "change", [{"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]}]
)
def test_windows_are_refused(change: dict[str, Any]) -> None:
    raw = config_to_hf(get_config("qwen3", "micro"))
    with pytest.raises(ConfigError, match="not supported"):
        config_from_hf({**raw, **change})


def test_a_model_without_qk_norm_has_no_hf_form() -> None:
    with pytest.raises(ConfigError, match="no qk_norm"):
        config_to_hf(get_config("qwen3", "micro", qk_norm=False))
