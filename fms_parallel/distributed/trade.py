"""`Trade`: tensors of any size go between ranks of one host through a little shared memory.

    rank 0 -> rank 1   slot 0 |piece piece piece|   slot 1 |piece ...|      filled, told; copied out, told; filled anew

Each direction of each pair has two slots in the sender's segment. A piece is copied from where it lies into a slot and
from there to where it is wanted, in any strides, while others are under way; slots are small enough to stay in a cache,
and no more memory is needed than the segment, however much travels. Both ends are given the same sizes in the same
order and so agree on what lies where. It knows tensors and shared memory; it knows no plans.
"""

from __future__ import annotations

import select
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from fms_parallel import compat
from fms_parallel.distributed.shared_memory import SharedMemory
from fms_parallel.errors import RankFailed

SLOTS = 2
"""Of each direction: one is filled while the other is emptied."""

ALIGNED = 64
"""Bytes: where a piece may begin in a slot."""

FILLED, EMPTIED = b"f", b"e"

Load = list[tuple[Tensor, int]]
"""What lies in a slot at once: pieces, and the byte at which each begins."""


@dataclass
class _Lane:
    """One direction between two ranks, as one of them sees it. `ready`: slots that it may fill, or empty, now."""

    slots: list[Tensor]
    ready: int
    turn: int = 0
    loads: deque[Load] = field(default_factory=deque)

    def next(self) -> tuple[Tensor, Load]:
        slot = self.slots[self.turn]
        self.turn, self.ready = (self.turn + 1) % SLOTS, self.ready - 1
        return slot, self.loads.popleft()

    @property
    def can_move(self) -> bool:
        return bool(self.loads) and self.ready > 0


