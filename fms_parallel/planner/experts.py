"""Mixture-of-experts feed-forward: what routing computes in a block, and what expert parallelism exchanges.

It knows token counts; `ParallelLayout` has no word for expert parallelism yet, so `ep` is a number of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import Columns
from fms_parallel.planner.operators import MEMORY, Op, matmul, tokens_of
from fms_parallel.planner.software import Software
from fms_parallel.shape import ModelShape

Array = NDArray[Any]


@dataclass(frozen=True)
class Experts:
    """Experts of every block.

    Attributes:
        count: experts. top: of them, how many each token visits. ffn_width: F of one expert. shared: experts that every
            token visits. capacity: factor by which the fullest expert exceeds the mean. ep: shards of the experts, cut
            out of the replicas of a layout.
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

    def operators(self, shape: ModelShape, columns: Columns, sequence: int, software: Software) -> list[Op]:
        """Router, grouped products over the local experts, activation, shared experts."""
        tokens, ups, width = tokens_of(columns, sequence), 2 if shape.gated else 1, software.working_bytes
        ffn, local = self.ffn_width / columns.tp, self.count / self.ep
        routed = tokens * self.top * self.capacity
        size = routed * ffn * (ups + 1) * width
        # ep ranks send their tokens here, each holds count/ep experts: as many rows as without ep, in larger products.
        rows = routed * self.ep / self.count
        ops = [
            matmul("router", tokens, float(self.count), shape.width, width),
            matmul("experts up", rows, ups * ffn, shape.width, width, local),
            Op("experts activation", MEMORY, np.zeros_like(size), size, None, (0.0, 1.6), (2, 2)),
            matmul("experts down", rows, shape.width, ffn, width, local),
        ]
        if self.shared:
            ops.append(matmul("shared up", tokens, ups * ffn * self.shared, shape.width, width))
            ops.append(matmul("shared down", tokens, shape.width, ffn * self.shared, width))
        return ops

    def exchanged_bytes(self, shape: ModelShape, columns: Columns, sequence: int, software: Software) -> Array:
        """Bytes of one all-to-all of one block over all its ep ranks; two in the forward pass, two in the backward."""
        tokens = tokens_of(columns, sequence)
        return np.asarray(tokens * self.top * self.capacity * shape.width * software.working_bytes * self.ep)
