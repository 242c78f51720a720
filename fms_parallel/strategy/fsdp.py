"""`FullyShardStrategy` and `ReplicateStrategy`: data parallelism by FSDP2.

    fsdp        each parameter is cut over the ranks, gathered for its group's forward and backward
    dp, fsdp    HSDP: cut over fsdp, copied over dp
    dp          whole parameters everywhere, gradients averaged

Groups: everything before the repeated blocks (the embedding), each block, everything after them (norm and head).
Gathering few large groups instead of one root with all the rest costs about a fifth less CPU (accelerate's grouping);
the last group is not freed between its forward and its backward, which follow each other at once. Nor are as many of
the last blocks as `keep_gathered` says: a gather less for each, and its memory.
Gradients come out averaged over dp * fsdp; ZeRO: arXiv 1910.02054, FSDP: arXiv 2304.11277.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from fms_parallel import compat
from fms_parallel.distributed.collectives import MEANS
from fms_parallel.errors import LayoutError
from fms_parallel.modules.added_embedding import AddedEmbedding
from fms_parallel.modules.embedding import Embedding
from fms_parallel.modules.tp import TPModule, own_parameters, twin_of
from fms_parallel.strategy.base import Strategy, repeated_blocks

POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "fp64": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
"""bf16: matrices multiply in bf16, gradients are reduced in fp32, parameters and optimizer stay fp32."""

LOOKED_UP = (Embedding, AddedEmbedding, nn.Embedding)
"""Modules whose backward pass reads no parameter: it need not be gathered again."""


class FullyShardStrategy(Strategy):
    """Cut every parameter over `mesh` (`[fsdp]`, or `[dp, fsdp]` for HSDP).

    Args:
        precision: `fp32`, `bf16` or `fp64`.
        offload: keep parameters, gradients and optimizer state on the host between uses.
        free_after_forward: free gathered parameters between forward and backward (less memory, one gather more).
        keep_gathered: blocks, the last ones, of which they are not freed all the same.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        precision: str = "fp32",
        offload: bool = False,
        free_after_forward: bool = True,
        keep_gathered: int = 0,
    ) -> None:
        self.mesh, self.precision, self.free_after_forward = mesh, precision, free_after_forward
        self.keep_gathered = keep_gathered
        self.offload: OffloadPolicy = (
            CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
        )

    def distribute(self, model: nn.Module) -> nn.Module:
        """Cut `model` in place. Raises LayoutError when it has fewer blocks than are to stay gathered."""
        kept = {id(block) for block in self._kept(model)}
        shards = self.mesh.get_group(self.mesh.ndim - 1)
        cheaper = MEANS.get(dist.get_backend(shards))

        def shard(group: list[nn.Module], is_last: bool) -> None:
            fully_shard(
                group[0] if len(group) == 1 else group,  # type: ignore[arg-type]
                mesh=self.mesh,
                mp_policy=POLICIES[self.precision],
                offload_policy=self.offload,
                reshard_after_forward=self.free_after_forward and not is_last and id(group[0]) not in kept,
            )
            if all(isinstance(module, LOOKED_UP) for module in group):
                group[0].set_unshard_in_backward(False)  # type: ignore[operator]
            if cheaper is not None:
                compat.set_fsdp_collectives(group[0], cheaper.all_gather, cheaper.reduce_scatter)

        _each_group(model, shard)
        return model

    def _kept(self, model: nn.Module) -> list[nn.Module]:
        blocks = [block for _, block in repeated_blocks(model)] if self.keep_gathered else []
        if len(blocks) < self.keep_gathered:
            raise LayoutError(
                f"keep_gathered={self.keep_gathered}: {type(model).__name__} has {len(blocks)} repeated blocks; keep "
                "at most so many."
            )
        return blocks[len(blocks) - self.keep_gathered :]


class ReplicateStrategy(Strategy):
    """Whole parameters on every rank of a one-dimensional `mesh`; gradients are averaged."""

    def __init__(self, mesh: DeviceMesh, *, precision: str = "fp32") -> None:
        self.mesh, self.precision = mesh, precision

    def distribute(self, model: nn.Module) -> nn.Module:
        """Spread `model` in place."""

        def copy(group: list[nn.Module], is_last: bool) -> None:
            compat.replicate(group[0] if len(group) == 1 else group, self.mesh, mp_policy=POLICIES[self.precision])

        _each_group(model, copy)
        return model


def _each_group(model: nn.Module, wrap: Callable[[list[nn.Module], bool], None]) -> None:
    """Wrap each group, then the root, which owns what no group has (tied parameters, for one)."""
    own = getattr(model, "parameter_groups", None)  # a module that knows which of its parts run
    groups = own() if own is not None else parameter_groups(model)
    for index, group in enumerate(groups):
        wrap(group, index == len(groups) - 1)
    wrap([model], False)


def parameter_groups(model: nn.Module) -> list[list[nn.Module]]:
    """Modules whose parameters are gathered together, in the order of the forward pass.

    What stands before the repeated blocks and what stands after them make one group each, unless they share a
    parameter: FSDP2 wants a shared parameter in one group, so then both are left to the root.
    """
    blocks = [block for _, block in repeated_blocks(model)]
    inside = {id(m) for block in blocks for m in block.modules()}
    first = next((i for i, m in enumerate(model.modules()) if id(m) in inside), 0)
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    for index, module in enumerate(model.modules()):
        if id(module) not in inside and module is not model and _uses_parameters(module):
            (before if index < first else after).append(module)
            inside.update(id(below) for below in module.modules())
    shared = {id(p) for m in before for p in m.parameters()} & {id(p) for m in after for p in m.parameters()}
    middle = [[block] for block in blocks]
    if shared:
        return middle
    return [group for group in (before, *middle, after) if group]


def _uses_parameters(module: nn.Module) -> bool:
    """Whether the module's own forward reads parameters: its own, or (as ours with twins do) those of its children."""
    if isinstance(module, TPModule) or twin_of(module) is not None:
        return bool(own_parameters(module))
    return any(True for _ in module.parameters(recurse=False))
