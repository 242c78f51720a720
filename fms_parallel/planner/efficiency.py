"""How much of a device's peak real kernels reach, as one formula per kind of work with few constants.

It knows kernels; it knows nothing of layouts. The constants are fitted by `calibrate`, or those of `DEFAULT`: what
A100 kernels are known to reach, chosen before anything was scored; `wave` follows from the number of cores. Attention
and sustained rates of H100, `ring` and `fp8` were chosen on torchtitan's tables of December 2024; no constant was
fitted to vTrain's rows or Megatron's tables.

    matrix product   flops / (peak * best * area/(area + wave) * k/(k + half)),  area = m * n
    memory           bytes / (bandwidth * stream)
    any kernel       at least `kernel`; and a pass at least `launches * host`, for the host that starts its kernels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown

Array = NDArray[Any]


@dataclass(frozen=True)
class Constants:
    """The numbers of the formulas above.

    Attributes:
        best: part of the peak that a large matrix product reaches. half: k at which it reaches half of that. wave: what
            the last, partly idle wave of a product wastes, in elements of its result: half of what all cores of the
            device make at once in tiles of 128 x 256. Kernels with smaller tiles (`TILES`) waste less and are slower.
            attention: part of the peak inside fused attention. stream: part of the memory bandwidth.
        fp8: part of the fp8 peak that casts and scales leave. ring: attention in a ring of cp ranks takes
            1 + ring * log2(cp) times as long, for its shorter pieces.
        kernel_us: least time of one kernel. host_us: time of the host to start one kernel, forward pass.
        host_backward: the same in the backward pass, as a multiple (no Python between its kernels).
        hidden: part of the host's time that hides behind kernels; none where one processor is both.
        update: an optimizer's step, with clipping, as a multiple of one pass over its bytes.
        copy_ns: of a byte that moves between parameters or gradients and the buffer of their collective, where nothing
            hides that.
        micro_us: fixed time of one micro-batch on one stage. step_us: fixed time of one step.
        idle: part of a pipeline's idle time that is lost; ranks that share cores leave theirs to the others.
        overlap: part of what software hides behind computation that is hidden; none where processors move the bytes.
        network: factor on every collective's time; inner: factor on those inside a node, on top.
    """

    best: float = 0.82
    half: float = 96.0
    wave: float = 0.5 * 108 * 128 * 256
    attention: float = 0.5
    stream: float = 0.82
    fp8: float = 0.78
    ring: float = 0.1
    kernel_us: float = 4.0
    host_us: float = 7.0
    host_backward: float = 0.7
    hidden: float = 1.0
    update: float = 1.0
    copy_ns: float = 0.0
    micro_us: float = 0.0
    step_us: float = 2000.0
    idle: float = 1.0
    overlap: float = 1.0
    network: float = 1.0
    inner: float = 1.0

    def having(self, values: Mapping[str, float]) -> Constants:
        """The same with some constants replaced.

        Raises:
            ConfigError: a constant that there is not, or a value that is no number >= 0.
        """
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown("constant", name, known))
            if isinstance(values[name], bool) or not isinstance(values[name], (int, float)) or not values[name] >= 0:
                raise ConfigError(f"constant {name}={values[name]!r}: needs a number >= 0.")
        return replace(self, **{name: float(value) for name, value in values.items()})


DEFAULT = Constants()

TILES = ((1.0, 1.0), (0.5, 0.92), (0.125, 0.72))
"""Size of a kernel's tile as a part of the largest, and its speed: 128 x 256, 128 x 128, 64 x 64."""


def matmul_efficiency(m: Array, n: Array, k: Array, constants: Constants) -> Array:
    """Part of the peak that an (m, k) x (k, n) product reaches."""
    area = m * n
    filled = [speed * area / (area + constants.wave * size) for size, speed in TILES if constants.wave or size == 1]
    return constants.best * np.maximum.reduce(filled) * (k / (k + constants.half))


def as_arrays(*values: Any) -> tuple[Array, ...]:
    """Numbers and arrays as float arrays of one shape."""
    return tuple(np.broadcast_arrays(*(np.asarray(value, dtype=float) for value in values)))
