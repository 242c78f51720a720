"""How much of a device's peak real kernels reach, as one formula per kind of work with few constants.

It knows kernels; it knows nothing of layouts. The constants are fitted by `calibrate`, or those of `DEFAULT`: what
A100 kernels are known to reach, chosen before anything was scored. Attention and sustained rates of H100, `ring` and
`fp8` were chosen on torchtitan's tables of December 2024; no constant was fitted to vTrain's rows or Megatron's tables.

    matrix product   flops / (peak * best * m/(m + h) * n/(n + h) * k/(k + h))
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
        best: part of the peak that a large matrix product reaches. half: m, n and k at which it reaches half of that
            each. attention: part of the peak inside fused attention. stream: part of the memory bandwidth.
        fp8: part of the fp8 peak that casts and scales leave. ring: attention in a ring of cp ranks takes
            1 + ring * log2(cp) times as long, for its shorter pieces.
        kernel_us: least time of one kernel. host_us: time of the host to start one kernel, forward pass.
        host_backward: the same in the backward pass, as a multiple (no Python between its kernels).
        micro_us: fixed time of one micro-batch on one stage. step_us: fixed time of one step.
        network: factor on every collective's time; inner: factor on those inside a node, on top.
    """

    best: float = 0.82
    half: float = 96.0
    attention: float = 0.5
    stream: float = 0.82
    fp8: float = 0.78
    ring: float = 0.1
    kernel_us: float = 4.0
    host_us: float = 7.0
    host_backward: float = 0.7
    micro_us: float = 0.0
    step_us: float = 2000.0
    network: float = 1.0
    inner: float = 1.0

    def having(self, values: Mapping[str, float]) -> Constants:
        """The same with some constants replaced.

        Raises:
            ConfigError: a constant that there is not.
        """
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown("constant", name, known))
        return replace(self, **{name: float(value) for name, value in values.items()})


DEFAULT = Constants()


def matmul_efficiency(m: Array, n: Array, k: Array, constants: Constants) -> Array:
    """Part of the peak that an (m, k) x (k, n) product reaches."""
    half = constants.half
    return constants.best * (m / (m + half)) * (n / (n + half)) * (k / (k + half))


def as_arrays(*values: Any) -> tuple[Array, ...]:
    """Numbers and arrays as float arrays of one shape."""
    return tuple(np.broadcast_arrays(*(np.asarray(value, dtype=float) for value in values)))
