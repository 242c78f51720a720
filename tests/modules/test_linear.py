from __future__ import annotations

import itertools

import pytest
import torch

from fms_parallel.modules.linear import shared_linear
from tests.gradient import grad


@pytest.mark.parametrize("biased", [*itertools.product([True, False], repeat=2)])
def test_derivatives_by_finite_differences(biased: tuple[bool, bool]) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weights = draw(2, 3, 5), [draw(4, 5), draw(2, 5)]
    biases = [draw(n) if given else None for n, given in zip((4, 2), biased, strict=True)]
    given = [b for b in biases if b is not None]

    def function(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = iter(tensors[2:])
        return shared_linear(x, tensors[:2], [next(rest) if b is not None else None for b in biases])

    torch.autograd.gradcheck(function, (x, *weights, *given))
    torch.autograd.gradgradcheck(function, (x, *weights, *given))


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (2, 3, 5), (2, 0, 5)])
@pytest.mark.parametrize("rows", [4, 0])
def test_equals_torch_linear(shape: tuple[int, ...], rows: int) -> None:
    """Also for no tokens, and for the rank that holds no row of a small matrix."""
    x, w, b = torch.randn(*shape, requires_grad=True), torch.randn(rows, 5, requires_grad=True), torch.randn(rows)
    got = shared_linear(x, [w, w], [b, None])
    want = torch.nn.functional.linear(x, w, b), torch.nn.functional.linear(x, w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad((got[0] + got[1]).sum(), (x, w)), torch.autograd.grad((want[0] + want[1]).sum(), (x, w))
    )


def test_frozen_tensors_get_no_gradient() -> None:
    x = torch.randn(3, 5)
    frozen, trained, bias = torch.randn(4, 5), torch.randn(2, 5, requires_grad=True), torch.randn(2, requires_grad=True)
    first, second = shared_linear(x, [frozen, trained], [None, bias])
    (first.sum() + second.sum()).backward()
    assert frozen.grad is None and x.grad is None
    torch.testing.assert_close(grad(trained), x.sum(0).expand(2, 5))
    torch.testing.assert_close(grad(bias), torch.full((2,), 3.0))


def test_an_unused_result_counts_as_zero() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    weights = [torch.randn(4, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)]
    shared_linear(x, weights, [None, None])[0].sum().backward()
    torch.testing.assert_close(grad(x), weights[0].sum(0).expand(3, 5))
    assert not grad(weights[1]).any()


def test_the_input_is_kept_once_however_many_matrices_read_it() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        shared_linear(x, [torch.randn(4, 5) for _ in range(3)], [None] * 3)
    assert sum(t.shape == x.shape for t in kept) == 1
