"""Copies of a neighbour's shards in memory: what is left of a rank that died and had no replica.

Every `every` steps each rank copies its own state and sends it to its buddy, the rank behind it (on the next node, when
there are several). All ranks' copies are of one step: a copy counts when everybody has received theirs, and a rank that
was cut off in between learns from the others whether it does. Two shards of memory, four while copies are exchanged.
It knows states and the process group of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fms_parallel.checkpoint.agree import from_every_rank
from fms_parallel.distributed.start import Launch
from fms_parallel.dynamic.inventory import Inventory
from fms_parallel.dynamic.state import Luggage, TrainingState
from fms_parallel.errors import ConfigError


@dataclass(frozen=True)
class Copies:
    """This rank's state and its neighbour's as they were after `step`."""

    step: int
    own: Inventory
    luggage: Luggage
    neighbour: Inventory
    theirs: Luggage

    @property
    def both(self) -> Inventory:
        """Everything that this rank can give."""
        return self.own.joined(self.neighbour)


class Buddies:
    """The copies of one rank.

    Args:
        every: steps between two copies.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(f"buddy_every={every}: must be >= 1, or None for no copies.")
        self.every = every
        self.valid: Copies | None = None
        self._received: Copies | None = None

    def take(self, state: TrainingState) -> None:
        """Copy this step's state, here and to the buddy. Collective; with one rank there is no buddy."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.valid = None
            return
        rank, world = dist.get_rank(), dist.get_world_size()
        per_node = Launch.read().local_world_size
        ahead = per_node if world > per_node else 1
        behind, before = (rank + ahead) % world, (rank - ahead) % world
        own = state.inventory().copied()
        told = from_every_rank((own.without_memory(), state.luggage()))
        theirs, luggage = told[before]
        neighbour = theirs.empty_like(_device(own))
        operations = [dist.P2POp(dist.isend, tensor, behind) for tensor in _tensors(own)]
        operations += [dist.P2POp(dist.irecv, tensor, before) for tensor in _tensors(neighbour)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        self._received = Copies(state.step, own, told[rank][1], neighbour, luggage)
        dist.barrier()
        self.settle(state.step)

    def settle(self, step: int | None) -> None:
        """The copies of `step` count, on every rank; None: those that were being exchanged do not."""
        if self._received is not None and self._received.step == step:
            self.valid = self._received
        self._received = None

    @property
    def step(self) -> int | None:
        """Of the copies that count here."""
        return None if self.valid is None else self.valid.step


def _tensors(inventory: Inventory) -> list[torch.Tensor]:
    tensors = (t for entry in inventory.entries.values() for box in entry.memory for t in box)
    return [tensor.contiguous() for tensor in tensors if tensor.numel()]


def _device(inventory: Inventory) -> torch.device:
    return next(t.device for entry in inventory.entries.values() for box in entry.memory for t in box)
