"""Mixtral against transformers at the same weights: logits, gradients, saved folders, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.errors import CheckpointError, ConfigError
from fms_parallel.models import get_config, get_model
from fms_parallel.models.mixtral import Mixtral, config_from_hf, config_to_hf
from tests.models.families import assert_loads_there, assert_parity, cached_logits, reference

pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

KINDS: dict[str, dict[str, Any]] = {
    "two of four": {"num_local_experts": 4},
    "one of four": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "all of three": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "more experts than tokens visit": {"num_local_experts": 30},
    "window": {"num_local_experts": 4, "sliding_window": 7},
    "tied": {"num_local_experts": 4, "tie_word_embeddings": True},
    "gelu": {"num_local_experts": 4, "hidden_act": "gelu"},
}


def mixtral(folder: Path, **options: Any) -> nn.Module:
    """transformers multiplies experts together, and wants their rows to be multiples of 16 bytes."""
    return reference("Mixtral", folder, intermediate_size=44, **options)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_saved_folder_match_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    theirs = mixtral(tmp_path / "theirs", **KINDS[kind])
    ours = assert_parity(theirs, tmp_path / "theirs", fused=fused)
    assert_loads_there(ours, theirs, tmp_path / "ours")


def test_one_token_at_a_time_chooses_the_same_experts(tmp_path: Path) -> None:
    theirs = mixtral(tmp_path, num_local_experts=4)
    ours = get_model("hf_pretrained", model_path=tmp_path).eval()
    ids = torch.randint(97, (2, 20))
    with torch.no_grad():
        assert torch.allclose(cached_logits(ours, ids, [1] * 20), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variant", "parameters"), [("8x7b", 46_702_792_704), ("8x22b", 140_620_634_112)])
def test_parameters_are_those_published(variant: str, parameters: int) -> None:
    config = get_config("mixtral", variant)
    with torch.device("meta"):
        assert sum(p.numel() for p in Mixtral(config).parameters()) == parameters == config.parameters()


def test_work_is_that_of_the_experts_used() -> None:
    """12.9 billion of the 46.7 multiply each token (arXiv 2401.04088)."""
    config = get_config("mixtral", "8x7b")
    active = (config.flops_per_token(0) / 6 + config.vocab_size * config.width) / 1e9
    assert active == pytest.approx(12.9, abs=0.05)


def test_config_survives_the_round_trip() -> None:
    config = get_config("mixtral", "8x22b", router_loss=0.02)
    again = config_from_hf(config_to_hf(config))
    assert (again.shape(), again.rotary, again.router_loss) == (config.shape(), config.rotary, 0.02)


@pytest.mark.parametrize("change", [{"output_router_logits": True}, {"router_jitter_noise": 0.1}])
def test_what_training_would_leave_out_is_refused(change: dict[str, Any]) -> None:
    raw = config_to_hf(get_config("mixtral", "micro"))
    with pytest.raises(ConfigError, match=f"{next(iter(change))}.*is supported"):
        config_from_hf({**raw, **change})


def test_impossible_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="a token cannot visit 3 of 2 experts"):
        get_model("mixtral", "micro", experts=2, experts_used=3)
    with pytest.raises(ConfigError, match="experts have no biases"):
        get_config("mixtral", "micro", ffn_bias=True)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    mixtral(tmp_path, num_local_experts=4)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.2\.up"):
        get_model("hf_pretrained", model_path=tmp_path, source="hf")


def test_planner_counts_each_expert_once() -> None:
    from fms_parallel.planner.catalog import Model
    from fms_parallel.planner.experts import Experts

    shape = get_config("mixtral", "8x7b").shape()
    experts = Experts(shape.experts, shape.experts_used, shape.ffn_width)
    assert Model("mixtral:8x7b", shape, experts).parameters() == 46_702_792_704
