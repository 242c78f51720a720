"""Rows of a stored matrix, cut in one piece for each rank, dealt out so that each rank has its share of every part.

    stored    rank 0: q0 q1 k0    rank 1: k1 v0 v1          one box each: files, checkpoints and FSDP know boxes
    used      rank 0: q0 k0 v0    rank 1: q1 k1 v1          what a rank's heads need

A row moves only when another rank needs it, `1 - 1/tp` of the matrix in all, forward; its gradient moves back. It knows
one axis of ranks and row numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed.collectives import Axis


@dataclass(frozen=True)
class Dealing:
    """Who gives which rows to whom.

    Attributes:
        order: this rank's stored rows in the order in which they leave, by receiver. gives, takes: how many to and
            from each rank.
    """

    axis: Axis
    order: Tensor
    gives: list[int]
    takes: list[int]


def dealing(parts: Sequence[int], axis: Axis) -> Dealing:
    """For a matrix whose rows consist of `parts`, each divisible by the ranks."""
    stored = sum(parts) // axis.size
    shares: list[Tensor] = []
    for rank in range(axis.size):
        rows, start = [], 0
        for part in parts:
            rows.append(torch.arange(start + rank * part // axis.size, start + (rank + 1) * part // axis.size))
            start += part
        shares.append(torch.cat(rows))
    given = [share[share // stored == axis.rank] - axis.rank * stored for share in shares]
    taken = [int((shares[axis.rank] // stored == rank).sum()) for rank in range(axis.size)]
    return Dealing(axis, torch.cat(given), [len(rows) for rows in given], taken)


def deal(rows: Tensor, plan: Dealing) -> Tensor:
    """`[N/tp, ...]` stored -> `[N/tp, ...]` used, differentiable. Collective over the axis."""
    dealt: Tensor = _Deal.apply(rows, plan)
    return dealt


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Dealing) -> Tensor:
        ctx.plan = plan
        return _moved(rows[plan.order.to(rows.device)], plan.gives, plan.takes, plan.axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        plan: Dealing = ctx.plan
        back = _moved(gradient.contiguous(), plan.takes, plan.gives, plan.axis)
        return torch.empty_like(back).index_copy_(0, plan.order.to(back.device), back), None


def _moved(rows: Tensor, gives: list[int], takes: list[int], axis: Axis) -> Tensor:
    out = rows.new_empty((sum(takes), *rows.shape[1:]))
    dist.all_to_all_single(out, rows, takes, gives, group=axis.group)
    return out
