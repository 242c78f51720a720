"""Measured operator times as a time source: interpolated in log-size, and flagged where nothing was measured.

It knows tables of (size, seconds) by operator and tensor-parallel degree; operators without one are priced by another
source. A size outside a table is extrapolated along its last slope, and its name stands in `extrapolated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError
from fms_parallel.planner.operators import ATTENTION, MATMUL, Op
from fms_parallel.planner.timing import Seconds, TimeSource

Array = NDArray[Any]


@dataclass(frozen=True)
class Curve:
    """Forward and backward seconds of one operator at increasing FLOPs (bytes for passes over memory)."""

    sizes: Array
    forward: Array
    backward: Array

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or (np.diff(self.sizes) <= 0).any() or min(self.forward.min(), self.backward.min()) <= 0:
            raise ConfigError("a measured curve needs two or more increasing sizes and positive seconds.")

    def at(self, size: Array) -> tuple[Array, Array, bool]:
        """Both directions at `size`, and whether any lies outside what was measured."""
        outside = bool(((size < self.sizes[0] * 0.999) | (size > self.sizes[-1] * 1.001)).any())
        return _log_line(size, self.sizes, self.forward), _log_line(size, self.sizes, self.backward), outside


def _log_line(x: Array, xs: Array, ys: Array) -> Array:
    """Straight lines between points in log-log, the first and the last one continued."""
    lx, lxs, lys = np.log(x), np.log(xs), np.log(ys)
    piece = np.clip(np.searchsorted(lxs, lx) - 1, 0, len(xs) - 2)
    slope = (lys[piece + 1] - lys[piece]) / (lxs[piece + 1] - lxs[piece])
    return np.asarray(np.exp(lys[piece] + slope * (lx - lxs[piece])))


@dataclass
class Measured:
    """A `TimeSource` over curves by operator name; `otherwise` prices the rest."""

    curves: Mapping[str, Curve]
    otherwise: TimeSource
    extrapolated: set[str] = field(default_factory=set)

    def operator(self, op: Op) -> tuple[Array, Array]:
        """Seconds of the forward and of the backward pass."""
        if op.name not in self.curves:
            return self.otherwise.operator(op)
        size = op.flops if op.kind in (MATMUL, ATTENTION) else op.bytes
        forward, backward, outside = self.curves[op.name].at(size)
        if outside:
            self.extrapolated.add(op.name)
        return forward, backward

    def total(self, ops: Sequence[Op]) -> Seconds:
        """Seconds of operators that run one after another; measured ones include what the host costs."""
        times = [(op, self.operator(op)) for op in ops]
        zero = np.zeros(())
        return Seconds(
            forward=sum((time[0] for _, time in times), zero),
            backward=sum((time[1] for _, time in times), zero),
            core=sum((time[0] for op, time in times if op.core), zero),
            matmuls=sum((time[0] for op, time in times if op.kind in (MATMUL, ATTENTION)), zero),
            last=times[-1][1][0],
            launches=(sum(op.kernels[0] for op in ops), sum(op.kernels[1] for op in ops)),
        )
