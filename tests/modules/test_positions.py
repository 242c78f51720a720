from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.modules.positions import SCALINGS, Rotary, rotate

ORIGINAL, D = 32, 16

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}

SCALED: dict[str, tuple[str, dict[str, Any], float, float]] = {  # name -> kind, options, partial, base
    "default": ("default", {}, 1.0, 10000.0),
    "default, half of the features": ("default", {}, 0.5, 10000.0),
    "large base": ("default", {}, 1.0, 500000.0),
    "linear": ("linear", {"factor": 4.0}, 1.0, 10000.0),
    "dynamic": ("dynamic", {"factor": 4.0}, 1.0, 10000.0),
    "llama3": ("llama3", LLAMA3, 1.0, 10000.0),
    "llama3, half of the features": ("llama3", LLAMA3, 0.5, 500000.0),
    "yarn": ("yarn", YARN, 1.0, 10000.0),
    "yarn, half of the features": ("yarn", YARN, 0.5, 10000.0),
    "yarn, own factors": ("yarn", {**YARN, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}, 1.0, 1e4),
    "yarn, mscale": ("yarn", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, 1.0, 10000.0),
    "yarn, not truncated": ("yarn", {**YARN, "truncate": False}, 1.0, 10000.0),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("length", [ORIGINAL // 2, 4 * ORIGINAL])
def test_tables_equal_transformers(name: str, length: int) -> None:
    """Also beyond the original length, where a dropped scaling shows (defect W9 of the reference: it was)."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding  # Llama's, but reads the part

    kind, options, partial, base = SCALED[name]
    config = transformers.StableLmConfig(
        hidden_size=4 * D,
        num_attention_heads=4,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": kind, "rope_theta": base, "partial_rotary_factor": partial, **options},
    )
    positions = torch.arange(length)
    cos, sin = Rotary(D, base, partial, ORIGINAL, kind, options).tables(positions, length)
    their_cos, their_sin = StableLmRotaryEmbedding(config)(torch.zeros(1), positions[None])
    # Theirs repeat the table for both halves of a pair.
    width = int(D * partial) // 2
    assert cos.shape == (length, width)
    torch.testing.assert_close(cos, their_cos[0, :, :width], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin, their_sin[0, :, :width], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "alpha"), [(ORIGINAL, 1), (ORIGINAL + 1, 2), (3 * ORIGINAL, 4), (4 * ORIGINAL, 4)])
def test_ntk_raises_the_base_by_the_next_power_of_two(length: int, alpha: int) -> None:
    rope = Rotary(D, 10000.0, original_length=ORIGINAL, kind="ntk")
    raised = Rotary(D, 10000.0 * alpha ** (D / (D - 2)), original_length=ORIGINAL)
    positions = torch.arange(length)
    torch.testing.assert_close(rope.tables(positions, length), raised.tables(positions, length))


def test_tables_of_rows_with_their_own_positions() -> None:
    rope = Rotary(D)
    positions = torch.tensor([[0, 0, 1, 2], [5, 6, 7, 8]])
    cos, sin = rope.tables(positions, 9)
    all_cos, all_sin = rope.tables(torch.arange(9), 9)
    assert torch.equal(cos, all_cos[positions]) and torch.equal(sin, all_sin[positions])


def test_a_table_holds_two_numbers_a_pair() -> None:
    """Defect W15 of the reference: a 2 x 2 matrix, four numbers, for each pair of features."""
    cos, sin = Rotary(D).tables(torch.arange(8), 8)
    assert cos.numel() + sin.numel() == 8 * (D // 2) * 2


@pytest.mark.parametrize("partial", [1.0, 0.5, 0.25])
def test_rotation_equals_transformers(partial: float) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(2, 5, 3, D, dtype=torch.float64)
    cos, sin = Rotary(D, partial=partial).tables(torch.arange(5), 5)
    turned, kept = x.split([int(D * partial), D - int(D * partial)], dim=-1)
    doubled = (table.double().repeat(1, 2) for table in (cos, sin))
    want, _ = llama.apply_rotary_pos_emb(turned, turned, *(table[None] for table in doubled), unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([want, kept], dim=-1), rtol=0, atol=1e-14)


def test_rotation_turns_each_pair_by_position_times_frequency() -> None:
    """Formula of arXiv 2104.09864 as complex numbers."""
    x = torch.randn(1, 7, 1, D, dtype=torch.float64)
    cos, sin = Rotary(D).tables(torch.arange(7), 7)
    angles = torch.arange(7)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    pairs = (
        torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    )
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([pairs.real, pairs.imag], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_rotation_gradients_by_finite_differences(batched: bool) -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2], [4, 5, 6]]) if batched else torch.arange(3)
    cos, sin = (table.double() for table in Rotary(6, partial=0.7).tables(positions, 7))
    torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_no_state_to_forget_on_the_meta_device() -> None:
    with torch.device("meta"):
        rope = Rotary(D)
    assert all(not table.is_meta for table in rope.tables(torch.arange(3), 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "llama4"}, r"unknown rope scaling 'llama4'\. Did you mean 'llama3'\?"),
        ({"kind": "linear"}, "rope scaling 'linear' needs factor"),
        ({"kind": "llama3", "options": {"factor": 8.0}}, "needs high_freq_factor, low_freq_factor, original_max"),
        ({"kind": "linear", "options": {"factor": 2.0, "facter": 1}}, "unknown option .* 'facter'"),
        ({"options": {"factor": 2.0}}, "unknown option of rope scaling 'default' 'factor'"),
        ({"partial": 0.3}, "even number of rotated features, got 5"),
        ({"head_width": 2, "kind": "ntk"}, "more than 2 rotated features"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Defect W9 of the reference: a scaling it does not know, or does not read, is dropped without a word."""
    with pytest.raises(ConfigError, match=message):
        Rotary(**{"head_width": 18, **arguments})


def test_every_scaling_is_tested() -> None:
    assert {kind for kind, *_ in SCALED.values()} | {"ntk"} == set(SCALINGS)


def test_positions_of_bf16_activations_are_not_rounded() -> None:
    """Tables are made in fp32: position 1001 and 1002 are the same number in bf16."""
    cos, _ = Rotary(D).tables(torch.tensor([1001, 1002]), 1003)
    assert cos[0, 0] == pytest.approx(math.cos(1001), abs=1e-4) and cos[1, 0] == pytest.approx(math.cos(1002), abs=1e-4)
