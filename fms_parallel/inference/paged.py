"""`BlockPool`: which tokens of the cache belong to which row, in blocks that rows with the same beginning share.

    pool     | b0 | b1 | b2 | b3 | b4 | ...          block_size tokens each
    row 0      b0   b1   b2                          its table; consecutive blocks are one slice, read without a copy
    row 1      b0   b1        b3                     the same first 2 * block_size tokens: counted twice, kept once

A full block is known by its tokens and the full block before it, exactly, not by a hash that could collide. A block
that no row uses keeps its content until the memory is needed, oldest first. With one block per row and no sharing, the
same pool is a plain cache of rows. Where every layer has a window, a row gives blocks back that no later query sees:

    row 2      -- -- b7 b4 b9        window 2 * block_size: two blocks are gone, their numbers in the table stay

It knows numbers; it knows no tensors and no layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

GONE = -1
"""Stands in a table for a block that was given back behind the window."""

Run = tuple[int, int]
"""First token of the pool, and how many: consecutive."""

ROOT = 0
"""Serial number of what stands before a row's first block."""


@dataclass
class Table:
    """The blocks of one row, in order.

    Attributes:
        blocks: their numbers. gone: so many of the first were given back, and are `GONE`.
        known: how many of them others may share. serial: of the last one known.
        ahead: where it may grow without leaving its run; others go there last.
    """

    blocks: list[int] = field(default_factory=list)
    known: int = 0
    serial: int = ROOT
    ahead: range = range(0)
    gone: int = 0


