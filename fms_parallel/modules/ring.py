"""Ring attention: keys and values travel once around the cp axis, each rank merges what it finds in them.

    cp = 4, step:   0   1   2   3          keys of rank, as seen by rank 1: own ones first, then those that the
    rank 1 has      1   0   3   2          previous rank had a step ago

With the head-tail cut of `Context` a causal mask never has to be made: of keys from a rank before this one the head
half is seen whole, by all queries; of keys from a rank behind it everything is seen, by the tail queries; own keys are
seen causally. All ranks do the same work in every step. The next keys travel while the present ones are worked on.

The backward pass goes around again: keys and values as before, and behind them their gradients, to which each rank adds
its part until they are home. Ring attention: arXiv 2310.01889; merging: arXiv 1805.02867; balance: arXiv 2311.09431.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fms_parallel.distributed.collectives import shift
from fms_parallel.modules.block_attention import block, block_backward, merge
from fms_parallel.modules.context import Context
from fms_parallel.modules.first_order import first_order


def ring(
    q: Tensor, k: Tensor, v: Tensor, context: Context, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """Attention of `q [B, h, held, D]` over the keys of all ranks, `k, v [B, k, held, D]` -> `[B, h, held, D]`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Ring.apply(q, torch.stack([k, v]), mask, context, scale, causal and mask is None)


class Part(NamedTuple):
    """What this rank's queries see of the keys of one rank."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None


def part(context: Context, source: int, causal: bool, mask: Tensor | None) -> Part | None:
    """Of the keys of rank `source`; None: nothing."""
    rank, chunk, everything = context.axis.rank, context.chunk, slice(0, context.held)
    if causal and source == rank:
        return Part(everything, everything, True, None)
    if causal:
        half = slice(0, chunk) if source < rank else slice(chunk, context.held)
        return Part(everything, half, False, None) if source < rank else Part(half, everything, False, None)
    real = context.real(source)
    if real == 0:
        return None
    columns = None if mask is None else context.cut(mask, -1, rank=source)[..., :real]
    return Part(everything, slice(0, real), False, columns)


def _parts(context: Context, causal: bool, mask: Tensor | None) -> Iterator[Part | None]:
    """What is seen at each step."""
    for step in range(context.axis.size):
        yield part(context, (context.axis.rank - step) % context.axis.size, causal, mask)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, mask: Tensor | None, context: Context, scale: float, causal: bool
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        sums = torch.full(q.shape[:-1], float("-inf"), dtype=wide, device=q.device)
        present, last = kv, context.axis.size - 1
        for step, seen in enumerate(_parts(context, causal, mask)):
            arriving = shift(present, context.axis) if step < last else None
            if seen is not None:
                k, v = present[..., seen.keys, :]
                found = block(q[..., seen.queries, :], k, v, seen.mask, scale, seen.causal)
                merge(out[..., seen.queries, :], sums[..., seen.queries], *found)
            if arriving is not None:
                present = arriving()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, sums, mask)
        ctx.rule = context, scale, causal
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, sums, mask = ctx.saved_tensors
        context, scale, causal = ctx.rule
        d_q = torch.zeros(q.shape, dtype=sums.dtype, device=q.device)
        d_own = torch.zeros(kv.shape, dtype=sums.dtype, device=q.device)
        present, last = kv, context.axis.size - 1
        returning = None
        for step, seen in enumerate(_parts(context, causal, mask)):
            arriving = shift(present, context.axis) if step < last else None
            d_present = d_own if step == 0 else torch.zeros_like(d_own)
            if seen is not None:
                rows, (k, v) = (..., seen.queries, slice(None)), present[..., seen.keys, :]
                given = grad[rows], q[rows], k, v, out[rows], sums[..., seen.queries]
                found = block_backward(*given, seen.mask, scale, seen.causal)
                d_q[rows] += found[0]
                d_present[0, ..., seen.keys, :] = found[1]
                d_present[1, ..., seen.keys, :] = found[2]
            if returning is not None:
                d_present += returning()
            # The gradient of keys leaves with the rank that they go to next; those of the last step go home.
            returning = shift(d_present, context.axis) if step > 0 else None
            if arriving is not None:
                present = arriving()
        if returning is not None:
            d_own += returning()
        return d_q.to(q.dtype), d_own.to(kv.dtype), None, None, None, None
