from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.modules import loss as room
from fms_parallel.modules.loss import IGNORE, VocabularyShard, linear_cross_entropy
from tests.gradient import grad

T, E, V = 7, 4, 11
WHOLE = VocabularyShard(None, 0, V)


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = torch.randn(T, E, dtype=dtype, requires_grad=True), torch.randn(V, E, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (T,))
    labels[[1, 4]] = IGNORE
    return x, weight, labels


def oracle(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.t(), labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("elements", [1, 3 * V, 1 << 21])
def test_loss_and_gradients_equal_torch(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one token a chunk, three, and all of them."""
    monkeypatch.setitem(room._CHUNK_ELEMENTS, "cpu", elements)
    x, weight, labels = draw()
    got, want = linear_cross_entropy(x, weight, labels, WHOLE), oracle(x, weight, labels)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    for g, w in zip(torch.autograd.grad(got * 3, (x, weight)), torch.autograd.grad(want * 3, (x, weight)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_derivatives_by_finite_differences() -> None:
    x, weight, labels = draw()
    torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, WHOLE), (x, weight))


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    x, weight, labels = draw()
    want = dict(zip(("x", "weight"), torch.autograd.grad(oracle(x, weight, labels), (x, weight)), strict=True))
    inputs = {"x": x, "weight": weight}
    for name, tensor in inputs.items():
        tensor.requires_grad_(frozen not in (name, "both"))
    loss = linear_cross_entropy(x, weight, labels, WHOLE)
    torch.testing.assert_close(loss, oracle(x, weight, labels), rtol=1e-13, atol=0)
    if frozen != "both":
        loss.backward()
    for name, tensor in inputs.items():
        if tensor.requires_grad:
            torch.testing.assert_close(grad(tensor), want[name], rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


def test_evaluation_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad parameters still say that they need one."""
    asked = []
    real = room._chunk

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(room, "_chunk", spy)
    x, weight, labels = draw()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels, WHOLE)
    assert asked == [False]
    torch.testing.assert_close(loss, oracle(x, weight, labels), rtol=1e-13, atol=0)


def test_no_valid_label_gives_zero_loss_and_gradient() -> None:
    x, weight, _ = draw()
    loss = linear_cross_entropy(x, weight, torch.full((T,), IGNORE), WHOLE)
    loss.backward()
    assert loss == 0 and not grad(x).any() and not grad(weight).any()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_stay_finite(size: float) -> None:
    x, weight, labels = draw(torch.float32)
    loss = linear_cross_entropy(x * size, weight, labels, WHOLE)
    torch.testing.assert_close(loss, oracle(x * size, weight, labels))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, weight)))


def test_bf16_loss_is_summed_in_fp32() -> None:
    x, weight, labels = draw(torch.bfloat16)
    loss = linear_cross_entropy(x, weight, labels, WHOLE)
    want = oracle((x @ weight.t()).float(), torch.eye(V), labels)  # of logits that were rounded to bf16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    loss.backward()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    oracle(x64, weight64, labels).backward()
    assert grad(x).dtype == grad(weight).dtype == torch.bfloat16
    torch.testing.assert_close(grad(x).double(), grad(x64), rtol=0.05, atol=0.05)
    torch.testing.assert_close(grad(weight).double(), grad(weight64), rtol=0.05, atol=0.05)


def test_second_derivatives_are_refused_not_wrong() -> None:
    x, weight, labels = draw()
    with pytest.raises(ConfigError, match="second derivatives"):
        torch.autograd.grad(linear_cross_entropy(x, weight, labels, WHOLE), x, create_graph=True)


@pytest.mark.parametrize("label", [V, -1, -101])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    x, weight, labels = draw()
    labels[2] = label
    with pytest.raises(RuntimeError, match=r"a label is neither -100 nor a token id in \[0, 11\)"):
        linear_cross_entropy(x, weight, labels, WHOLE)


def test_a_bias_is_added_to_the_logits() -> None:
    """As a column of the weight that multiplies ones."""
    x, weight, labels = draw()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    got = linear_cross_entropy(x, weight, labels, WHOLE, bias)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    want = oracle(torch.cat([x, ones], 1), torch.cat([weight, bias[:, None]], 1), labels)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    inputs = (x, weight, bias)
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