class BlockPool:
    """Blocks, who uses them, and what full ones contain.

    Args:
        blocks, block_size: of the pool. share: let rows with the same beginning use the same blocks.
        window: a query sees itself and the window - 1 tokens before it, in every layer; None: all before it in some.
    """

    def __init__(self, blocks: int, block_size: int, *, share: bool = True, window: int | None = None) -> None:
        self.blocks, self.block_size, self.share, self.window = blocks, block_size, share, window
        self.clear()

    def clear(self) -> None:
        """Forget all content. Only while no row has a block."""
        self._users = [0] * self.blocks
        self._free = dict.fromkeys(range(self.blocks))
        self._ahead: set[int] = set()
        self._unused: OrderedDict[int, None] = OrderedDict()  # known content, no user; oldest first
        self._block_of: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # content -> block, serial
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serial = ROOT
        self.shared_tokens = 0

    # ---- counts ------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that a row could get now."""
        return len(self._free) + len(self._unused)

    @property
    def in_use(self) -> int:
        """Blocks that rows have; a shared one counts once."""
        return self.blocks - self.available

    @property
    def kept(self) -> int:
        """Blocks that nobody uses and whose content is kept for rows to come."""
        return len(self._unused)

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.block_size)

    # ---- a row -------------------------------------------------------------------------------------------------

    def begin(self, tokens: Sequence[int], expected: int = 0, shared: int | None = None) -> tuple[Table, int] | None:
        """A table for a row that starts with these tokens; None when there are too few blocks.

        It has blocks for all of them; with a window for the first that is not found, and grows as it goes on.

        Args:
            expected: tokens that the row may come to have: it begins where they find room side by side.
            shared: tokens at most that may be found rather than computed (None: all but the last).
        Returns:
            the table, and how many of the tokens it already has in it: never the last, whose logits are wanted.
        """
        table = Table()
        findable = tokens[: len(tokens) - 1 if shared is None else min(shared, len(tokens) - 1)]
        while (known := self._next_known(table, findable)) is not None:
            self._use(known[0])
            table.blocks.append(known[0])
            table.known, table.serial = table.known + 1, known[1]
        found = len(table.blocks) * self.block_size
        self.slide(table, found)
        wanted = self.missing(table, max(expected, len(tokens)))
        start = self._wide_place(wanted)
        if not self.grow(table, len(tokens) if self.window is None else found + 1, start):
            self.end(table)
            return None
        if start is not None:
            table.ahead = range(table.blocks[-1] + 1, min(start + wanted, self.blocks))
            self._ahead.update(table.ahead)
        self.shared_tokens += found
        return table, found

    def grow(self, table: Table, tokens: int, start: int | None = None) -> bool:
        """Blocks for so many tokens in all, or none where there are too few. `start`: the first block to try."""
        missing = self.needed(tokens) - len(table.blocks)
        if missing > self.available:
            return False
        for _ in range(missing):
            behind = table.blocks[-1] + 1 if table.blocks and start is None else start
            table.blocks.append(self._take(behind))
            start = None
        return True

    def missing(self, table: Table, tokens: int) -> int:
        """Blocks that the row will have beyond those it has now, when it comes to so many tokens."""
        return most_blocks(tokens, self.block_size, self.window) - len(table.blocks) + table.gone

    def reach(self, table: Table) -> int:
        """Tokens that the row could have now, without taking any blocks from others."""
        return (len(table.blocks) + self.available) * self.block_size

    def slide(self, table: Table, start: int) -> None:
        """Give back what no query from token `start` on sees."""
        if self.window is None:
            return
        gone = min(max(0, start - self.window + 1) // self.block_size, len(table.blocks))
        for number in range(table.gone, gone):
            self._drop(table.blocks[number])
            table.blocks[number] = GONE
        table.gone = max(table.gone, gone)

    def computed(self, table: Table, tokens: Sequence[int], count: int) -> None:
        """The first `count` tokens of the row are in its blocks: full blocks of them may be shared from now on."""
        size = self.block_size
        while self.share and (table.known + 1) * size <= count:
            key = (table.serial, tuple(tokens[table.known * size : (table.known + 1) * size]))
            block = table.blocks[table.known]
            if key not in self._block_of:
                self._serial += 1
                self._block_of[key], self._key_of[block] = (block, self._serial), key
            # Where another row was first with the same content, both go on as if they had that row's block.
            table.serial = self._block_of[key][1]
            table.known += 1

    def end(self, table: Table) -> None:
        """The row is done with its blocks."""
        for block in reversed(table.blocks[table.gone :]):  # so that a row's end is forgotten before its beginning
            self._drop(block)
        self._ahead.difference_update(table.ahead)
        table.blocks, table.known, table.serial, table.ahead, table.gone = [], 0, ROOT, range(0), 0

    def fork(self, table: Table, tokens: int) -> tuple[Table, Run | None, int] | None:
        """Another row with the same first `tokens`; None when there are too few blocks.

        Returns:
            its table; the tokens to copy, (first, how many), where the last block is not full; and where to.
        """
        full, rest = divmod(tokens, self.block_size)
        if rest and not self.available:
            return None
        assert table.known <= full, "a row is forked behind what it shares"
        for block in table.blocks[table.gone : full]:
            self._use(block)
        other = Table(table.blocks[:full], table.known, table.serial, gone=table.gone)
        if not rest:
            return other, None, 0
        source = table.blocks[full]
        other.blocks.append(self._take(None))
        return other, (source * self.block_size, rest), other.blocks[-1] * self.block_size

    def runs(self, table: Table, tokens: int) -> list[Run]:
        """Where the first `tokens` of a row lie, but for those in blocks that are gone; consecutive blocks joined."""
        found: list[Run] = []
        size, left = self.block_size, tokens - table.gone * self.block_size
        for block in table.blocks[table.gone : self.needed(tokens)]:
            count = min(size, left)
            if found and sum(found[-1]) == block * size:
                found[-1] = (found[-1][0], found[-1][1] + count)
            else:
                found.append((block * size, count))
            left -= count
        return found

    def places(self, table: Table, start: int, stop: int) -> list[int]:
        """Where in the pool the tokens `start .. stop` of a row lie."""
        size, blocks = self.block_size, table.blocks
        return [blocks[token // size] * size + token % size for token in range(start, stop)]

    # ---- blocks ------------------------------------------------------------------------------------------------

    def _next_known(self, table: Table, tokens: Sequence[int]) -> tuple[int, int] | None:
        start = len(table.blocks) * self.block_size
        if not self.share or start + self.block_size > len(tokens):
            return None
        return self._block_of.get((table.serial, tuple(tokens[start : start + self.block_size])))

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._unused.pop(block, None)

    def _drop(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            (self._unused if block in self._key_of else self._free)[block] = None

    def _take(self, wanted: int | None) -> int:
        """A block for new content: the wanted one if free, else where most are free, else the oldest unused."""
        if wanted is not None and wanted in (self._free or self._unused):
            block = wanted
        else:
            place = self._wide_place(self.blocks)
            block = next(iter(self._unused)) if place is None else place
        self._free.pop(block, None)
        self._unused.pop(block, None)
        if (key := self._key_of.pop(block, None)) is not None:
            del self._block_of[key]
        self._users[block] = 1
        return block

    def _wide_place(self, blocks: int) -> int | None:
        """First of so many free blocks side by side, or of the most there are; None when none is free.

        Where other rows may grow is looked at only when there is no other.
        """
        best, length, run = None, 0, 0
        for free in (self._free.keys() - self._ahead, self._free):
            for block in range(self.blocks if best is None else 0):
                run = run + 1 if block in free else 0
                if run > length:
                    best, length = block - run + 1, run
                    if length >= blocks:
                        break
        return best


def most_blocks(tokens: int, block_size: int, window: int | None, chunk: int = 1) -> int:
    """Blocks that a row of so many tokens has at most at a time, if it is computed `chunk` tokens at a time.

    With a window: those that so many consecutive queries see, wherever the first of them lies in its block.
    """
    whole = -(-tokens // block_size)
    return whole if window is None else min(whole, -(-(window + chunk - 2) // block_size) + 1)
