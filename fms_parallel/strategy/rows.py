"""Ranks that share rows must be given the same ones: what is asked of the first batch that a model trains on.

The ranks of pp, cp and tp work on one batch together. A sampler that deals rows by rank gives each of them another one;
nothing fails then, and every number is wrong. It knows meshes and integer tensors; it knows no batches and no models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel.distributed.mesh import data_shard
from fms_parallel.errors import LayoutError, TrainingError

SHARING = ("pp", "cp", "tp")
"""Axes whose ranks share rows."""


class SameRows:
    """Looks once; costs nothing afterwards.

    Args:
        mesh: with all five dimensions.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        unreal = dist.get_backend() == "fake"  # nobody answers there
        self.unseen = [] if unreal else [axis for axis in SHARING if mesh[axis].size() > 1]

    def check(self, given: Iterable[Any], axes: Iterable[str] = SHARING) -> None:
        """The first time: are the integer tensors among `given` the same on all ranks of `axes`? Collective.

        Raises:
            TrainingError: they are not.
        """
        if not (asked := [axis for axis in self.unseen if axis in axes]):
            return
        self.unseen = [axis for axis in self.unseen if axis not in asked]
        mark = _mark([tensor for tensor in given if isinstance(tensor, Tensor) and not tensor.is_floating_point()])
        for axis in asked:
            both = torch.stack([mark, -mark])
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.mesh[axis].get_group())
            if int(both[0]) != -int(both[1]):
                raise TrainingError(self._told(axis))

    def _told(self, axis: str) -> str:
        index, count = data_shard(self.mesh)
        return (
            f"{axis}={self.mesh[axis].size()}: the ranks of {axis} were given different rows, but they work on the "
            "same ones. Deal rows by data_shard(model.parallel.mesh), not by rank: of a global batch this rank has "
            f"part {index} of {count}."
        )


def _mark(tensors: list[Tensor]) -> Tensor:
    """A number that other tensors, or the same ones in another order, hardly have: `[]`, int64, not negative."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    for tensor in tensors:
        values = tensor.detach().flatten().to(torch.int64)
        weights = torch.arange(1, len(values) + 1, device=values.device) * 0x9E3779B97F4A7C1 | 1
        # What overflows wraps around, alike everywhere.
        total = total * 1_000_003 + ((values + 7) * weights).sum() + len(values)
    return total & ((1 << 62) - 1)


def guard_forward(model: nn.Module, same_rows: SameRows) -> None:
    """Let a training forward that the caller starts say what would be silently wrong.

    Its hook raises TrainingError for rows that differ over tp, and LayoutError where ranks of cp are not told which
    part of the rows they have: all of them would compute the same whole rows, whose gradients count cp times.
    """
    cp = same_rows.mesh["cp"].size()
    if not same_rows.unseen:
        return

    def look(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if cp > 1 and named.get("context") is None:
            raise LayoutError(
                f"cp={cp}: a training forward needs this rank's part of every row and its `context`. Take "
                "training.mean_loss(model, batch, tokens) or training.compute_gradients(model, batches), or "
                "part = share_of(model, batch) and model(part.input_ids, labels=part.labels, context=part.context); "
                "to look at whole rows use model.eval() or torch.no_grad()."
            )
        same_rows.check([*arguments, *named.values()], ("tp",))  # ranks of cp have parts

    model.register_forward_pre_hook(look, with_kwargs=True)
