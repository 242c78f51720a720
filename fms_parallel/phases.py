"""Phases of a run, announced before they come: from a step on, rows of another length or steps of more rows.

    phases=[Phase(0, seq_len=64), Phase(1000, seq_len=512), Phase(3000, batch_size=64)]

It knows steps and sizes; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fms_parallel.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """From `step` (from 0) on rows have `seq_len` tokens and steps `batch_size` rows; None: as before."""

    step: int
    seq_len: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Work:
    """What a step works on."""

    seq_len: int
    batch_size: int


class Phases:
    """A run's phases in order.

    Args:
        seq_len, batch_size: before the first phase that says another.
    Raises:
        ConfigError: two that begin at one step, a negative step, or a size below 1.
    """

    def __init__(self, phases: Sequence[Phase], seq_len: int, batch_size: int) -> None:
        self._work: list[tuple[int, Work]] = [(0, Work(seq_len, batch_size))]
        self._announced: list[int] = []
        for phase in sorted(phases, key=lambda phase: phase.step):
            if phase.step < 0 or phase.step in self._announced:
                raise ConfigError(f"phases: step {phase.step} is negative, or given twice.")
            if any(size is not None and size < 1 for size in (phase.seq_len, phase.batch_size)):
                raise ConfigError(f"phases: {phase}: rows and tokens are at least 1.")
            work = self._work[-1][1]
            new = Work(phase.seq_len or work.seq_len, phase.batch_size or work.batch_size)
            if phase.step == 0:
                self._work.clear()
            self._work.append((phase.step, new))
            self._announced.append(phase.step)

    def at(self, step: int) -> Work:
        """What the step numbered `step` (from 0) works on."""
        return next(work for start, work in reversed(self._work) if start <= step)

    def begins(self, step: int) -> bool:
        """Whether another phase begins with this step."""
        return step > 0 and any(start == step for start, _ in self._work)

    def until(self, step: int, steps: int) -> int:
        """Steps left of the phase that `step` belongs to, in a run of `steps`."""
        ends = [start for start, _ in self._work if start > step]
        return max(min([*ends, steps]) - step, 0)

    def first_row(self, step: int) -> int:
        """Rows that all steps before `step` read: phases of other sizes neither skip rows nor read them again."""
        spans = zip(self._work, [*self.starts[1:], step], strict=True)
        return sum(max(min(end, step) - start, 0) * work.batch_size for (start, work), end in spans)

    def steps_for(self, rows: int) -> int:
        """Steps that read so many rows, or a few more."""
        step = 0
        for (start, work), end in zip(self._work, [*self.starts[1:], None], strict=True):
            step = start + -(-max(rows - self.first_row(start), 0) // work.batch_size)
            if end is None or step <= end:
                return step
        return step

    def begun(self, steps: int) -> list[list[int]]:
        """What the first `steps` steps worked on: `[first step, seq_len, batch_size]` of each phase."""
        return [[start, work.seq_len, work.batch_size] for start, work in self._work if start < steps or start == 0]

    @property
    def starts(self) -> list[int]:
        """The first step of every phase, in order; the first one is 0."""
        return [start for start, _ in self._work]

    @property
    def last(self) -> int:
        """The first step of the last phase."""
        return self._work[-1][0]

    @property
    def works(self) -> list[Work]:
        """What the phases work on, in order."""
        return [work for _, work in self._work]

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return max(work.seq_len for work in self.works)
