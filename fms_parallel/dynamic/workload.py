"""What a job works on: the model's sizes layer by layer, and the rows it reads.

    ModelProfiler(model).profile(seq_len=1024)
    DatasetProfiler(dataset).profile()

The model's numbers are those of the planner's operator table and of `ModelShape`; the rows' are read and timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from fms_parallel.data.rows import IGNORE, RowDataset
from fms_parallel.errors import ConfigError
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.operators import attention_operators, embedding_operators, feed_forward_operators
from fms_parallel.planner.operators import head_operators as last_operators
from fms_parallel.planner.software import load_software
from fms_parallel.shape import ModelShape


@dataclass(frozen=True)
class LayerProfile:
    """One layer and one sequence of S tokens.

    Attributes:
        parameters: of this layer. flops: forward and backward, matrix products and attention. activation_bytes: kept
            for the backward pass, two bytes per element.
    """

    name: str
    parameters: int
    flops: float
    activation_bytes: int


@dataclass(frozen=True)
class ModelProfile:
    """A model by layers: the embedding, each block, the head.

    Attributes:
        parameters: unique ones. flops: of a sequence, forward and backward. activation_bytes: of a sequence.
    """

    shape: ModelShape
    seq_len: int
    parameters: int
    layers: tuple[LayerProfile, ...]

    @property
    def flops(self) -> float:
        """Forward and backward of one sequence."""
        return sum(layer.flops for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """What one sequence keeps for the backward pass."""
        return sum(layer.activation_bytes for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "flops": self.flops, "activation_bytes": self.activation_bytes}


class ModelProfiler:
    """Sizes of a model.

    Args:
        model: has a `config` with `shape()`, as all of `fms_parallel.models`; or the shape itself.
    Raises:
        ConfigError: a model that does not tell its shape.
    """

    def __init__(self, model: Any) -> None:
        self.shape = shape_of(model)

    def profile(self, seq_len: int | None = None) -> ModelProfile:
        """For sequences of `seq_len` tokens; None: the longest that the model takes."""
        shape, sequence = self.shape, seq_len or self.shape.max_positions
        columns, software = Columns.of([{"micro": 1}]), load_software("native").with_precision("bf16")
        whole = shape.activation_bytes(1, sequence)
        block = replace(shape, layers=shape.layers + 1).activation_bytes(1, sequence) - whole
        ends = whole - shape.layers * block
        tables = {
            "embedding": embedding_operators(shape, columns, sequence, software),
            "block": [
                *attention_operators(shape, columns, sequence, software),
                *feed_forward_operators(shape, columns, sequence, software),
            ],
            "head": last_operators(shape, columns, sequence, software),
        }
        flops = {name: 3 * sum(float(op.flops.sum()) for op in ops) for name, ops in tables.items()}
        positions = shape.max_positions * shape.width if shape.learned_positions else 0
        head = shape.norm_parameters + shape.other + (0 if shape.tied else shape.vocab * shape.width)
        layers = (
            LayerProfile("embedding", shape.vocab * shape.width + positions, flops["embedding"], 0),
            *(
                LayerProfile(f"block {index}", shape.block_parameters, flops["block"], block)
                for index in range(shape.layers)
            ),
            LayerProfile("head", head, flops["head"], ends),
        )
        return ModelProfile(shape, sequence, shape.parameters(), layers)


def shape_of(model: Any) -> ModelShape:
    """The shape that a model, its config, or a `ModelShape` itself tells.

    Raises:
        ConfigError: none of them.
    """
    if isinstance(model, ModelShape):
        return model
    tell = getattr(getattr(model, "config", model), "shape", None)
    found = tell() if callable(tell) else tell
    if not isinstance(found, ModelShape):
        raise ConfigError(
            f"{type(model).__name__} does not tell its sizes: give shape=ModelShape(...), or a model whose config has "
            "a shape()."
        )
    return found


# ---- rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetProfile:
    """Rows of a dataset.

    Attributes:
        rows: how many. seq_len: tokens of a row, padding included. bytes: of all rows as they are read.
        shortest, mean_length, median_length, p90_length, longest: tokens of a row that count (labels that are asked
            for), over the rows that were looked at. padding: part of the tokens that does not count.
        rows_per_s: how fast one process reads rows.
    """

    rows: int
    seq_len: int
    bytes: int
    sampled: int
    shortest: int
    mean_length: float
    median_length: float
    p90_length: float
    longest: int
    padding: float
    rows_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class DatasetProfiler:
    """Looks at rows of a dataset.

    Args:
        dataset: see `get_dataset`. rows: that are read, spread evenly.
    """

    def __init__(self, dataset: RowDataset, rows: int = 256) -> None:
        if len(dataset) == 0:
            raise ConfigError("a dataset without rows has no profile.")
        self.dataset, self.rows = dataset, min(rows, len(dataset))

    def profile(self) -> DatasetProfile:
        """Read the sample and count."""
        dataset, count = self.dataset, len(self.dataset)
        indices = [count * step // self.rows for step in range(self.rows)]
        began = time.perf_counter()
        read = [dataset.row(index) for index in indices]
        seconds = max(time.perf_counter() - began, 1e-9)
        lengths = sorted(int((labels != IGNORE).sum()) for _, labels in read)
        size = sum(tensor.numel() * tensor.element_size() for tensor in read[0])
        return DatasetProfile(
            rows=count,
            seq_len=dataset.seq_len,
            bytes=size * count,
            sampled=len(read),
            shortest=lengths[0],
            mean_length=fmean(lengths),
            median_length=float(median(lengths)),
            p90_length=float(_quantile(lengths, 0.9)),
            longest=lengths[-1],
            padding=1 - fmean(lengths) / dataset.seq_len,
            rows_per_s=len(read) / seconds,
        )


def _quantile(ordered: Sequence[int], part: float) -> int:
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]
