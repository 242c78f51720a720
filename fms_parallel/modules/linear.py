"""Several matrices that read the same input, as one operation.

Query, key and value (or gate and up) each multiply the same tokens. Done apart, autograd adds their input gradients
in extra passes over `[T, E]`; done here the second and third product accumulate into the first. That is what a fused
weight is wanted for, without storing one: each matrix keeps its own name, its own shard and its own checkpoint key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Tensor | None


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, biases: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(biases)
        weights, given = tensors[:count], iter(tensors[count:])
        ctx.save_for_backward(x, *weights)
        ctx.biases = biases
        flat = x.flatten(0, -2)
        out = (
            torch.addmm(next(given), flat, w.t()) if biased else torch.mm(flat, w.t())
            for w, biased in zip(weights, biases, strict=True)
        )
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat = x.flatten(0, -2)
        rows = [g.reshape(flat.shape[0], g.shape[-1]) for g in grads]
        d_x = _input_gradient(rows, weights).view(x.shape) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[2:]
        d_weights = [g.t() @ flat if need else None for g, need in zip(rows, wanted, strict=False)]
        d_biases = [g.sum(0) for g, biased in zip(rows, ctx.biases, strict=True) if biased]
        return (d_x, None, *d_weights, *d_biases)


def _input_gradient(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = rows[0] @ weights[0]
    for g, w in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(g, w)
    return total


def shared_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Bias]) -> tuple[Tensor, ...]:
    """`x [..., E]` times each `weight [N_i, E]` (plus `bias [N_i]`) -> one `[..., N_i]` each."""
    if not torch.is_grad_enabled():  # nothing to accumulate; and torch.compile loses the thread of a Function here
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    given = tuple(b is not None for b in biases)
    return _SharedInput.apply(x, given, *weights, *(b for b in biases if b is not None))
