"""Rows by hand: blocks of the engine's cache for callers that run their own loop (two phases, beams).

It knows tokens, blocks and pieces; it knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from fms_parallel.errors import ConfigError
from fms_parallel.inference.kv_manager import Storage
from fms_parallel.inference.paged import BlockPool, Table
from fms_parallel.inference.ragged import Piece


class HeldRow:
    """Tokens, how many of them are computed, and where.

    Args:
        pool: None: nothing is cached, every piece is the whole row.
    """

    def __init__(self, tokens: Sequence[int], pool: BlockPool | None) -> None:
        self.tokens, self.pool, self.computed = list(tokens), pool, 0
        self.table: Table | None = None
        if pool is not None:
            begun = pool.begin(self.tokens)
            if begun is None:
                raise self._full()
            self.table, self.computed = begun

    def piece(self, wanted: int = 1, most: int | None = None) -> Piece:
        """What is not computed yet, or the first `most` tokens of it (then no logits are wanted before its end).

        Raises:
            ConfigError: no block is left.
        """
        if self.pool is None or self.table is None:
            return Piece(self.tokens, 0, wanted)
        stop = len(self.tokens) if most is None else min(len(self.tokens), self.computed + most)
        if not self.pool.grow(self.table, stop):
            raise self._full()
        asked = wanted if stop == len(self.tokens) else 0
        where = self.pool.where(self.table, self.computed, stop)
        return Piece(self.tokens[self.computed : stop], self.computed, asked, where)

    def did(self, piece: Piece) -> None:
        """That piece is computed."""
        if self.pool is not None and self.table is not None:
            self.computed = piece.end
            self.pool.computed(self.table, self.tokens, self.computed)
            self.pool.slide(self.table, self.computed)

    def replace(self, length: int, token: int) -> None:
        """Go on with `token` behind the first `length` tokens; what was behind them is forgotten."""
        self.tokens, self.computed = [*self.tokens[:length], token], min(self.computed, length)
        if self.pool is None or self.table is None:
            return
        shared = self.table.known * self.pool.block_size > length
        if shared or self.pool.has_gone(self.table, self.computed):
            # Others may share these blocks, so they are not written again: begin anew with what is known of them. And
            # so where the window would have to go back to tokens that are not there any more.
            self.close()
            begun = self.pool.begin(self.tokens)
            if begun is None:
                raise self._full()
            self.table, self.computed = begun

    def fork(self, storage: Storage | None) -> HeldRow:
        """Another row with the same tokens, which shares full blocks and has its own copy of the last.

        Raises:
            ConfigError: no block is left.
        """
        other = HeldRow.__new__(HeldRow)
        other.tokens, other.pool, other.computed, other.table = list(self.tokens), self.pool, self.computed, None
        if self.pool is not None and self.table is not None and storage is not None:
            forked = self.pool.fork(self.table, self.computed)
            if forked is None:
                raise self._full()
            other.table, copied = forked
            for kind, source, target, count in copied:
                for memory in storage.held(kind):
                    memory.copy(source, target, count)
        return other

    def close(self) -> None:
        """Give the blocks back."""
        if self.pool is not None and self.table is not None:
            self.pool.end(self.table)
        self.table = None

    def _full(self) -> ConfigError:
        assert self.pool is not None
        free, size = self.pool.available, self.pool.block_size
        return ConfigError(
            f"a row of {len(self.tokens)} tokens needs more than the {free} blocks of {size} tokens that are free: "
            "wait for other requests, use fewer rows, or make the engine with more cache_tokens."
        )
