"""CUDA graphs of compiled pieces: all kernels of a piece, recorded once, are launched by one call.

    call     x --copied--> x of the record     replay     results of the record: read before the next call

A graph remembers addresses. Parameters stay where they are; what differs from call to call is copied to where it was
when the graph was recorded. A piece of one layer is recorded for that layer, with one pool of memory for all layers.
It knows functions of tensors; it knows no blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Recorded = tuple[Callable[[], object], Any]
"""What does everything again, and where it leaves its results."""

WARM_UPS = 3
"""Calls before the record: libraries choose kernels and take their workspaces at first."""


class Graphs:
    """Records functions; their graphs share memory, and must not run at the same time.

    Args:
        record: for a function of nothing, what it does as a graph.
    """

    def __init__(self, record: Callable[[Callable[[], Any]], Recorded] | None = None) -> None:
        self._record = record or self._record_on_device
        self._pool: Any = None

    def of(self, function: Function, given: Sequence[Tensor], fixed: Sequence[Tensor]) -> Function:
        """The same function for tensors like `given`, of which those that are `fixed` are the same in every call.

        Its results are valid until its next call.
        """
        known = {id(tensor) for tensor in fixed}
        places = [place for place, tensor in enumerate(given) if id(tensor) not in known]
        held = [tensor.clone() if place in places else tensor for place, tensor in enumerate(given)]
        replay, results = self._record(lambda: function(*held))

        def graphed(*tensors: Tensor) -> Any:
            for place in places:
                held[place].copy_(tensors[place])
            replay()
            return results

        return graphed

    def _record_on_device(self, function: Callable[[], Any]) -> Recorded:
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            results = function()
        self._pool = self._pool or graph.pool()
        return graph.replay, results
