from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, TrainingError
from fms_parallel.modules import linear_types
from fms_parallel.modules.attention import Attention, AttentionShape
from fms_parallel.modules.embedding import Head
from fms_parallel.modules.feedforward import FeedForward
from fms_parallel.modules.linear_types import Int8, Quantised, get_linear_type, list_linear_types, quantise
from fms_parallel.modules.sequences import Sequences

INT8 = Int8()


def rounded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Quantised]:
    """A random matrix and its int8 form."""
    torch.manual_seed(0)
    weight = torch.randn(*shape).to(dtype)
    scale = INT8.scale(weight.abs().amax(-1))
    return weight, INT8.weight(INT8.values(weight, scale), scale)


# ---- int8 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_weight_moves_by_more_than_half_a_scale(dtype: torch.dtype) -> None:
    weight, stored = rounded(50, 30, dtype=dtype)
    off = (stored.dense(torch.float64) - weight.double()).abs()
    assert (off <= stored.scale.double().unsqueeze(1) / 2 * (1 + 1e-6)).all()
    exact = weight.double().abs().amax(1) / 127
    assert (stored.scale >= exact * (1 - 1e-6)).all() and (stored.scale <= exact * (1 + 2**-7) * (1 + 1e-6)).all()


def test_scales_are_the_same_numbers_in_bf16() -> None:
    _, stored = rounded(200, 8)
    assert torch.equal(stored.scale.to(torch.bfloat16).float(), stored.scale)


def test_rows_of_zeros_stay_zero_and_empty_matrices_are_allowed() -> None:
    scale = INT8.scale(torch.zeros(3))
    assert not INT8.dense(INT8.values(torch.zeros(3, 4), scale), scale, torch.float32).any()
    empty = INT8.weight(torch.empty(0, 4, dtype=torch.int8), torch.empty(0))
    assert empty.multiply(torch.ones(2, 4), None).shape == (2, 0)


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("shape", [(5, 6), (700, 1030)])  # the second is multiplied in two pieces
def test_product_is_that_of_the_dequantised_matrix(rows: int, shape: tuple[int, int]) -> None:
    _, stored = rounded(*shape)
    x, bias = torch.randn(2, rows, shape[1]), torch.randn(shape[0])
    want = (x.double() @ stored.dense(torch.float64).t() + bias).float()
    got = stored.multiply(x, bias)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("width", [96, 24, 7])  # torch's kernel is wrong for widths that do not divide by 16
def test_product_in_bf16_is_right_to_its_last_bits(rows: int, width: int) -> None:
    _, stored = rounded(64, width)
    x = torch.randn(rows, width).bfloat16()
    want = x.double() @ stored.dense(torch.float64).t()
    # Rounded to bf16 before and after the scale: (1 + 2^-8)^2.
    room = 2**-7 * (1 + 2**-8) * want.abs() + 1e-5 * (x.double().abs() @ stored.dense(torch.float64).abs().t())
    assert ((stored.multiply(x, None).double() - want).abs() <= room).all()


# ---- the register -----------------------------------------------------------------------------------------------


def test_an_unknown_word_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown linear type 'int9'.*Known: .*int8"):
        get_linear_type("int9")


def test_a_new_type_is_a_class_and_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halves(Int8):
        name = "halves"

        def values(self, weight: Tensor, scale: Tensor) -> Tensor:
            return super().values(weight / 2, scale)

    monkeypatch.setattr(linear_types, "_TYPES", dict(linear_types._TYPES))
    linear_types.register_linear_type(Halves())
    assert list_linear_types() == ["halves", "int8"]
    with pytest.raises(ConfigError, match="registered already"):
        linear_types.register_linear_type(Halves())
    head = filled(Head(11, 8))
    want = head.weight.detach() / 2
    quantise(head, "halves")
    torch.testing.assert_close(dense(head), want, atol=0.05, rtol=0)


# ---- modules ----------------------------------------------------------------------------------------------------


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def dense(owner: nn.Module) -> Tensor:
    """The plain weight that a quantised module stands for."""
    weight, scale = owner.get_parameter("weight"), owner.get_parameter("weight_scale")
    kind = owner.linear_type
    assert isinstance(kind, Int8)
    return kind.dense(weight, scale, torch.float32)


GQA = AttentionShape(16, 4, 2, 4, qkv_bias=True, out_bias=True)
CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "attention": (lambda: Attention(GQA), True),
    "attention, fused": (lambda: Attention(AttentionShape(16, 4, 2, 4, qkv_bias=True, fused=True)), True),
    "feed-forward": (lambda: FeedForward(16, 24, bias=True), False),
    "feed-forward, fused": (lambda: FeedForward(16, 24, fused=True), False),
    "feed-forward, plain": (lambda: FeedForward(16, 24, "gelu", gated=False), False),
    "head": (lambda: Head(11, 16, bias=True), True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_module_is_the_module_with_rounded_weights(case: str) -> None:
    build, told = CASES[case]
    module, plain = filled(build()), filled(build())
    quantise(module, "int8")
    with torch.no_grad():
        for name, owner in module.named_modules():
            if hasattr(owner, "linear_type"):
                plain.get_submodule(name).get_parameter("weight").copy_(dense(owner))
    x, seq = torch.randn(2, 3, 16), Sequences(2, 3)
    with torch.no_grad():
        got, want = (m(x, seq) if told else m(x) for m in (module, plain))
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert not torch.equal(want, filled(build())(*((x, seq) if told else (x,))))  # rounding did change something


def test_a_loss_through_a_quantised_head_is_that_of_its_rounded_weights() -> None:
    head, seq, x = filled(Head(11, 16)), Sequences(1, 4), torch.randn(1, 4, 16)
    quantise(head, "int8")
    labels = torch.tensor([[1, 2, -100, 10]])
    with torch.no_grad():
        got = head(x, seq, labels)
    want = nn.functional.cross_entropy(x[0] @ dense(head).t(), labels[0], reduction="sum")
    torch.testing.assert_close(got, want)
    with pytest.raises(TrainingError, match="int8 weights are rounded and take no gradient"):
        head(x, seq, labels)


def test_a_backward_pass_is_refused() -> None:
    module = filled(FeedForward(8, 12))
    quantise(module, "int8")
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(TrainingError, match="train without linear_type"):
        module(x).sum().backward()


def test_skipped_modules_stay_plain() -> None:
    module = filled(FeedForward(8, 12))
    before = module.get_parameter("down.weight").clone()
    quantise(module, "int8", skip=("down",))
    assert torch.equal(module.get_parameter("down.weight"), before)
    assert module.get_parameter("up.weight").dtype == torch.int8


def test_wrong_requests_are_refused() -> None:
    module = filled(FeedForward(8, 12))
    with pytest.raises(ConfigError, match=r"unknown module in skip 'dwn'.*Did you mean 'down'"):
        quantise(module, "int8", skip=("dwn",))
    with pytest.raises(ConfigError, match="fp16, whose range"):
        quantise(filled(FeedForward(8, 12)).half(), "int8")
    with pytest.raises(ConfigError, match="Linear has no matrices"):
        quantise(nn.Linear(2, 2), "int8")
    quantise(module, "int8")
    with pytest.raises(ConfigError, match="quantise a model once"):
        quantise(module, "int8")
