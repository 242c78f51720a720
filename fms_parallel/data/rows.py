"""`RowDataset`: what every dataset is to a run, numbered rows of S inputs and S labels; and the rows that need no file.

It knows rows; it knows nothing of text, tokenizers, files, or the order in which a run reads them (`feed.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError, DataError

IGNORE = -100
"""The label of a position that counts for nothing: padding, or a prompt that is not to be learned."""


class RowDataset(Protocol):
    """Rows that a run can read in any order, the same ones every time.

    `row(index)`, for index in `[0, len)`, gives `(input_ids [S], labels [S])`, both int64: `labels[s]` is the token
    wanted at position s, so it is already shifted by one, or `IGNORE`.
    """

    @property
    def seq_len(self) -> int:
        """S."""

    def __len__(self) -> int:
        """Rows of one epoch."""

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Row `index` as `(input_ids [S], labels [S])`; labels of another shape where a model wants them per row."""


@runtime_checkable
class ChangingRows(RowDataset, Protocol):
    """Rows that a run sees in another form at every step, such as those of dynamic masking."""

    def at(self, step: int) -> RowDataset:
        """The rows as they are in step `step`: a function of it, so that a resumed run sees the same."""


def seeded(*words: int) -> torch.Generator:
    """A CPU generator that is a function of `words` only; different words give unrelated streams."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def next_token_row(window: Tensor) -> tuple[Tensor, Tensor]:
    """The row of S+1 consecutive tokens: each of the first S is asked for the one behind it."""
    window = window.to(torch.int64)
    return window[:-1], window[1:]


@dataclass(frozen=True)
class RandomRows:
    """Uniform random tokens for throughput runs. Row i is a function of (seed, i) only.

    Attributes:
        seq_len: S. vocab_size: tokens are in `[0, vocab_size)`. rows: length of an epoch.
    """

    seq_len: int
    vocab_size: int
    rows: int = 1 << 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "rows"):
            if getattr(self, name) < 1:
                raise DataError(f"random data with {name}={getattr(self, name)}: must be >= 1.")

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        size, generator = (self.seq_len + 1,), seeded(self.seed, index)
        return next_token_row(torch.randint(self.vocab_size, size, generator=generator, device="cpu"))


class RowView:
    """Some rows of another dataset, in the order of `indices` (int64 `[rows]`)."""

    def __init__(self, dataset: RowDataset, indices: Tensor) -> None:
        self.dataset = dataset
        self.indices = indices

    @property
    def seq_len(self) -> int:
        return self.dataset.seq_len

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset.row(int(self.indices[index]))


class Shortened:
    """The first `seq_len` tokens of every row of a dataset, and of its labels where they are per token."""

    def __init__(self, dataset: RowDataset, seq_len: int) -> None:
        self.dataset = dataset
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.dataset.row(index)
        return inputs[: self.seq_len], labels[: self.seq_len] if labels.shape == inputs.shape else labels


def train_validation_split(dataset: RowDataset, fraction: float, seed: int) -> tuple[RowView, RowView]:
    """Two views that share no row and together have all: `fraction` of the rows, drawn from `seed`, is validation.

    Each side gets at least one row. Raises ConfigError for a fraction outside (0, 1), DataError for fewer than 2 rows.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction}: must lie between 0 and 1, for example 0.05.")
    rows = len(dataset)
    if rows < 2:
        raise DataError(f"a dataset of {rows} row cannot be split: training and validation need one each; add data.")
    held = min(max(round(rows * fraction), 1), rows - 1)
    order = torch.randperm(rows, generator=seeded(seed), device="cpu")
    validation, train = order[:held].sort().values, order[held:].sort().values
    return RowView(dataset, train), RowView(dataset, validation)
