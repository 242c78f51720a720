"""Values that a model starts from when it comes as a config: those that its own rules give, in distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.auto.blocks import find_blocks
from fms_parallel.auto.families import FAMILIES, tiny_config
from fms_parallel.auto.source import build_skeleton, draw

transformers = pytest.importorskip("transformers")


def drawn(name: str, **fields: Any) -> dict[str, torch.Tensor]:
    skeleton, _, _ = build_skeleton(tiny_config(name, **fields))
    return dict(draw(skeleton, find_blocks(skeleton), {n for n, _ in skeleton.named_parameters()}, seed=1))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_drawn_values_are_distributed_as_the_models_own(name: str) -> None:
    torch.manual_seed(2)
    model = getattr(transformers, FAMILIES[name].model)(tiny_config(name))
    found = drawn(name)
    assert found.keys() == {n for n, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        mine, value = found[key], parameter.detach()
        if value.numel() == 1 or value.std() < 1e-6 or "encoder.embed_positions" in key:  # no random numbers
            assert torch.equal(mine, value), key
        elif value.numel() >= 256:
            assert float(mine.std() / value.std()) == pytest.approx(1.0, abs=0.2), key
            assert float(mine.mean()) == pytest.approx(0.0, abs=0.35 * float(value.std())), key


def test_what_gpt2_says_of_its_depth_is_done() -> None:
    found = drawn("gpt2", n_layer=8, n_embd=64)
    for key, value in found.items():
        if key.endswith("c_proj.weight"):
            assert float(value.std()) == pytest.approx(0.02 / 4.0, rel=0.1), key  # 0.02 / sqrt(2 * 8)
        elif key.endswith(("c_attn.weight", "c_fc.weight")):
            assert float(value.std()) == pytest.approx(0.02, rel=0.1), key
