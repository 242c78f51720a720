"""Mixture-of-experts feed-forward: what routing adds to a block, and what expert parallelism exchanges.

It knows token counts; `ParallelLayout` has no word for expert parallelism yet, so `ep` is a number of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fms_parallel.planner.columns import Columns
    from fms_parallel.planner.operators import Op
    from fms_parallel.planner.software import Software
    from fms_parallel.shape import ModelShape

Array = NDArray[Any]


@dataclass(frozen=True)
class Experts:
    """Experts of every block.

    Attributes:
        count: experts. top: of them, how many each token visits. ffn_width: F of one expert. shared: experts that every
            token visits. capacity: factor by which the fullest expert exceeds the mean. ep: shards of the experts.
    """

    count: int
    top: int
    ffn_width: int
    shared: int = 0
    capacity: float = 1.1
    ep: int = 1

    def parameters(self, shape: ModelShape) -> int:
        """Parameters of all experts and the router of one block."""
        matrices = 3 if shape.gated else 2
        return (self.count + self.shared) * matrices * shape.width * self.ffn_width + shape.width * self.count

    def operators(self, shape: ModelShape, tokens: Array, columns: Columns, software: Software) -> list[Op]:
        """Router, grouped products over the local experts, activation, shared experts."""
        from fms_parallel.planner.operators import MEMORY, Op, matmul

        ups, width = 2 if shape.gated else 1, software.working_bytes
        ffn = self.ffn_width / columns.tp
        local = self.count / self.ep
        rows = tokens * self.top * self.capacity / local
        routed = tokens * self.top * self.capacity * ffn * (ups + 1) * width
        ops = [
            matmul("router", tokens, float(self.count), shape.width, width),
            matmul("experts up", rows, ups * ffn, shape.width, width, local),
            Op("experts activation", MEMORY, np.zeros_like(routed), routed, None, (0.0, 1.6), (2, 2)),
            matmul("experts down", rows, shape.width, ffn, width, local),
        ]
        if self.shared:
            ops.append(matmul("shared up", tokens, ups * ffn * self.shared, shape.width, width))
            ops.append(matmul("shared down", tokens, shape.width, ffn * self.shared, width))
        return ops

    def exchanged_bytes(self, shape: ModelShape, tokens: Array, software: Software) -> Array:
        """Bytes that all ranks together send in one all-to-all of a block, times ep ranks (the gathered size)."""
        return np.asarray(tokens * self.top * self.capacity * shape.width * software.working_bytes * self.ep)
