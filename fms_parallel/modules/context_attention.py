"""Attention when the ranks of the cp axis share every sequence: three ways to bring queries and keys together.

    allgather   every rank gathers all keys and values; its own queries attend        (Llama 3: arXiv 2407.21783)
    ulysses     heads for positions, all-to-all: a rank attends with 1/cp of the heads     (arXiv 2309.14509)
    ring        keys and values pass from rank to rank, results are merged: modules/ring.py  (arXiv 2310.01889)

Plain tensors and one axis; it knows no parameters, no rotary tables and no tp. Queries, keys and values are this
rank's: `q [B, h, held, D]`, `k, v [B, k, held, D]`, positions as `Context` says, already rotated.

A mask has this rank's queries as rows and all S positions, in order, as columns: `[B or 1, 1 or h, held or 1, S]`, or
less dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fms_parallel.distributed.collectives import all_gather, exchange, gather_tokens
from fms_parallel.errors import LayoutError
from fms_parallel.modules.context import Context
from fms_parallel.modules.ring import ring
from fms_parallel.modules.scores import dropped_scores, scores


class Rule(NamedTuple):
    """Which keys a query may see, and how scores are scaled; as of `scores`."""

    mask: Tensor | None
    scale: float | None
    causal: bool


@torch.compiler.disable
def context_attention(q: Tensor, k: Tensor, v: Tensor, context: Context, rule: Rule) -> Tensor:
    """`scores` over the whole sequences: `[B, h, held, D]`, what a padded query gives means nothing."""
    if rule.mask is not None:
        rule = rule._replace(mask=rule.mask[(None,) * (4 - rule.mask.dim())])
    return METHODS[context.method](q, k, v, context, rule)


def dropped_context_attention(q: Tensor, k: Tensor, v: Tensor, context: Context, rule: Rule, factors: Tensor) -> Tensor:
    """`dropped_scores` over the whole sequences; `factors [B, h, held, S]`.

    Whatever the method, keys and values are gathered: held x S weights are here anyway.
    """
    mask, scale, causal = rule
    if causal and mask is None:
        columns = torch.arange(context.length, device=q.device)
        mask = context.positions(q.device).unsqueeze(-1) >= columns
    return dropped_scores(q, *_gathered(k, v, context, context.length), mask, scale, False, factors)


def _gathered(k: Tensor, v: Tensor, context: Context, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of all ranks in order, `[B, k, length, D]`; gradients are summed and cut."""
    both = gather_tokens(torch.stack([k, v]).unsqueeze(0), context.axis, context.axis.size)
    whole = context.whole(both)[..., :length, :]
    return whole[0], whole[1]


def _allgather(q: Tensor, k: Tensor, v: Tensor, context: Context, rule: Rule) -> Tensor:
    mask, scale, causal = rule
    if mask is not None or not causal:
        return scores(q, *_gathered(k, v, context, context.length), mask, scale, False)
    chunk, size, rank = context.chunk, context.axis.size, context.axis.rank
    k, v = _gathered(k, v, context, 2 * size * chunk)
    # Each half attends to what is before its end: nobody computes what the mask would hide, all compute the same.
    ends = ((rank + 1) * chunk, (2 * size - rank) * chunk)
    halves = zip(q.split(chunk, -2), ends, strict=True)
    return torch.cat([scores(half, k[..., :end, :], v[..., :end, :], None, scale, True) for half, end in halves], -2)


def _ulysses(q: Tensor, k: Tensor, v: Tensor, context: Context, rule: Rule) -> Tensor:
    size = context.axis.size
    check_ulysses(q.shape[1], size)
    k, v = (_copied_heads(x, q.shape[1], size) for x in (k, v))
    # One exchange: queries, keys and values of a rank's heads lie side by side.
    packed = torch.cat([x.unflatten(1, (size, -1)) for x in (q, k, v)], 2).transpose(0, 1)
    whole = context.whole(exchange(packed, context.axis))[..., : context.length, :]
    mine, kv = q.shape[1] // size, k.shape[1] // size
    mask = None if rule.mask is None else _whole_mask(rule.mask, context, mine)
    q, k, v = whole.split((mine, kv, kv), 1)
    mixed = scores(q, k, v, mask, rule.scale, rule.causal)
    return exchange(context.pieces(mixed), context.axis).transpose(0, 1).flatten(1, 2)


def check_ulysses(heads: int, size: int) -> None:
    """Raises LayoutError when the query heads of a rank do not divide by the cp axis."""
    if heads % size:
        raise LayoutError(
            f"cp={size},cp_method=ulysses: {heads} query heads of a tp rank do not divide by {size}; "
            "use a cp that divides them, or cp_method=ring."
        )


def _copied_heads(x: Tensor, heads: int, size: int) -> Tensor:
    """Key or value heads such that every rank gets those that its queries read; gradients of copies are summed."""
    kv = x.shape[1]
    if kv % size == 0:
        return x
    return x.repeat_interleave(size // kv if size % kv == 0 else heads // kv, dim=1)


def _whole_mask(mask: Tensor, context: Context, heads: int) -> Tensor:
    """The mask of all queries for this rank's heads."""
    if mask.shape[1] > 1:
        raise LayoutError("cp_method=ulysses: a mask that differs between heads does not go with it; use ring.")
    if mask.shape[-2] == 1:
        return mask
    return context.whole(all_gather(mask.unsqueeze(0), context.axis))[..., : context.length, :]


METHODS = {"allgather": _allgather, "ulysses": _ulysses, "ring": lambda *given: ring(*given[:4], *given[4])}
"""`layout.CP_METHODS` -> (q, k, v, context, rule) -> `[B, h, held, D]`."""
