"""Tensors that lie in boxes on many ranks, read box by box by one of them.

    q_proj [H * D, E], rows 0 .. 64   <-   rank 0 holds 0 .. 32, rank 1 (the reader) holds 32 .. 64

Ranks that hold a part of what is read send it, the reader puts it together, the others go on. A view (`lazy.py`) above
such a tensor asks it for boxes, so no rank ever holds more of another's than what is read at once. It knows boxes and
sends; it knows no files and no formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel.checkpoint.agree import from_every_rank, on_every_rank, rank_and_world
from fms_parallel.checkpoint.lazy import LazyTensor, as_bytes
from fms_parallel.checkpoint.slots import slots_of
from fms_parallel.distributed.boxes import Box, local_tensor
from fms_parallel.errors import CheckpointError
from fms_parallel.strategy.base import parallel_of


class Held(NamedTuple):
    """What a rank says of one tensor: its names, its full shape, and the box of it that the rank holds."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box


@dataclass
class Reading:
    """Who reads now. All ranks set the same reader and then read the same boxes in the same order.

    Attributes:
        reader: a rank; None only counts, in `bytes_held`, what each rank holds of what is read.
        device: through whose memory ranks talk.
    """

    device: torch.device
    reader: int | None = None
    bytes_held: Counter[int] | None = None


class Spread(LazyTensor):
    """One tensor over the ranks. On every rank but the reader a read returns a tensor without memory (meta).

    Args:
        holders: (rank, box) of every rank that holds some of it; boxes are equal or do not meet.
        mine: this rank's piece.
    """

    def __init__(self, first: Held, holders: Sequence[tuple[int, Box]], mine: Tensor | None, reading: Reading) -> None:
        super().__init__(first.shape, first.dtype)
        self._holders, self._mine, self._reading = holders, mine, reading
        self._rank = rank_and_world()[0]

    def _read(self, box: Box) -> Tensor:
        reader = self._reading.reader
        if reader is None:
            self._count(box)
        elif reader == self._rank:
            return self._collect(self._parts(box, reader), box)
        else:
            for holder, part in self._parts(box, reader):
                if holder == self._rank:
                    dist.send(as_bytes(self._own(part).to(self._reading.device)), reader)
        return torch.empty(box.size, dtype=self.dtype, device="meta")

    def _parts(self, box: Box, reader: int) -> list[tuple[int, Box]]:
        """Who gives which part of a box: the reader itself what it holds, else the first rank that does."""
        givers: dict[Box, int] = {}
        for rank, held in self._holders:
            if held not in givers or rank == reader:
                givers[held] = rank
        parts = [(rank, part) for held, rank in givers.items() if (part := held.intersect(box)) is not None]
        if sum(part.numel for _, part in parts) != box.numel:
            raise CheckpointError(f"the ranks together do not hold a tensor of shape {self.shape} exactly once.")
        return parts

    def _collect(self, parts: list[tuple[int, Box]], box: Box) -> Tensor:
        """A box from its parts."""
        if parts == [(self._rank, box)]:
            return self._own(box)
        whole = torch.empty(box.size, dtype=self.dtype, device=self._reading.device)
        arriving = []
        for rank, part in parts:
            target = whole[part.shifted(box.offset).slices]
            if rank == self._rank:
                target.copy_(self._own(part))
                continue
            sent = torch.empty(part.size, dtype=self.dtype, device=self._reading.device)
            arriving.append((dist.irecv(as_bytes(sent), rank), sent, target))
        for work, sent, target in arriving:
            assert work is not None
            work.wait()
            target.copy_(sent)
        return whole

    def _own(self, part: Box) -> Tensor:
        """A part of this rank's piece."""
        assert self._mine is not None
        held = next(box for rank, box in self._holders if rank == self._rank)
        return self._mine[part.shifted(held.offset).slices]

    def _count(self, box: Box) -> None:
        assert self._reading.bytes_held is not None
        for rank, held in self._holders:
            part = held.intersect(box)
            self._reading.bytes_held[rank] += 0 if part is None else part.numel * self.dtype.itemsize


def spread_tensors(model: nn.Module) -> tuple[dict[tuple[str, ...], Spread], Reading]:
    """Every parameter and persistent buffer of the whole model by its names, in the model's order. Collective.

    The same on every rank, also where a rank holds one pipeline stage only. Tied weights are one entry.

    Raises:
        CheckpointError: on every rank: a model on the meta device, a piece that is not a box, ranks that disagree.
    """
    parallel = parallel_of(model)
    with on_every_rank("looking at the weights"):
        slots = slots_of(model)
        held = [Held(slot.names, slot.shape, slot.tensor.dtype, slot.box()) for slot in slots]
    told = from_every_rank(held)
    mine = {name: local_tensor(slot.tensor) for slot in slots for name in slot.names}
    reading = Reading(torch.device("cpu" if parallel.mesh is None else parallel.mesh.device_type))
    found = {}
    for names, pieces in _grouped(told, parallel.names if parallel.layout.pp > 1 else ()).items():
        first = pieces[0][1]
        if any((other.shape, other.dtype) != (first.shape, first.dtype) for _, other in pieces):
            raise CheckpointError(f"ranks disagree about the shape or dtype of {names[0]}.")
        own = next((mine[name] for name in names if name in mine), None)
        found[names] = Spread(first, [(rank, piece.box) for rank, piece in pieces], own, reading)
    return found, reading


def _grouped(told: Iterable[Sequence[Held]], order: Sequence[str]) -> dict[tuple[str, ...], list[tuple[int, Held]]]:
    """All names of a tensor -> what each rank said of it, in `order`, others behind in the order they were told in.

    A tied weight has all its names only in the last pipeline stage.
    """
    place: dict[str, int] = {name: index for index, name in enumerate(order)}
    groups: dict[str, list[tuple[int, Held]]] = {}  # the same list under each name
    for rank, pieces in enumerate(told):
        for piece in pieces:
            known = next((groups[name] for name in piece.names if name in groups), [])
            known.append((rank, piece))
            for name in piece.names:
                place.setdefault(name, len(place))
                groups[name] = known
    named: dict[int, list[str]] = {}
    for name in sorted(groups, key=lambda name: place[name]):
        named.setdefault(id(groups[name]), []).append(name)
    return {tuple(names): groups[names[0]] for names in named.values()}


def busiest(held: Mapping[int, int], files_of: Mapping[int, int]) -> int:
    """The rank that holds most; of equal ones the one with fewest files so far, then the first."""
    return min(held, key=lambda rank: (-held[rank], files_of.get(rank, 0), rank))
