"""Carrying out a `TransferPlan`: rounds of sends and receives between the memory that ranks have and want.

Ranks of one host trade through memory that they share. Between hosts what lies in one run of memory goes from where it
is to where it is wanted; the rest is packed, one message for each pair of ranks and dtype in a round. Every piece is
fingerprinted where it was read and where it was written, and the two are compared when all has arrived (within a rank,
the bits themselves). It knows inventories and the process group of all ranks; it knows no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed.boxes import Box
from fms_parallel.distributed.trade import Trade
from fms_parallel.dynamic.inventory import Inventory
from fms_parallel.dynamic.plan import Move, TransferPlan, split

ALONE = 256 * 2**10
"""Bytes from which on a tensor's piece is a message of its own: there a message costs less than packing."""

COPIED = 4 * 2**20
"""Bytes that are copied within a rank before they are compared: still in a cache."""

LANES = 1 << 10
"""Words of 8 bytes of one line of a fingerprint."""

WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size of an element."""


@dataclass
class Tally:
    """What a transfer did on this rank: bytes of state that it sent, and the moves whose two ends differ."""

    sent: int = 0
    wrong: list[Move] = field(default_factory=list)


def carry_out(
    plan: TransferPlan,
    here: Inventory,
    there: Inventory,
    *,
    round_bytes: int,
    verify: bool = True,
    device: torch.device | None = None,
    trade: Trade | None = None,
) -> Tally:
    """Fill `there` from every rank's `here`. Collective over all ranks; `here` is only read.

    Args:
        device: where the process group's messages must lie; None: where the memory is.
        trade: with the ranks that share memory with this one; None: nobody does.
    Raises:
        RankFailed: one of those is gone.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    tally, read = Tally(), Prints()
    with torch.no_grad():
        _copy(plan, here, there, rank, round_bytes, verify, tally)
        for moves in plan.rounds:
            tally.sent += _exchange(moves, here, there, rank, device, read if verify else None, trade)
        if verify and plan.rounds:
            tally.wrong += _compare(plan, here, there, rank, device, read)
    return tally


