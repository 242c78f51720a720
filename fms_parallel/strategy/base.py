"""`Strategy`: what turns a module into a distributed module, and `Parallel`: what a distributed module remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.layout import ParallelLayout


class Strategy(ABC):
    """One way of spreading a module over the ranks of a mesh. `compose` applies several in the one right order."""

    @abstractmethod
    def distribute(self, model: nn.Module) -> nn.Module:
        """Spread `model`, in place where possible; parameters may still be on the meta device."""


@dataclass(frozen=True)
class Parallel:
    """How a model is spread: kept as `model.parallel`, read by trainer, generation and checkpoints."""

    layout: ParallelLayout
    mesh: DeviceMesh | None
    pipeline: Any = None
    """The `Pipeline` that runs a model cut into stages, or None."""
    elsewhere: frozenset[str] = frozenset()
    """Names of the parameters that only other stages hold."""
    names: tuple[str, ...] = ()
    """Of the whole model's parameters and persistent buffers, in its order, whatever this rank holds of them."""
    context: Any = None
    """The `ContextStrategy` that cuts rows into parts, or None."""
    same_rows: Any = None
    """The `SameRows` that looks at the first batch, or None."""

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that hold pieces or copies of one parameter (a tied one's second stage aside)."""
        return self.layout.world_size // self.layout.pp

    @property
    def runs_last_stage(self) -> bool:
        """Whether this rank finds out the loss."""
        return self.pipeline is None or bool(self.pipeline.is_last)


def parallel_of(model: nn.Module) -> Parallel:
    """How `model` is spread; one process when nobody spread it."""
    return getattr(model, "parallel", None) or Parallel(ParallelLayout(), None)


def compute_device(parameter: Tensor) -> torch.device:
    """Where a parameter is used; with offload=params that is not where its shards live."""
    home = local_tensor(parameter).device
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == home.type:
        return home
    return torch.device(parameter.device_mesh.device_type, torch.cuda.current_device())


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of the model's repeated blocks: the children of its outermost `nn.ModuleList`s, in order."""
    found: list[tuple[str, nn.Module]] = []

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                found.extend((f"{prefix}{name}.{index}", block) for index, block in child.named_children())
            else:
                search(child, f"{prefix}{name}.")

    search(model, "")
    return found
