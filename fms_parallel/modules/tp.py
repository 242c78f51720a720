"""`TPModule`: what every tensor-parallel twin has in common.

A twin is a native module's class for ranks that share its matrices. It declares once where each parameter is cut
(`placements`), and its forward takes every parameter as the plain tensor this rank holds, computes locally, and talks
to the other ranks only where a region begins (`enter`) and ends (`leave`):

                         without sp                          with sp
    enter   x [B, S, E] on every rank              x [T/tp, E]  --all-gather-->  [T, E]
    ...     column-parallel, local heads, row-parallel: partial sums [..., E]
    leave   --all-reduce-->  [B, S, E]             --reduce-scatter-->  [T/tp, E]

A region that only multiplies what enters (`read`) keeps its run alone, and gathers once more in the backward pass.

DTensor is how parameters are stored, so that FSDP2, distributed checkpoints and clipping compose; it is not how
activations are computed. Megatron-LM (arXiv 1909.08053) and its sequence parallelism (arXiv 2205.05198).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor

from fms_parallel.distributed.collectives import Axis, TokenRun, copy_in, gather_tokens, reduce_out, scatter_tokens
from fms_parallel.errors import LayoutError
from fms_parallel.modules.linear import Input
from fms_parallel.modules.linear_types import SCALE, scale_placement
from fms_parallel.modules.low_rank import factor_placement, matrix_of


class TPModule(nn.Module):
    """Base of every twin. A subclass names its native as second base: `class TPHead(TPModule, Head)`.

    Attributes:
        axis: the ranks that share this module's matrices.
        sp: activations between regions are runs of tokens `[T/tp, E]` instead of whole `[B, S, E]`.
        uncut: the twin in its place where the layout does not cut this part of a block; None: it is always cut.
    """

    axis: Axis
    sp: bool
    uncut: type[TPModule] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        natives = [base for base in cls.__bases__ if base is not TPModule and not issubclass(base, TPModule)]
        for native in natives:
            native.tp_twin = cls  # type: ignore[attr-defined]

    def placements(self) -> dict[str, Placement]:
        """Where each parameter below this module is cut, by its name relative to this module."""
        raise NotImplementedError(f"{type(self).__name__} must say where its parameters are cut")

    def adopted(self) -> None:
        """Called once after the swap: check sizes, work out local counts."""

    def enter(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """Begin a region: what column-parallel matrices read. `tokens` drops the padding of the last rank's run."""
        if not self.sp:
            return copy_in(x, self.axis)
        return gather_tokens(x, self.axis, self._length(x, tokens))

    def read(self, x: Tensor, tokens: int | None = None) -> Input:
        """`enter` for a region that only multiplies `x`: with sp what is kept of it for the backward pass is a run."""
        if not self.sp or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.enter(x, tokens)
        return TokenRun(x, self.axis, self._length(x, tokens))

    def _length(self, run: Tensor, tokens: int | None) -> int:
        """T, of which this rank has a run; None: the padding of the last one counts."""
        return tokens if tokens is not None else run.shape[0] * self.axis.size

    def leave(self, partial: Tensor, bias: Tensor | None = None) -> Tensor:
        """End a region: sum what row-parallel matrices gave; a bias is added once, after the sum."""
        y = scatter_tokens(partial.flatten(0, -2), self.axis) if self.sp else reduce_out(partial, self.axis)
        return y if bias is None else y + self.whole(bias, y)

    def shard(self, parameter: Tensor, like: Tensor) -> Tensor:
        """This rank's piece of a sharded parameter, in the dtype of `like`; its gradient is complete."""
        return local(parameter).to(like.dtype)

    def whole(self, parameter: Tensor, like: Tensor) -> Tensor:
        """A replicated parameter used on this rank's tokens.

        With sp each rank sees only its own tokens, so the gradient is a partial sum over the axis; without sp every
        rank computes the same.
        """
        return local(parameter, Partial() if self.sp else Replicate()).to(like.dtype)

    def summed(self, parameter: Tensor, like: Tensor) -> Tensor:
        """A replicated parameter that each rank uses differently (its own heads): the gradient is a partial sum."""
        return local(parameter, Partial()).to(like.dtype)

    def factor(self, parameter: Tensor, like: Tensor) -> Tensor:
        """An adapter's factor: cut along with its matrix, or whole and used on this rank's share of the other one."""
        whole = isinstance(parameter, DTensor) and parameter.placements[0].is_replicate()
        return self.summed(parameter, like) if whole else self.shard(parameter, like)


def local(parameter: Tensor, grad: Placement | None = None) -> Tensor:
    """The plain tensor this rank holds of a parameter; `grad` says what its gradient is (default: as it is stored)."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=None if grad is None else [grad])


def twin_of(module: nn.Module, parts: str = "all") -> type[TPModule] | None:
    """The twin that the exact class of `module` has: a subclass that changed something does not inherit one.

    Args:
        parts: of a block that tp cuts, as `tp_parts` of a layout.
    """
    twin: type[TPModule] | None = type(module).__dict__.get("tp_twin")
    return twin if twin is None or parts == "all" else twin.uncut or twin


def adopt(module: nn.Module, mesh: DeviceMesh, sp: bool, parts: str = "all") -> nn.Module:
    """Turn `module` into its twin in place: swap the class, cut the parameters.

    The object, its name in the model and its hooks stay (as with `fully_shard`). Every parameter below it must be
    declared by the twin or belong to a nested twin. `parts`: as of `twin_of`.

    Raises:
        LayoutError: no twin, or a parameter nobody declares.
    """
    twin = twin_of(module, parts)
    if twin is None:
        raise LayoutError(f"{type(module).__name__} has no tensor-parallel twin; give it one or a layer plan.")
    module.__class__ = twin
    assert isinstance(module, TPModule)
    module.axis, module.sp = Axis.of(mesh), sp
    placements = module.placements()
    mine = own_parameters(module)
    for name in [name for name in mine if name.endswith(SCALE)]:
        weight = name.removesuffix(SCALE)
        placements[name] = scale_placement(placements[weight], module.get_parameter(weight).ndim)
    for name in mine:
        if (matrix := matrix_of(name)) is not None:
            placements[name] = factor_placement(name, placements[matrix], module.get_parameter(matrix).ndim)
    if missing := sorted(set(mine) - set(placements)):
        raise LayoutError(f"{twin.__name__} does not say where {', '.join(missing)} are cut.")
    for name in mine:
        place(module, name, mesh, placements[name])
    module.adopted()
    return module


def own_parameters(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of the parameters below `module` that no nested module with a twin of its own will place."""
    names = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    for child_name, child in module.named_children():
        if twin_of(child) is None and not isinstance(child, TPModule):
            names += own_parameters(child, f"{prefix}{child_name}.")
    return names


def place(
    module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None = None
) -> None:
    """Replace the parameter `name` by a DTensor.

    Every rank cuts what it already holds, without communication, unless `src_data_rank` names the rank of the mesh
    whose values all shall have.
    """
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    parameter = getattr(owner, attribute)
    if isinstance(parameter, DTensor):
        return
    tensor = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=src_data_rank)
    setattr(owner, attribute, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