def _copy(
    plan: TransferPlan, here: Inventory, there: Inventory, rank: int, round_bytes: int, verify: bool, tally: Tally
) -> None:
    for move in plan.copies:
        if move.source != rank:
            continue
        for box in split(move.box, max(min(COPIED, round_bytes // 2) // plan.widths[move.name], 1)):
            ends = list(zip(here[move.name].views(box), there[move.name].views(box), strict=True))
            for old, new in ends:
                new.copy_(old)
            if verify and not all(same_bits(old, new) for old, new in ends):
                tally.wrong.append(move)


class Prints:
    """Fingerprints of the pieces of one inventory: a piece that goes to several ranks is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Box], int] = {}

    def of(self, inventory: Inventory, move: Move) -> int:
        """Of what moves."""
        piece = (move.name, move.box)
        if piece not in self._known:
            prints = (fingerprint(view) for view in _views(inventory, move))
            self._known[piece] = _wrapped(sum((2 * index + 1) * one for index, one in enumerate(prints)))
        return self._known[piece]


# ---- one round --------------------------------------------------------------------------------------------------


def _exchange(
    moves: Sequence[Move],
    here: Inventory,
    there: Inventory,
    rank: int,
    device: torch.device | None,
    read: Prints | None,
    trade: Trade | None = None,
) -> int:
    """One round; returns the bytes that this rank sent. `read`: takes the fingerprints of what is sent meanwhile."""
    operations: list[dist.P2POp] = []
    landings: list[tuple[Tensor, list[Tensor]]] = []
    near: tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]] = {}, {}
    sent = 0
    for peer in sorted({m.source + m.target - rank for m in moves if rank in (m.source, m.target)}):
        leaving = [v for m in moves if m.source == rank and m.target == peer for v in _views(here, m)]
        arriving = [v for m in moves if m.target == rank and m.source == peer for v in _views(there, m)]
        sent += sum(view.nbytes for view in leaving)
        if trade is not None and peer in trade.peers:
            near[0][peer], near[1][peer] = leaving, arriving
            continue
        for message in _messages(leaving):
            operations.append(dist.P2POp(dist.isend, _packed(message, device), peer))
        for message in _messages(arriving):
            tensor = _room(message, device)
            if tensor is not message[0]:
                landings.append((tensor, message))
            operations.append(dist.P2POp(dist.irecv, tensor, peer))
    under_way = dist.batch_isend_irecv(operations) if operations else []
    if trade is not None:
        trade(*near)
    if read is not None:
        for move in moves:
            if move.source == rank:
                read.of(here, move)
    for work in under_way:
        work.wait()
    for tensor, message in landings:
        pieces = tensor.view(-1).split([view.numel() for view in message])
        for view, piece in zip(message, pieces, strict=True):
            view.copy_(piece.view(view.shape))
    return sent


def _views(inventory: Inventory, move: Move) -> list[Tensor]:
    return inventory[move.name].views(move.box)


def _messages(views: list[Tensor]) -> list[list[Tensor]]:
    """Large views alone, small ones together by dtype: the same on both ends, who know the same sizes."""
    alone = [[view] for view in views if view.nbytes >= ALONE]
    small: dict[torch.dtype, list[Tensor]] = {}
    for view in views:
        if view.nbytes < ALONE:
            small.setdefault(view.dtype, []).append(view)
    return [*alone, *small.values()]


def _packed(message: list[Tensor], device: torch.device | None) -> Tensor:
    """What is sent: the view itself where it is one run of memory."""
    tensor = message[0].contiguous() if len(message) == 1 else torch.cat([view.reshape(-1) for view in message])
    return tensor if device is None else tensor.to(device)


def _room(message: list[Tensor], device: torch.device | None) -> Tensor:
    """Where it arrives: the view itself where it is one run of memory."""
    first = message[0]
    if len(message) == 1 and first.is_contiguous() and device in (None, first.device):
        return first
    return torch.empty(sum(view.numel() for view in message), dtype=first.dtype, device=device or first.device)


# ---- verification -----------------------------------------------------------------------------------------------


def _compare(
    plan: TransferPlan, here: Inventory, there: Inventory, rank: int, device: torch.device | None, read: Prints
) -> list[Move]:
    """The moves to this rank whose ends differ: 8 bytes per move travel, beside the state."""
    moves = list(plan.moves)
    outgoing = [move for move in moves if move.source == rank]
    incoming = [move for move in moves if move.target == rank]
    targets, sources = {m.target for m in outgoing}, {m.source for m in incoming}
    told = {peer: _marks(here, [m for m in outgoing if m.target == peer], device, read) for peer in targets}
    found = {peer: _marks(there, [m for m in incoming if m.source == peer], device, Prints()) for peer in sources}
    heard = {peer: torch.empty_like(marks) for peer, marks in found.items()}
    operations = [dist.P2POp(dist.isend, told[peer], peer) for peer in sorted(told)]
    operations += [dist.P2POp(dist.irecv, heard[peer], peer) for peer in sorted(heard)]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    wrong: list[Move] = []
    for peer, marks in found.items():
        differ = (marks != heard[peer]).tolist()
        wrong += [move for move, bad in zip((m for m in incoming if m.source == peer), differ, strict=True) if bad]
    return wrong


def _marks(inventory: Inventory, moves: Sequence[Move], device: torch.device | None, read: Prints) -> Tensor:
    """One fingerprint of each move, int64 `[n]`."""
    prints = [read.of(inventory, move) for move in moves]
    return torch.tensor(prints, dtype=torch.int64, device=device or _views(inventory, moves[0])[0].device)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are alike bit for bit; NaNs are like themselves."""
    whole = WHOLE_NUMBERS.get(one.element_size())
    return torch.equal(one.view(whole), other.view(whole)) if whole and one.dim() else torch.equal(one, other)


def fingerprint(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes, in the order of its elements: a sum of words times odd numbers, modulo 2^64.

    A change of one element always shows; any other change stays hidden with probability near 2^-64.
    """
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    size = flat.numel()
    whole = size // 8 * 8
    words = flat[:whole].view(torch.int64)
    if whole < size:
        tail = torch.nn.functional.pad(flat[whole:], (0, 8 - size + whole)).view(torch.int64)
        return _wrapped(3 * _weighed(words) + int(tail))
    return _wrapped(3 * _weighed(words))


def _weighed(words: Tensor) -> int:
    """int64 `[n]` -> one number: each word times an odd one of its lane and, but for the last lanes, of its line."""
    weights, count = _weights(words.device), words.numel()
    rest = count % LANES
    total = _product(words[count - rest :], weights[:rest]) if rest else 0
    if count > rest:
        table = words[: count - rest].view(-1, LANES)
        # One pass over the memory; elsewhere than on the CPU torch has no product of whole numbers.
        lines = torch.mv(table, weights[:LANES]) if words.device.type == "cpu" else (table * weights[:LANES]).sum(1)
        total += 5 * (_product(lines, weights[: len(lines)]) if len(lines) <= len(weights) else _weighed(lines))
    return total


def _product(words: Tensor, weights: Tensor) -> int:
    return int(torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum())


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(20)
    return (torch.randint(-(2**62), 2**62, (32 * LANES,), generator=draw, dtype=torch.int64) * 2 + 1).to(device)


def _wrapped(number: int) -> int:
    """As a signed 64-bit number."""
    return (number + 2**63) % 2**64 - 2**63
