"""A replayed block against the plain one: the same gradients, in however many passes, from one more forward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import TrainingError
from fms_parallel.strategy.replay import replayed


class Block(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.runs = nn.Linear(5, 7), nn.Linear(7, 5), 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.second(torch.tanh(self.first(x)).square())


def gradients(block: Block, x: Tensor) -> list[Tensor]:
    """As a zero-bubble schedule finds them: of the input first, then of each weight."""
    out = block(x).sin().sum()
    found = list(torch.autograd.grad(out, [x], retain_graph=True))
    for parameter in block.parameters():
        found += torch.autograd.grad(out, [parameter], retain_graph=True)
    return found


def test_gradients_in_many_passes_equal_those_of_the_plain_block_from_one_replay() -> None:
    block, x = Block(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    expected = gradients(block, x)
    assert block.runs == 1
    block.forward = replayed(block.forward)  # type: ignore[method-assign]
    assert all(torch.equal(a, b) for a, b in zip(gradients(block, x), expected, strict=True))
    assert block.runs == 3


def test_without_gradients_nothing_is_replayed() -> None:
    block = Block()
    block.forward = replayed(block.forward)  # type: ignore[method-assign]
    with torch.no_grad():
        assert block(torch.ones(1, 5, dtype=torch.float64)).grad_fn is None
    assert block.runs == 1


def test_what_was_made_again_goes_with_the_graph() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x * 2)  # type: ignore[attr-defined]
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
            kept.append(weakref.ref(saved))
            return grad * saved

    x = torch.ones(3, requires_grad=True)
    out = replayed(Watched.apply)(x).sum()
    torch.autograd.grad(out, [x], retain_graph=True)
    torch.autograd.grad(out, [x], retain_graph=True)
    assert kept[0]() is kept[1]() is not None  # one replay served both
    del out
    gc.collect()
    assert kept[0]() is None


def test_a_forward_that_does_less_the_second_time_is_named() -> None:
    runs = []

    def forward(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin() if len(runs) > 1 else x.sin().sin()

    out = replayed(forward)(torch.ones(2, requires_grad=True)).sum()
    with pytest.raises(TrainingError, match="kept 2 tensors in its forward pass and 1 when it was run again"):
        out.backward()
