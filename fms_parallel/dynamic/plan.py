"""What must travel when a job changes its layout: which pieces, from whom to whom, in which rounds.

Pure geometry: boxes in, moves out. It knows no tensors, modules or process groups, so it is tested, priced and
simulated without any rank.

    weight [4, 4]      fsdp=2 (rows)      tp=2 (columns)        rank 0 keeps rows 0-1 of columns 0-1,
                       r0  a b | c d      r0  a b   r1  c d     asks rank 1 for rows 2-3 of them, and nothing more
                       r1  e f | g h          e f       g h

Nobody is sent what it has, so what travels is the least that can: the sum over ranks of what each wants and lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import ConfigError, LayoutError

Table = Mapping[str, tuple[Box, ...]]
"""What one rank holds or wants: name -> boxes of the full tensor. A packed tensor may be several."""

ROUND_BYTES = 64 * 2**20
"""What a rank sends and receives in one round, together: the memory that a transfer needs beside the new shard."""


PATTERNS = 4096
"""Ways to cut boxes that are remembered: the blocks of a model are cut alike."""


@dataclass(frozen=True)
class Item:
    """One thing that travels under one name: shape of the full tensor, and bytes per element of all that goes along
    with it (a weight and its moments are cut alike and travel together).
    """

    shape: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Move:
    """`box` of `name` goes from rank `source` to rank `target`; within a rank it is a copy."""

    name: str
    box: Box
    source: int
    target: int


@dataclass(frozen=True)
class TransferPlan:
    """Every move of a change of layout.

    Attributes:
        copies: within a rank. rounds: between ranks, those of a round at once.
        lower_bound: bytes that must travel whatever is done. widths: bytes per element of each name.
    """

    copies: tuple[Move, ...]
    rounds: tuple[tuple[Move, ...], ...]
    lower_bound: int
    widths: Mapping[str, int]
    ranks: int

    def size(self, move: Move) -> int:
        """Bytes of one move."""
        return move.box.numel * self.widths[move.name]

    @property
    def moves(self) -> Iterable[Move]:
        """All moves between ranks, in the order of the rounds."""
        return (move for round in self.rounds for move in round)

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends."""
        return self._per_rank("source")

    @cached_property
    def received(self) -> tuple[int, ...]:
        """Bytes that each rank receives."""
        return self._per_rank("target")

    @property
    def total(self) -> int:
        """Bytes between ranks."""
        return sum(self.sent)

    def _per_rank(self, end: str) -> tuple[int, ...]:
        totals = [0] * self.ranks
        for move in self.moves:
            totals[getattr(move, end)] += self.size(move)
        return tuple(totals)


def plan_transfer(
    items: Mapping[str, Item], held: Sequence[Table], wanted: Sequence[Table], round_bytes: int = ROUND_BYTES
) -> TransferPlan:
    """The moves that turn `held` into `wanted`; the same on every rank that asks with the same tables.

    Args:
        items: every name there is. held, wanted: one table per rank.
        round_bytes: what a rank may send and receive in one round, together.
    Raises:
        LayoutError: naming a tensor that part of nobody wants (it would be lost), that somebody wants and nobody has,
            or that only one of the two layouts knows. ConfigError: no move fits `round_bytes`.
    """
    _refuse_strangers(items, held, wanted)
    copies: list[Move] = []
    lacking: list[tuple[str, Box, int]] = []
    for name, item in items.items():
        _refuse_loss(name, item.shape, wanted)
        for rank, table in enumerate(wanted):
            kept, missing = _own_and_missing(tuple(table.get(name, ())), tuple(held[rank].get(name, ())))
            copies += [Move(name, box, rank, rank) for box in kept]
            lacking += [(name, box, rank) for box in missing]
    moves = _sourced(items, held, lacking)
    bound = sum(box.numel * items[name].width for name, box, _ in lacking)
    rounds = _rounds(items, moves, len(wanted), round_bytes)
    return TransferPlan(tuple(copies), rounds, bound, {name: item.width for name, item in items.items()}, len(wanted))


def _refuse_strangers(items: Mapping[str, Item], held: Sequence[Table], wanted: Sequence[Table]) -> None:
    if len(held) != len(wanted):
        raise LayoutError(
            f"{len(held)} ranks hold and {len(wanted)} ranks want: give every rank a table, if an empty one."
        )
    for tables, what in ((held, "is held"), (wanted, "is wanted")):
        if strangers := sorted({name for table in tables for name in table} - set(items)):
            raise LayoutError(f"{strangers[0]} {what} by a rank but is no tensor of this state.")


def _refuse_loss(name: str, shape: tuple[int, ...], wanted: Sequence[Table]) -> None:
    """Every element must have a place afterwards."""
    places = dict.fromkeys(box for table in wanted for box in table.get(name, ()))
    if left := _cut(Box.whole(shape), tuple(places))[1]:
        raise LayoutError(
            f"{name}: the part at {left[0].offset} of size {left[0].size} of {shape} has no home in the new layout and "
            "would be lost; the new model must hold every tensor of the old one."
        )


