"""`Feed`: which rows a step reads, as a function of (step, seed) only - so a run resumes from two integers.

It knows rows and shards; it knows nothing of meshes, ranks, devices or what is in a row.

    epoch 0: rows in the order drawn from (seed, 0)     epoch 1: in the order drawn from (seed, 1)
    |--step 0--|--step 1--|--step 2--|--step 3--|--step 4--| ...      a step may straddle two epochs
    |s0|s1|s2|s3|                    shard i of n is the i-th n-th of a step, micro-batches are pieces of a shard:
                                     laid end to end they are the same global batch in every layout
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fms_parallel.data.rows import IGNORE, ChangingRows, RowDataset, Shortened, seeded
from fms_parallel.errors import ConfigError, DataError
from fms_parallel.phases import Phases


@dataclass(frozen=True)
class Batch:
    """Rows side by side, on the CPU.

    Attributes:
        input_ids: int64 `[b, S]`.
        labels: int64 `[b, S]`, already shifted by one; `IGNORE` where nothing is asked.
    """

    input_ids: Tensor
    labels: Tensor

    @cached_property
    def tokens(self) -> int:
        """Labels that count: the weight of this batch's mean loss."""
        return int((self.labels != IGNORE).sum())

    def split(self, pieces: int) -> Iterator[Batch]:
        """`pieces` equal batches of consecutive rows. Raises ConfigError when the rows do not divide."""
        if pieces < 1 or len(self.input_ids) % pieces:
            raise ConfigError(f"a batch of {len(self.input_ids)} rows cannot be split into {pieces} equal pieces.")
        for input_ids, labels in zip(self.input_ids.chunk(pieces), self.labels.chunk(pieces), strict=True):
            yield Batch(input_ids, labels)


class Feed:
    """The batches of one shard of a run.

    Args:
        dataset: the rows.
        global_batch: rows of one step over all shards and micro-batches.
        seed: the order is drawn from it.
        shard: `(index, count)`: of a step this feed reads the index-th count-th. Ranks that work on the same rows
            (tensor, context or pipeline neighbours) have the same shard.
        micro_batches: pieces that a shard's rows are worked on in.
        phases: what each step works on, where that changes on the way; `global_batch` says nothing then.

    Raises ConfigError when shards and micro-batches do not divide `global_batch`, DataError for a dataset without rows.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        global_batch: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        micro_batches: int = 1,
        phases: Phases | None = None,
    ) -> None:
        index, count = shard
        if not 0 <= index < count:
            raise ConfigError(f"shard {index} of {count}: the index must lie in [0, {count}).")
        if phases is None:  # else it is the step that matters: another layout may run a later phase
            check_divides(global_batch, count, micro_batches)
        if not len(dataset):
            raise DataError("the dataset has no rows; add data or use a shorter seq_len.")
        self.dataset = dataset
        self.seed = seed
        self.shard = shard
        self.micro_batches = micro_batches
        self.phases = phases or Phases((), dataset.seq_len, global_batch)
        if self.phases.longest > dataset.seq_len:
            raise ConfigError(
                f"a phase has rows of {self.phases.longest} tokens, but the dataset's have {dataset.seq_len}: make "
                "them as long as the longest phase."
            )
        self._orders: dict[int, Tensor] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Steps after which every row was read at least once; the last of them may reach into the next epoch."""
        return self.phases.steps_for(len(self.dataset))

    def check(self, step: int) -> None:
        """Raises ConfigError when step `step` has a batch that the shards cannot share."""
        check_divides(self.phases.at(step).batch_size, self.shard[1], self.micro_batches)

    def rows(self, step: int) -> list[int]:
        """The row numbers of this shard in step `step` (>= 0), in order."""
        if step < 0:
            raise ConfigError(f"step {step}: steps count from 0.")
        self.check(step)
        index, count = self.shard
        wanted = self.phases.at(step).batch_size // count
        first = self.phases.first_row(step) + index * wanted
        rows: list[int] = []
        while len(rows) < wanted:
            epoch, offset = divmod(first + len(rows), len(self.dataset))
            rows += self._order(epoch)[offset : offset + wanted - len(rows)].tolist()
        return rows

    def batch(self, step: int) -> Batch:
        """This shard's rows of step `step`, all micro-batches in one: `[batch size / shards, S]`."""
        return self._read(self.rows(step), step)

    def pieces(self, step: int) -> Iterator[Batch]:
        """The micro-batches of `batch(step)`, in order, each read when it is asked for."""
        rows = self.rows(step)
        size = len(rows) // self.micro_batches
        for start in range(0, len(rows), size):
            yield self._read(rows[start : start + size], step)

    def _read(self, rows: list[int], step: int) -> Batch:
        dataset = self.dataset.at(step) if isinstance(self.dataset, ChangingRows) else self.dataset
        length = self.phases.at(step).seq_len
        dataset = dataset if length == dataset.seq_len else Shortened(dataset, length)
        inputs, labels = zip(*map(dataset.row, rows), strict=True)
        return Batch(torch.stack(inputs), torch.stack(labels))

    def _order(self, epoch: int) -> Tensor:
        """The row order of one epoch, int64 `[rows]`. Two epochs are kept, since a step may straddle them."""
        if epoch not in self._orders:
            for old in [known for known in self._orders if known != epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = torch.randperm(len(self.dataset), generator=seeded(self.seed, epoch), device="cpu")
        return self._orders[epoch]


def check_divides(global_batch: int, shards: int, micro_batches: int) -> None:
    """Raises ConfigError when `shards` ranks with so many micro-batches each cannot share a batch evenly."""
    if micro_batches < 1:
        raise ConfigError(f"micro_batches={micro_batches}: must be >= 1.")
    unit = shards * micro_batches
    if global_batch >= 1 and global_batch % unit == 0:
        return
    below = max(global_batch, 0) // unit * unit
    nearest = " or ".join(str(value) for value in (below, below + unit) if value > 0)
    raise ConfigError(
        f"global_batch={global_batch} does not divide into {shards} shards x {micro_batches} micro-batches: "
        f"it must be a multiple of {unit}, for example {nearest}."
    )
