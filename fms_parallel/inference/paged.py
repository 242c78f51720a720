"""`BlockPool`: which tokens of the cache belong to which row, in blocks that rows with the same beginning share.

    pool     | b0 | b1 | b2 | b3 | b4 | ...          block_size tokens each
    row 0      b0   b1   b2                          its table; consecutive blocks are one slice, read without a copy
    row 1      b0   b1        b3                     the same first 2 * block_size tokens: counted twice, kept once

Layers that see equally far are of one kind, and each kind has blocks of its own (inference/kind_blocks.py): of layers
with a window a row gives back what no later query sees, of the others it keeps all. A row begins with blocks of another
where every kind still has those that its next token sees. With one block per row and no sharing, the same pool is a
plain cache of rows. It knows numbers; it knows no tensors and no layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fms_parallel.inference.kind_blocks import GONE, Held, KindBlocks, Run, most_blocks
from fms_parallel.inference.prefixes import ROOT, Prefixes

__all__ = ["GONE", "BlockPool", "Copied", "Run", "Table", "Where", "most_blocks"]


@dataclass
class Table:
    """The blocks of one row.

    Attributes:
        held: of each kind of layers. known: how many of the first others may share. content: of the last one known.
    """

    held: list[Held]
    known: int = 0
    content: int = ROOT


@dataclass(frozen=True)
class Where:
    """Places of some tokens of a row in the memory of one kind of layers.

    Attributes:
        places: of these tokens. runs: of all tokens up to the last of them, but for so many that are `gone`.
    """

    places: Sequence[int]
    runs: Sequence[Run]
    gone: int = 0


Copied = tuple[int, int, int, int]
"""Kind of layers, first token to copy, first to copy it to, how many."""


class BlockPool:
    """Blocks of every kind of layers, and rows that have them.

    Args:
        blocks: window -> blocks of the layers that have it (None: no window); a number: all layers see all.
        block_size: tokens of one. share: let rows with the same beginning use the same blocks.
    Attributes:
        kinds: in the order of `blocks`. shared_tokens: so many were found, not computed.
    """

    def __init__(self, blocks: Mapping[int | None, int] | int, block_size: int, *, share: bool = True) -> None:
        self._blocks = {None: blocks} if isinstance(blocks, int) else dict(blocks)
        self.block_size, self.share = block_size, share
        self.clear()

    def clear(self) -> None:
        """Forget all content. Only while no row has a block."""
        self.prefixes = Prefixes(self.block_size)
        made = (KindBlocks(count, self.block_size, window, self.prefixes) for window, count in self._blocks.items())
        self.kinds = list(made)
        self.shared_tokens = 0

    # ---- counts ------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that a row could get now, of the kind that has the fewest."""
        return min(kind.available for kind in self.kinds)

    @property
    def in_use(self) -> int:
        """Blocks that rows have, of all kinds; a shared one counts once."""
        return sum(kind.in_use for kind in self.kinds)

    @property
    def slides(self) -> bool:
        """Whether some layers have a window: then a row may have to be computed in small pieces."""
        return any(kind.window is not None for kind in self.kinds)

    def missing(self, table: Table, tokens: int) -> list[int]:
        """Of each kind, blocks that the row will have beyond those it has now, when it comes to so many tokens."""
        return [kind.missing(held, tokens) for kind, held in self._of(table)]

    def reach(self, table: Table) -> int:
        """Tokens that the row could have now, without taking any blocks from others."""
        return min(len(held.blocks) + kind.available for kind, held in self._of(table)) * self.block_size

    def leaves_room(self, table: Table, tokens: int, others: Iterable[tuple[Table, int]]) -> bool:
        """Whether this row can come to `tokens`, and every other that is to grow to so many have one more block."""
        wanted = self.missing(table, tokens)
        for other, longest in others:
            wanted = [w + (more > 0) for w, more in zip(wanted, self.missing(other, longest), strict=True)]
        return all(kind.available >= count for kind, count in zip(self.kinds, wanted, strict=True))

    # ---- a row -------------------------------------------------------------------------------------------------

    def empty(self) -> Table:
        """The table of a row without blocks."""
        return Table([Held() for _ in self.kinds])

    def begin(self, tokens: Sequence[int], expected: int = 0, shared: int | None = None) -> tuple[Table, int] | None:
        """A table for a row that starts with these tokens; None when there are too few blocks.

        It has blocks for all of them; of layers with a window for the first that is not found, and grows as it goes on.

        Args:
            expected: tokens that the row may come to have: it begins where they find room side by side.
            shared: tokens at most that may be found rather than computed (None: all but the last).
        Returns:
            the table, and how many of the tokens it already has in it: never the last, whose logits are wanted.
        """
        contents = self._found(tokens[: len(tokens) - 1 if shared is None else min(shared, len(tokens) - 1)])
        table = Table([kind.begin(contents) for kind in self.kinds], len(contents), contents[-1] if contents else ROOT)
        found = len(contents) * self.block_size
        counts = [len(tokens) if kind.window is None else found + 1 for kind in self.kinds]
        if any(kind.lacks(held, n) > kind.available for (kind, held), n in zip(self._of(table), counts, strict=True)):
            self.end(table)
            return None
        for (kind, held), count in zip(self._of(table), counts, strict=True):
            wanted = kind.missing(held, max(expected, len(tokens)))
            start = kind.wide_place(wanted)
            kind.grow(held, count, start)
            if start is not None:
                kind.set_ahead(held, start, wanted)
        self.shared_tokens += found
        return table, found

    def grow(self, table: Table, tokens: int) -> bool:
        """Blocks for so many tokens in all, or none where there are too few of any kind."""
        if any(kind.lacks(held, tokens) > kind.available for kind, held in self._of(table)):
            return False
        for kind, held in self._of(table):
            kind.grow(held, tokens)
        return True

    def slide(self, table: Table, start: int) -> None:
        """Give back what no query from token `start` on sees."""
        for kind, held in self._of(table):
            kind.slide(held, start)

    def has_gone(self, table: Table, start: int) -> bool:
        """Whether a query at token `start` would see what was given back."""
        return any(held.gone > kind.hidden(start) for kind, held in self._of(table))

    def computed(self, table: Table, tokens: Sequence[int], count: int) -> None:
        """The first `count` tokens of the row are in its blocks: full blocks of them may be shared from now on."""
        size = self.block_size
        while self.share and (table.known + 1) * size <= count:
            # Where another row was first with the same content, both go on as if they had that row's block.
            known = table.known
            table.content = self.prefixes.behind(table.content, tokens[known * size : (known + 1) * size])
            for kind, held in self._of(table):
                kind.know(held.blocks[known], table.content)
            table.known += 1

    def end(self, table: Table) -> None:
        """The row is done with its blocks."""
        for kind, held in self._of(table):
            kind.end(held)
        table.known, table.content = 0, ROOT

    def fork(self, table: Table, tokens: int) -> tuple[Table, list[Copied]] | None:
        """Another row with the same first `tokens`; None when there are too few blocks.

        Returns:
            its table; what to copy, where the last block is not full.
        """
        full, rest = divmod(tokens, self.block_size)
        if rest and not self.available:
            return None
        assert table.known <= full, "a row is forked behind what it shares"
        other = Table([kind.fork(held, full, rest > 0) for kind, held in self._of(table)], table.known, table.content)
        if not rest:
            return other, []
        ends = enumerate(zip(table.held, other.held, strict=True))
        size = self.block_size
        return other, [(n, old.blocks[full] * size, new.blocks[full] * size, rest) for n, (old, new) in ends]

    def where(self, table: Table, start: int, stop: int) -> list[Where]:
        """Of each kind, where the tokens `start .. stop` of a row lie, and those before them."""
        return [
            Where(kind.places(held, start, stop), kind.runs(held, stop), held.gone * self.block_size)
            for kind, held in self._of(table)
        ]

    # ---- inside ------------------------------------------------------------------------------------------------

    def _of(self, table: Table) -> Iterable[tuple[KindBlocks, Held]]:
        return zip(self.kinds, table.held, strict=True)

    def _found(self, tokens: Sequence[int]) -> list[int]:
        """Contents of the first blocks that a row with these tokens need not compute."""
        contents = self.prefixes.path(tokens) if self.share else []
        everywhere = [all(kinds) for kinds in zip(*(kind.found(contents) for kind in self.kinds), strict=True)]
        return contents[: max(count for count, here in enumerate(everywhere) if here)]