@lru_cache(maxsize=PATTERNS)
def _own_and_missing(wanted: tuple[Box, ...], held: tuple[Box, ...]) -> tuple[tuple[Box, ...], tuple[Box, ...]]:
    """Of what a rank wants: what it has itself, and what it lacks; nothing twice."""
    kept: list[Box] = []
    missing = [box for box in wanted if box.numel]
    for box in held:
        kept += [common for part in missing if (common := part.intersect(box))]
        missing = subtract(missing, [box])
    return tuple(kept), tuple(missing)


@lru_cache(maxsize=PATTERNS)
def _cut(wanted: Box, held: tuple[Box, ...]) -> tuple[tuple[tuple[Box, tuple[Box, ...]], ...], tuple[Box, ...]]:
    """A box as pieces, each with those of `held` that have all of it, and what none of them has."""
    found: list[tuple[Box, tuple[Box, ...]]] = []
    missing = [wanted] if wanted.numel else []
    for box in held:
        for part in missing:
            if piece := part.intersect(box):
                found.append((piece, tuple(one for one in held if one.intersect(piece) == piece)))
        missing = subtract(missing, [box])
    return tuple(found), tuple(missing)


def _sourced(items: Mapping[str, Item], held: Sequence[Table], lacking: Sequence[tuple[str, Box, int]]) -> list[Move]:
    """A source for everything lacking: of the ranks that have it, the one that sends least so far; largest first."""
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, table in enumerate(held):
        for name, boxes in table.items():
            for box in boxes:
                if box.numel:
                    holders.setdefault(name, {}).setdefault(box, []).append(rank)
    pieces: list[tuple[int, str, Box, int, tuple[Box, ...]]] = []
    for name, wanted, target in lacking:
        found, missing = _cut(wanted, tuple(holders.get(name, ())))
        pieces += [(piece.numel * items[name].width, name, piece, target, boxes) for piece, boxes in found]
        if missing:
            raise LayoutError(
                f"{name}: rank {target} needs the part at {missing[0].offset} of size {missing[0].size} of "
                f"{items[name].shape}, which no rank holds."
            )
    sent = [0] * len(held)
    moves: list[Move] = []
    for size, name, piece, target, boxes in sorted(pieces, key=lambda piece: -piece[0]):
        having = [rank for box in boxes for rank in holders[name][box]]
        source = min(having, key=lambda rank: (sent[rank], rank))
        sent[source] += size
        moves.append(Move(name, piece, source, target))
    order = {name: index for index, name in enumerate(items)}
    return sorted(moves, key=lambda move: (order[move.name], move.target, move.box.offset))


def _rounds(
    items: Mapping[str, Item], moves: Sequence[Move], ranks: int, round_bytes: int
) -> tuple[tuple[Move, ...], ...]:
    """Moves in rounds: in each a rank sends at most half of `round_bytes`, and receives at most the other half."""
    limit = round_bytes // 2
    if (widest := max((items[move.name].width for move in moves), default=0)) > limit:
        raise ConfigError(f"round_bytes={round_bytes} holds not one element twice: give at least {2 * widest}.")
    rounds: list[list[Move]] = []
    loads: list[dict[tuple[str, int], int]] = []
    first_open = {(end, rank): 0 for end in ("source", "target") for rank in range(ranks)}
    for move in moves:
        width = items[move.name].width
        for box in split(move.box, limit // width):
            ends, size = (("source", move.source), ("target", move.target)), box.numel * width
            index = max(first_open[end] for end in ends)
            while index < len(loads) and any(loads[index].get(end, 0) + size > limit for end in ends):
                index += 1
            if index == len(rounds):
                rounds.append([])
                loads.append({})
            rounds[index].append(Move(move.name, box, move.source, move.target))
            for end in ends:
                loads[index][end] = loads[index].get(end, 0) + size
                first_open[end] = index if 8 * loads[index][end] >= 7 * limit else first_open[end]
    return tuple(map(tuple, rounds))


# ---- boxes ------------------------------------------------------------------------------------------------------


def subtract(boxes: Sequence[Box], others: Iterable[Box]) -> list[Box]:
    """What `boxes` cover and `others` do not, as boxes that do not meet where the given ones do not."""
    left = [box for box in boxes if box.numel]
    for other in others:
        left = [piece for box in left for piece in _without(box, other)]
    return left


def _without(box: Box, other: Box) -> list[Box]:
    """A box less another: for each dimension the slabs before and behind what is common."""
    common = box.intersect(other)
    if common is None:
        return [box]
    pieces, offset, size = [], list(box.offset), list(box.size)
    for dim, (start, count) in enumerate(zip(common.offset, common.size, strict=True)):
        end = offset[dim] + size[dim]
        for first, last in ((offset[dim], start), (start + count, end)):
            if last > first:
                pieces.append(
                    Box((*offset[:dim], first, *offset[dim + 1 :]), (*size[:dim], last - first, *size[dim + 1 :]))
                )
        offset[dim], size[dim] = start, count
    return pieces


def split(box: Box, most: int) -> list[Box]:
    """A box in runs along its first dimensions, of at most `most` (>= 1) elements each."""
    if box.numel <= most:
        return [box]
    dim = next(index for index, count in enumerate(box.size) if count > 1)
    per_index = box.numel // box.size[dim]
    run = max(most // per_index, 1)
    parts = []
    for start in range(0, box.size[dim], run):
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        size = (*box.size[:dim], min(run, box.size[dim] - start), *box.size[dim + 1 :])
        parts += split(Box(offset, size), most)
    return parts