class Trade:
    """Exchanges between this rank and its neighbours.

    Args:
        memory: used for this alone from now on. seconds: to wait for a neighbour.
    """

    def __init__(self, memory: SharedMemory, seconds: float) -> None:
        self.memory, self.seconds = memory, seconds
        own = memory.neighbours[memory.rank]
        self._out = {peer: _Lane(_slots(memory.own, own, peer), SLOTS) for peer in own}
        self._in = {peer: _Lane(_slots(memory.theirs[peer], memory.neighbours[peer], memory.rank), 0) for peer in own}
        self._ranks = {memory.sockets[peer].fileno(): peer for peer in own}
        self._poll = select.poll()
        for descriptor in self._ranks:
            self._poll.register(descriptor, select.POLLIN)
        self._gone: dict[int, OSError] = {}

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks with which this one can trade."""
        return tuple(self._out)

    def __call__(self, sent: Mapping[int, Sequence[Tensor]], wanted: Mapping[int, Sequence[Tensor]]) -> None:
        """Tensors `sent[i]` go to rank i in their order while those of rank i arrive in `wanted[i]`.

        Raises:
            RankFailed: a neighbour is gone or says nothing for `seconds`.
        """
        for lanes, given in ((self._out, sent), (self._in, wanted)):
            for peer, tensors in given.items():
                lanes[peer].loads.extend(loads(tensors, lanes[peer].slots[0].numel()))
        while waiting := {peer for lanes in (self._out, self._in) for peer, lane in lanes.items() if lane.loads}:
            moved = False
            for peer in waiting:
                if self._out[peer].can_move:
                    self._fill(peer)
                    moved = True
                if self._in[peer].can_move:
                    self._empty(peer)
                    moved = True
            self._listen(waiting, 0.0 if moved else self.seconds)

    def _fill(self, peer: int) -> None:
        slot, load = self._out[peer].next()
        for piece, start in load:
            _room(slot, piece, start).copy_(piece)
        self._tell(peer, FILLED)

    def _empty(self, peer: int) -> None:
        slot, load = self._in[peer].next()
        for piece, start in load:
            piece.copy_(_room(slot, piece, start))
        self._tell(peer, EMPTIED)

    def _tell(self, peer: int, word: bytes) -> None:
        try:
            self.memory.sockets[peer].sendall(word)
        except OSError as error:  # no harm where it has all it wanted, and has left
            self._gone.setdefault(peer, error)

    def _listen(self, waiting: set[int], seconds: float) -> None:
        """Count what neighbours have said; wait for a word at most so long."""
        events = self._poll.poll(1e3 * seconds)
        if not events and seconds:
            named = ", ".join(map(str, sorted(waiting)))
            raise RankFailed(f"rank {named} of this host said nothing for {seconds:g} s: it has died or hangs.")
        for descriptor, _ in events:
            peer = self._ranks[descriptor]
            try:
                words = self.memory.sockets[peer].recv(256)
                if not words:
                    raise ConnectionError("it closed the connection")
            except OSError as error:
                self._gone.setdefault(peer, error)
                self._poll.unregister(descriptor)
                continue
            self._in[peer].ready += words.count(FILLED)
            self._out[peer].ready += words.count(EMPTIED)
        for peer in self._gone.keys() & waiting:
            lane = self._in[peer]
            if self._out[peer].loads or len(lane.loads) > lane.ready:
                why = self._gone[peer]
                raise RankFailed(f"rank {peer} of this host has died or left ({why}): see its own output.") from why


class Trades:
    """The `Trade` of the process group that runs, made when it is first wanted; another group gets another."""

    def __init__(self) -> None:
        self._group: weakref.ref[dist.ProcessGroup] | None = None
        self._made: Trade | None = None

    @property
    def nbytes(self) -> int:
        """Of this rank's segment."""
        return 0 if self._made is None else self._made.memory.own.numel()

    def get(self, size: int) -> Trade | None:
        """With segments of `size` bytes where it is made now; None where this rank has no neighbour. Collective."""
        group = dist.group.WORLD
        assert group is not None
        if size < SLOTS * ALIGNED * dist.get_world_size():
            return None  # a slot might hold nothing
        if self._group is None or self._group() is not group:
            self.close()
            memory = SharedMemory.among(group, size)
            self._made = None if memory is None else Trade(memory, compat.group_timeout(group).total_seconds())
            self._group = weakref.ref(group)
        return self._made

    def close(self) -> None:
        """Give the memory back; neighbours that wait for this rank hear that it has left."""
        if self._made is not None:
            self._made.memory.close()
        self._made = self._group = None


# ---- what lies where --------------------------------------------------------------------------------------------


def _slots(segment: Tensor, neighbours: Sequence[int], peer: int) -> list[Tensor]:
    """The slots of a segment for one of those that read it."""
    size = segment.numel() // (SLOTS * len(neighbours)) // ALIGNED * ALIGNED
    first = SLOTS * neighbours.index(peer)
    return [segment[(first + index) * size : (first + index + 1) * size] for index in range(SLOTS)]


def loads(tensors: Iterable[Tensor], most: int) -> Iterable[Load]:
    """Tensors in pieces of at most `most` bytes, as many to a load as it holds, in their order."""
    load: Load = []
    end = 0
    for tensor in tensors:
        for piece in pieces(tensor, most // tensor.element_size()):
            start = -(-end // ALIGNED) * ALIGNED
            if load and start + piece.nbytes > most:
                yield load
                load, start = [], 0
            load.append((piece, start))
            end = start + piece.nbytes
    if load:
        yield load


def pieces(tensor: Tensor, most: int) -> Iterable[Tensor]:
    """A tensor as views of at most `most` (>= 1) elements: runs of its first dimension that has any."""
    if tensor.numel() == 0:
        return
    if tensor.numel() <= most:
        yield tensor
        return
    dim = next(index for index, count in enumerate(tensor.shape) if count > 1)
    run = max(most // (tensor.numel() // tensor.shape[dim]), 1)
    for part in tensor.split(run, dim):
        yield from pieces(part, most)


def _room(slot: Tensor, piece: Tensor, start: int) -> Tensor:
    """Where a piece lies in a slot."""
    return slot[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
