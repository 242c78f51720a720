"""Phases of a run, announced before they come: from a step on, rows of another length or steps of more rows.

    phases=[Phase(0, seq_len=64), Phase(1000, seq_len=512), Phase(3000, seq_len=512, batch_size=64)]

It knows steps and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fms_parallel.data.rows import RowDataset
from fms_parallel.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """From `step` on rows have `seq_len` tokens and steps `batch_size` rows; None: as before."""

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

    Raises:
        ConfigError: two that begin at one step, a negative step, or a size below 1.
    """

    def __init__(self, phases: Sequence[Phase], seq_len: int, batch_size: int) -> None:
        self._work: list[tuple[int, Work]] = [(0, Work(seq_len, batch_size))]
        for phase in sorted(phases, key=lambda phase: phase.step):
            last, work = self._work[-1]
            if phase.step < 0 or (phase.step == last and last > 0):
                raise ConfigError(f"phases: step {phase.step} is negative, or given twice.")
            new = Work(phase.seq_len or work.seq_len, phase.batch_size or work.batch_size)
            if min(new.seq_len, new.batch_size) < 1 or phase.seq_len == 0 or phase.batch_size == 0:
                raise ConfigError(f"phases: {phase}: rows and tokens are at least 1.")
            if phase.step == 0:
                self._work.clear()
            self._work.append((phase.step, new))

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

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return max(work.seq_len for _, work in self._work)


class Shortened:
    """The first `seq_len` tokens of every row of a dataset."""

    def __init__(self, dataset: RowDataset, seq_len: int) -> None:
        if seq_len > dataset.seq_len:
            raise ConfigError(f"a phase asks for rows of {seq_len} tokens, but the dataset's have {dataset.seq_len}.")
        self.dataset, self.seq_len = dataset, seq_len

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """The row's first tokens, and their labels."""
        inputs, labels = self.dataset.row(index)
        return inputs[: self.seq_len], labels[: self.seq_len]
