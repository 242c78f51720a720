"""Which rows take part in the next step, with how many of their tokens, and who gets which blocks of the cache.

    budget 8     decode decode decode | chunk chunk chunk chunk chunk      prompts fill what decodes leave
                 row 0  row 1  row 2    row 3 (5 of its 40 tokens)

Rows are served in the order they came, those of another priority before or behind them. A row takes blocks as it grows;
when none is left, the row that came last gives its own back and waits again, its tokens kept: it computes them anew,
and its next tokens are the same, because they depend on nothing else. What it decides depends on requests alone, never
on clocks: every rank decides the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from fms_parallel.inference.paged import BlockPool
from fms_parallel.inference.row import Row


@dataclass(frozen=True)
class Limits:
    """How much a step may take on.

    Attributes:
        rows: running at a time. tokens: of all rows in one step. static: a batch is filled only when the one before it
            has ended altogether (for comparison; nobody else wants it).
    """

    rows: int
    tokens: int
    static: bool = False


class Scheduler:
    """Rows that wait and rows that run.

    Args:
        pool: whose blocks rows take; None: nothing is cached, every step computes each row as a whole.
        draft: proposals per row and step, which count as its tokens.
    Attributes:
        hopeless: rows that had the whole cache to themselves and could not go on: nothing would ever change that.
    """

    def __init__(self, limits: Limits, pool: BlockPool | None, draft: int = 0) -> None:
        self.limits, self.pool, self.draft = limits, pool, draft
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.hopeless: list[Row] = []
        self.preemptions = 0
        self._turn = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def rows(self) -> Iterator[Row]:
        """All of them."""
        yield from self.running
        yield from self.waiting

    def add(self, row: Row) -> None:
        """A row that waits, behind those of its priority."""
        self._queue(row, sum(other.options.priority <= row.options.priority for other in self.waiting))

    def end(self, row: Row) -> None:
        """A row is done, wherever it is; its blocks are free."""
        self._give_back(row)
        if row in self.running:
            self.running.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def plan(self, groups: int = 1) -> list[tuple[Row, int]]:
        """The next step: rows, and how many of its uncomputed tokens each computes. Busy rows are left out.

        Args:
            groups: steps that are to be under way at a time; each takes its share of the rows, in turn.
        """
        most = -(-min(self.limits.rows, len(self.running) + len(self.waiting)) // groups)
        free = [row for row in self.running if not row.busy]
        if groups > 1:
            free = sorted(free, key=lambda row: row.turn)[:most]
        planned = self._planned_whole(free, most) if self.pool is None else self._planned(free, most)
        self._turn += 1
        for row, _ in planned:
            row.turn = self._turn
        return planned

    def _planned_whole(self, free: list[Row], most: int) -> list[tuple[Row, int]]:
        """Without a cache: each row as a whole."""
        return [(row, row.left) for row in [*free, *self._admit(self.limits.tokens, most - len(free))]]

    def _planned(self, free: list[Row], most: int) -> list[tuple[Row, int]]:
        """Decodes first; prompts fill what they leave, those of rows that come in last."""
        planned: list[tuple[Row, int]] = []
        budget = self.limits.tokens
        for row in [row for row in free if row.left == 1]:
            if row in self.running and self._grow(row, len(row.tokens)):
                planned.append((row, 1))
                budget -= 1 + self.draft
        for row in free:
            if row in self.running and row.left > 1 and budget > 0 and (count := self._chunk(row, budget)):
                planned.append((row, count))
                budget -= count
        planned = [(row, count) for row, count in planned if row in self.running]  # a later row's growth may preempt
        for row in self._admit(budget, most - len(planned)):
            if budget > 0:  # a static batch is filled at once, and computed as the budget allows
                planned.append((row, self._chunk(row, budget)))
                budget -= planned[-1][1]
        return planned

    def _chunk(self, row: Row, budget: int) -> int:
        """How many tokens of its prompt a row computes next.

        It has blocks for all of them, unless layers have windows: then for as many as find blocks, and if need be for
        one, from rows that came later; 0: it gave its own back.
        """
        assert self.pool is not None and row.table is not None
        count = min(row.left, budget)
        if not self.pool.slides:
            return count
        count = max(1, min(count, self.pool.reach(row.table) - row.computed))
        return count if self._grow(row, row.computed + count) else 0

    def _grow(self, row: Row, tokens: int) -> bool:
        """Blocks for so many tokens of a row, if need be those of rows that came later; False: it gave its own back."""
        assert self.pool is not None and row.table is not None
        while not self.pool.grow(row.table, tokens):
            free = [other for other in reversed(self.running) if not other.busy]
            victim = max(free, key=lambda other: other.options.priority, default=row)  # the latest of several
            self._preempt(victim)
            if victim is row:
                if not self.pool.in_use:
                    self.hopeless.append(row)
                return False
        return True

    def grow_for_draft(self, row: Row, tokens: int) -> bool:
        """Blocks for so many tokens in all without taking any from others."""
        return self.pool is None or (row.table is not None and self.pool.grow(row.table, tokens))

    def _preempt(self, row: Row) -> None:
        self._give_back(row)
        self.running.remove(row)
        self._queue(row, sum(other.options.priority < row.options.priority for other in self.waiting))
        self.preemptions += 1

    def _queue(self, row: Row, before: int) -> None:
        """Rows wait in the order of their priorities."""
        self.waiting.insert(before, row)

    def _give_back(self, row: Row) -> None:
        if self.pool is not None and row.table is not None:
            self.pool.end(row.table)
        row.table, row.computed, row.drafted = None, 0, ()

    def _admit(self, budget: int, most: int) -> list[Row]:
        """Let rows in that wait, at most so many, in their order, as long as one more fits and the budget lasts."""
        admitted: list[Row] = []
        if self.limits.static and self.running:
            return admitted
        while self.waiting and len(self.running) < self.limits.rows and (budget > 0 or self.limits.static):
            row = self.waiting[0]
            if len(admitted) >= most and not self.limits.static:
                break
            if self.pool is not None and not self._begin(row):
                break
            self.waiting.popleft()
            self.running.append(row)
            admitted.append(row)
            budget -= row.left
        return admitted

    def _begin(self, row: Row) -> bool:
        """Blocks for the tokens that a row has. One per running row is left, or they would soon preempt it."""
        assert self.pool is not None
        begun = self.pool.begin(row.tokens, row.longest, row.shareable)
        if begun is None:
            return False
        row.table, row.computed = begun
        others = [(other.table, other.longest) for other in self.running if other.table]
        if self.running and not self.pool.leaves_room(row.table, len(row.tokens), others):
            self._give_back(row)
            return False
        row.shared = max(row.shared, min(row.computed, len(row.prompt)))
        return True
