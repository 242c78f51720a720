"""`KindBlocks`: the blocks of one kind of layers: those that see equally far.

    row 2      -- -- b7 b4 b9        window 2 * block_size: two blocks are gone, the places of the others stay

Which rows begin alike is decided elsewhere (inference/prefixes.py); a block whose content has a number there is kept,
when no row has it any more, until its memory is needed, oldest first. It knows numbers; it knows no tensors, no tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fms_parallel.inference.prefixes import Prefixes

GONE = -1
"""Stands in a row for a block that was given back behind the window."""

Run = tuple[int, int]
"""First token of the memory, and how many: consecutive."""


@dataclass
class Held:
    """The blocks that one row has of one kind of layers, in order.

    Attributes:
        blocks: their numbers. gone: so many of the first were given back, and are `GONE`.
        ahead: where it may grow without leaving its run; others go there last.
    """

    blocks: list[int] = field(default_factory=list)
    gone: int = 0
    ahead: range = range(0)


class KindBlocks:
    """Blocks of layers that see equally far, who uses them, and what full ones contain.

    Args:
        blocks, block_size: how many, of how many tokens. window: a query sees itself and the window - 1 tokens before
            it; None: all before it. prefixes: numbers of contents.
    """

    def __init__(self, blocks: int, block_size: int, window: int | None, prefixes: Prefixes) -> None:
        self.blocks, self.block_size, self.window, self.prefixes = blocks, block_size, window, prefixes
        self._users = [0] * blocks
        self._free = dict.fromkeys(range(blocks))
        self._ahead: set[int] = set()
        self._unused: OrderedDict[int, None] = OrderedDict()  # known content, no user; oldest first
        self._block_of: dict[int, int] = {}  # number of the content -> block, and back
        self._content_of: dict[int, int] = {}

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

    def hidden(self, start: int) -> int:
        """So many first blocks of a row no query from token `start` on sees."""
        return 0 if self.window is None else max(0, start - self.window + 1) // self.block_size

    def missing(self, held: Held, tokens: int) -> int:
        """Blocks that a row will have beyond those it has now, when it comes to so many tokens."""
        return most_blocks(tokens, self.block_size, self.window) - len(held.blocks) + held.gone

    def lacks(self, held: Held, tokens: int) -> int:
        """Blocks that a row must get to have room for so many tokens in all."""
        return max(0, self.needed(tokens) - len(held.blocks))

    # ---- a row -------------------------------------------------------------------------------------------------

    def found(self, contents: Sequence[int]) -> list[bool]:
        """Of 0, 1, .. first blocks with these contents: whether all of them that the next token sees are here."""
        here, found = 0, [True]
        for count, content in enumerate(contents, 1):
            here = here + 1 if content in self._block_of else 0
            found.append(here >= count - self.hidden(count * self.block_size))
        return found

    def begin(self, contents: Sequence[int]) -> Held:
        """What a row has that begins with these contents, which `found` says are here."""
        gone = self.hidden(len(contents) * self.block_size)
        blocks = [self._block_of[content] for content in contents[gone:]]
        for block in blocks:
            self._use(block)
        return Held([GONE] * gone + blocks, gone)

    def grow(self, held: Held, tokens: int, start: int | None = None) -> None:
        """Blocks for so many tokens in all, which there must be. `start`: the first block to try."""
        for _ in range(self.lacks(held, tokens)):
            behind = held.blocks[-1] + 1 if held.blocks and start is None else start
            held.blocks.append(self._take(behind))
            start = None

    def set_ahead(self, held: Held, start: int, wanted: int) -> None:
        """Others go last to where the row may grow: up to `wanted` blocks from `start` on."""
        held.ahead = range(held.blocks[-1] + 1, min(start + wanted, self.blocks))
        self._ahead.update(held.ahead)

    def slide(self, held: Held, start: int) -> None:
        """Give back what no query from token `start` on sees."""
        gone = min(self.hidden(start), len(held.blocks))
        for number in range(held.gone, gone):
            self._drop(held.blocks[number])
            held.blocks[number] = GONE
        held.gone = max(held.gone, gone)

    def know(self, block: int, content: int) -> None:
        """A full block has this content: from now on others may use it, unless another block has it already."""
        if content not in self._block_of:
            self._block_of[content], self._content_of[block] = block, content
            self.prefixes.hold(content)

    def end(self, held: Held) -> None:
        """The row is done with its blocks."""
        for block in reversed(held.blocks[held.gone :]):  # so that a row's end is forgotten before its beginning
            self._drop(block)
        self._ahead.difference_update(held.ahead)
        held.blocks, held.gone, held.ahead = [], 0, range(0)

    def fork(self, held: Held, full: int, rest: bool) -> Held:
        """The same first `full` blocks for another row, and with `rest` a block of its own behind them."""
        for block in held.blocks[held.gone : full]:
            self._use(block)
        return Held([*held.blocks[:full], *([self._take(None)] if rest else [])], held.gone)

    def runs(self, held: Held, tokens: int) -> list[Run]:
        """Where the first `tokens` of a row lie, but for those in blocks that are gone; consecutive blocks joined."""
        found: list[Run] = []
        size, left = self.block_size, tokens - held.gone * self.block_size
        for block in held.blocks[held.gone : self.needed(tokens)]:
            count = min(size, left)
            if found and sum(found[-1]) == block * size:
                found[-1] = (found[-1][0], found[-1][1] + count)
            else:
                found.append((block * size, count))
            left -= count
        return found

    def places(self, held: Held, start: int, stop: int) -> list[int]:
        """Where in the memory the tokens `start .. stop` of a row lie."""
        size, blocks = self.block_size, held.blocks
        return [blocks[token // size] * size + token % size for token in range(start, stop)]

    # ---- blocks ------------------------------------------------------------------------------------------------

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._unused.pop(block, None)

    def _drop(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            (self._unused if block in self._content_of else self._free)[block] = None

    def _take(self, wanted: int | None) -> int:
        """A block for new content: the wanted one if free, else where most are free, else the oldest unused."""
        if wanted is not None and wanted in (self._free or self._unused):
            block = wanted
        else:
            place = self.wide_place(self.blocks)
            block = next(iter(self._unused)) if place is None else place
        self._free.pop(block, None)
        self._unused.pop(block, None)
        if (content := self._content_of.pop(block, None)) is not None:
            del self._block_of[content]
            self.prefixes.drop(content)
        self._users[block] = 1
        return block

    def wide_place(self, blocks: int) -> int | None:
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
