"""`Worker`: steps: the planned rows' pieces through the model, their new tokens back into the rows.

It knows rows, blocks, a runner and a proposer; who takes part is decided by the scheduler, who is told by the engine.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fms_parallel.errors import FmsError
from fms_parallel.inference.draft import Proposal
from fms_parallel.inference.kv_manager import Storage
from fms_parallel.inference.ragged import Piece
from fms_parallel.inference.row import Row
from fms_parallel.inference.runner import Answers, Runner
from fms_parallel.inference.sampler import Chosen
from fms_parallel.inference.scheduler import Scheduler
from fms_parallel.inference.setup import Proposer
from fms_parallel.log import get_logger

log = get_logger(__name__)

Planned = Sequence[tuple[Row, int]]
"""Rows of one step, and how many of their uncomputed tokens each computes."""


@dataclass(frozen=True)
class Flight:
    """A step that has begun: the rows that wait for its answers, and where those will come from.

    Attributes:
        given: of each row, how many of the answers are about tokens of its prompt: the first.
    """

    rows: list[Row]
    given: list[int]
    answers: Answers


class Worker:
    """Runs steps.

    Args:
        forget: called with a row that has ended, before its owner is told.
    Attributes:
        counts: of steps, drafted and accepted tokens. flights: steps under way, oldest first.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        storage: Storage | None,
        proposer: Proposer | None,
        forget: Callable[[Row], None],
    ) -> None:
        self.runner, self.scheduler, self.storage, self.proposer = runner, scheduler, storage, proposer
        self.forget, self.counts = forget, Counter[str]()
        self.flights: deque[Flight] = deque()

    def step(self, patient: bool = True) -> None:
        """Begin as many steps as can be under way, each with rows of its own; take the tokens of the oldest.

        Args:
            patient: rows may wait for blocks that a caller's own loop holds; otherwise the first of them ends with an
                error, when nothing else goes on.

        A row whose logits are no distribution ends with an error, and so do all of a step that fails.

        Raises:
            what the forward raised, when it failed with other ranks in it: they may not have.
        """
        begun = False
        while len(self.flights) < self.runner.groups and (planned := self.scheduler.plan(self.runner.groups)):
            self._begin(planned)
            begun = True
        if self.flights:
            self._take()
        for row in self.scheduler.hopeless:
            said = f"a row of {len(row.tokens)} tokens had the whole cache and could not go on"
            self._give_up(row, f"{said}: ask for fewer, or make the engine with more cache_tokens.")
        self.scheduler.hopeless.clear()
        if self.scheduler.waiting and not (begun or patient or self.scheduler.running or self.flights):
            row = self.scheduler.waiting[0]
            said = f"a row of {len(row.tokens)} tokens waits for blocks that rows of prefill or ScheduleGeneration hold"
            self._give_up(row, f"{said}: clear() or close() them first, or make the engine with more cache_tokens.")

    def finish(self) -> None:
        """Take the tokens of all steps under way."""
        while self.flights:
            self._take()

    def _begin(self, planned: Planned) -> None:
        proposals = self._propose(planned)
        wanted = [row.asks(row.computed, row.computed + count) for row, count in planned]
        pieces = [self._piece(row, count, len(asks)) for (row, count), asks in zip(planned, wanted, strict=True)]
        ready = [row for (row, _), asks in zip(planned, wanted, strict=True) if asks]
        drafts = [proposals.get(row.number, ([], None)) for row in ready]
        asked = [asks for asks in wanted if asks]
        try:
            answers = self.runner.begin(pieces, self.storage, asked, drafts)
        except Exception as error:
            self._lose([row for row, _ in planned], error)
            return
        self.counts["steps"] += 1
        for row, count in planned:
            row.computed += count  # for every step begun later: each rank computes them in this order
            row.asked = max(row.asked, min(row.computed, len(row.prompt) - 1))
            row.busy = row.left == 0
            if not row.busy:
                self._settle(row)
        given = [sum(ask.given is not None for ask in asks) for asks in asked]
        self.flights.append(Flight(ready, given, answers))

    def _take(self) -> None:
        """The answers of the oldest step into its rows; those of a row that was cancelled meanwhile are dropped."""
        flight = self.flights.popleft()
        try:
            answers = flight.answers()
        except Exception as error:
            self._lose(flight.rows, error)
            return
        going = []
        for row, given, found in zip(flight.rows, flight.given, answers, strict=True):
            if row.finish is not None:
                continue
            row.take_prompt(found[:given])
            if given < len(found) or row.finish is not None:
                going.append((row, found[given:]))
        news: list[tuple[list[Chosen], str]] = []
        for row, chosen in going:
            if row.finish is not None:
                news.append(([], ""))
                continue
            self.counts.update(drafted=len(row.drafted), accepted=len(chosen) - 1)
            right = len(row.tokens) + len(chosen) - 1  # so many tokens, drafted ones included, were computed rightly
            news.append(row.take(chosen))
            row.busy, row.drafted, row.computed = False, (), min(right, len(row.tokens) - 1)
            if self.proposer is not None:
                self.proposer.took(row, right)
        for row, _ in going:
            self._settle(row)
        for (row, _), (taken, text) in zip(going, news, strict=True):
            ended = row.finish is not None
            row.tell(taken, text)
            if row.finish is not None and not ended:  # its owner could not take it
                self.forget(row)

    def _give_up(self, row: Row, why: str) -> None:
        """End a row that would wait, or be begun again and again, for ever."""
        row.fail(FmsError(why))
        self.forget(row)
        row.tell(())

    def _settle(self, row: Row) -> None:
        """Offer a row's full blocks to others; let it go when it has ended."""
        pool = self.scheduler.pool
        if pool is None:
            row.computed = 0
        elif row.table is not None and row.error is None:
            pool.computed(row.table, row.tokens, row.computed)
            pool.slide(row.table, row.computed)
        if row.finish is not None:
            self.forget(row)

    def _piece(self, row: Row, count: int, wanted: int) -> Piece:
        pool, start, stop = self.scheduler.pool, row.computed, row.computed + count
        tokens = row.tokens[start:stop] + (list(row.drafted) if stop == len(row.tokens) else [])
        if pool is None or row.table is None:
            return Piece(tokens, start, wanted)
        return Piece(tokens, start, wanted, pool.where(row.table, start, start + len(tokens)))

    def _propose(self, planned: Planned) -> dict[int, Proposal]:
        """Tokens behind the last of each row that decodes, as far as its cache and its request allow."""
        if self.proposer is None:
            return {}
        whole = self.scheduler.pool is None
        rows = [row for row, count in planned if row.left == count and (count == 1 or whole) and row.begun]
        found = self.proposer.propose(rows, [self._most_drafted(row) for row in rows])
        for row, (drafted, _) in zip(rows, found, strict=True):
            row.drafted = drafted
        return {row.number: proposal for row, proposal in zip(rows, found, strict=True)}

    def _most_drafted(self, row: Row) -> int:
        most = min(self.scheduler.draft, row.options.max_new_tokens - len(row.new) - 1)
        return most if most > 0 and self.scheduler.grow_for_draft(row, len(row.tokens) + most) else 0

    def _lose(self, rows: Sequence[Row], error: Exception) -> None:
        """A step failed: these requests cannot go on, others can. With other ranks nobody can know."""
        log.error("a step failed", exc_info=error)
        failure = error if isinstance(error, FmsError) else FmsError(f"the model failed: {error!r}.")
        failure.__cause__ = error.__cause__ if failure is error else error
        for row in rows:
            row.fail(failure)
            self.forget(row)
            row.tell(())
        if not self.runner.alone:
            self.flights.clear()
            raise error
