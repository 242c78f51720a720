"""From operators to seconds. `TimeSource` is the interface; `Roofline` is the analytic one (measured ones: `profiles`).

It knows peaks, bandwidths and kernel efficiency; it knows nothing of layouts and schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.efficiency import Constants, matmul_efficiency
from fms_parallel.planner.hardware import Device
from fms_parallel.planner.operators import ATTENTION, MATMUL, Op

Array = NDArray[Any]


@dataclass(frozen=True)
class Seconds:
    """One operator or a list of them: forward and backward pass, and of the forward pass its parts.

    `core` is the attention core, `matmuls` all matrix products and attention, `last` the last operator; `launches`
    counts kernels (forward, backward), of which the host starts one after another.
    """

    forward: Array
    backward: Array
    core: Array
    matmuls: Array
    last: Array
    launches: tuple[int, int]


class TimeSource(Protocol):
    """What prices an operator."""

    def operator(self, op: Op) -> tuple[Array, Array]:
        """Seconds of the forward and of the backward pass."""
        ...

    def total(self, ops: Sequence[Op]) -> Seconds:
        """Seconds of operators that run one after another."""
        ...


@dataclass(frozen=True)
class Roofline:
    """The slower of arithmetic, memory and the least time of a kernel; a list also waits for the host."""

    device: Device
    precision: str
    constants: Constants

    def operator(self, op: Op) -> tuple[Array, Array]:
        """Seconds of the forward and of the backward pass."""
        rate = self._rate(op)
        bandwidth = self.device.memory_gb_s * 1e9 * self.constants.stream
        least = self.constants.kernel_us * 1e-6
        forward = np.maximum(np.maximum(op.flops / rate, op.bytes / bandwidth), op.kernels[0] * least)
        flops, size = op.flops * op.backward[0], op.bytes * op.backward[1]
        backward = np.maximum(np.maximum(flops / rate, size / bandwidth), op.kernels[1] * least)
        return forward, backward

    def _rate(self, op: Op) -> Any:
        precise = op.precise or op.kind == ATTENTION or self.precision != "fp8"
        wide = self.device.peak("bf16" if self.precision == "fp8" else self.precision)
        peak = wide if precise else self.device.peak("fp8") * self.constants.fp8
        if op.kind == MATMUL and op.shape is not None:
            return peak * matmul_efficiency(*op.shape, self.constants)
        if op.kind == ATTENTION:
            return peak * self.constants.attention
        return self.device.vector_tflops * 1e12

    def total(self, ops: Sequence[Op]) -> Seconds:
        """Seconds of operators that run one after another, at least as long as the host needs to start them."""
        times = [self.operator(op) for op in ops]
        launches = sum(op.kernels[0] for op in ops), sum(op.kernels[1] for op in ops)
        host, shown = self.constants.host_us * 1e-6, 1 - self.constants.hidden
        begun = launches[0] * host, launches[1] * host * self.constants.host_backward
        pairs = list(zip(ops, times, strict=True))
        zero = np.zeros(())
        return Seconds(
            forward=np.maximum(sum((time[0] for time in times), zero) + shown * begun[0], begun[0]),
            backward=np.maximum(sum((time[1] for time in times), zero) + shown * begun[1], begun[1]),
            core=sum((time[0] for op, time in pairs if op.core), zero),
            matmuls=sum((time[0] for op, time in pairs if op.kind in (MATMUL, ATTENTION)), zero),
            last=times[-1][0],
            launches=launches,
        )
