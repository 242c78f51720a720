"""Granite against transformers at the same weights: logits, gradients, saved folders, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.models import get_config
from fms_parallel.models.granite import Granite, config_from_hf, config_to_hf
from tests.models.families import assert_loads_there, assert_parity, reference

pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")

FACTORS = {
    **{"embedding_multiplier": 12.0, "attention_multiplier": 0.03, "residual_multiplier": 0.22},
    **{"logits_scaling": 7.0},
}
KINDS: dict[str, dict[str, Any]] = {
    "published factors": FACTORS,
    "factors of one": {},
    "tied": {**FACTORS, "tie_word_embeddings": True},
    "biases": {**FACTORS, "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_saved_folder_match_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    theirs = reference("Granite", tmp_path / "theirs", **KINDS[kind])
    ours = assert_parity(theirs, tmp_path / "theirs", fused=fused)
    assert_loads_there(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize(("variant", "parameters"), [("3.1-2b", 2_533_531_648), ("8b", 8_170_848_256)])
def test_parameters_are_those_published(variant: str, parameters: int) -> None:
    config = get_config("granite", variant)
    with torch.device("meta"):
        assert sum(p.numel() for p in Granite(config).parameters()) == parameters == config.parameters()


@pytest.mark.parametrize("variant", ["3.0-2b", "8b"])
def test_config_survives_the_round_trip(variant: str) -> None:
    config = get_config("granite", variant)
    again = config_from_hf(config_to_hf(config))
    assert again.shape() == config.shape() and again.rotary == config.rotary
    for name in FACTORS:
        assert getattr(again, name) == getattr(config, name)
