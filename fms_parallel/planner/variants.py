"""Layouts that a search makes of those that fit: blocks kept gathered, feed-forwards that tp leaves whole, and both.

It knows what can gain by either word; what a layout costs, it asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner import memory
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.cost import Costs
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.space import Space, kept_blocks, rejections, tp_parts

if TYPE_CHECKING:
    from fms_parallel.planner.api import Estimate, Planner

Array = NDArray[Any]

SPARE = 0.05
"""Part of the memory that blocks which stay gathered leave free."""
SHAPES = 0.05
"""Part of the computing time that products of other shapes may spare at most; a whole feed-forward has others."""


def variants(
    planner: Planner, columns: Columns, costs: Costs, fits: Array, space: Space, top: int, bar: float
) -> tuple[int, list[Estimate]]:
    """How many variants are faster than what they come from, and the fastest of them.

    `fits`: rows of `columns` that fit. `bar`: seconds of the last layout that would be shown, infinite while there are
    fewer: no feed-forward is left whole where that could not get below. Pins and `Space` may have named either word:
    it is then no variant, but in `columns`.
    """
    base = _Form(planner, columns.take(fits), costs.take(fits), np.arange(len(fits)))
    least = base.seconds.copy()
    keeps, leaves = kept_blocks(space) == [0], len(tp_parts(space)) == 1
    kept = base.keeping(space) if keeps else None
    whole = base.leaving_whole(space, bar) if leaves else None
    both = whole.keeping(space) if keeps and whole else None
    count, best = 0, []
    for form in (kept, whole, both):
        if form is None:
            continue
        # With both words a layout has to beat those with one.
        parents = least if form is both else base.seconds
        faster = np.flatnonzero(form.seconds < parents[form.rows] * (1 - 1e-6))
        least[form.rows] = np.minimum(least[form.rows], form.seconds)
        count += len(faster)
        best += form.fastest(faster, top)
    return count, best


@dataclass(frozen=True)
class _Form:
    """Layouts with their costs, and which of the rows that fitted each comes from."""

    planner: Planner
    columns: Columns
    costs: Costs
    rows: Array
    possible: Array | None = None

    @property
    def seconds(self) -> Array:
        """Of a step; infinite where a layout does not fit or cannot be."""
        seconds = self.costs.times.total
        return seconds if self.possible is None else np.where(self.possible, seconds, np.inf)

    def keeping(self, space: Space) -> _Form | None:
        """With as many blocks kept gathered as there is room for, where there is fsdp and no pipeline.

        A block that stays gathered spares a step its second gather and costs its memory, each block as much as the
        others: so the most that fit are best. A twentieth of the memory stays free, for memory is not predicted to the
        last byte.
        """
        planner, c = self.planner, self.columns
        able = np.flatnonzero((c.pp == 1) & (c.fsdp > 1) & np.isfinite(self.seconds))
        tried = c.take(able)
        block = memory.States(planner.model.shape, tried, planner.software, planner.model.experts).block()
        free = planner.cluster.device.memory_gb * GIB * (1 - SPARE) - self.costs.memory.total[able]
        # Two blocks at a time are there anyway.
        layers = planner.model.shape.layers
        kept = np.clip(free // (block * planner.software.working_bytes) + 2, min(2, layers), layers)
        return self._other(tried.with_(kept=kept.astype(np.int64)), able, space)

    def leaving_whole(self, space: Space, bar: float) -> _Form | None:
        """With feed-forwards that tp does not cut, in layouts with sp that could get below `bar` by it.

        Half of what is exchanged within tp is spared, and what products gain by other shapes; a gather that sticks out
        may be spared by blocks that stay gathered.
        """
        times = self.costs.times
        spared = times.tp / 2 + times.fsdp + SHAPES * (times.compute + times.recompute)
        able = np.flatnonzero((self.columns.sp == 1) & (self.seconds - spared < bar))
        tried = self.columns.take(able).with_(tp_parts=np.ones(len(able), dtype=np.int64))
        return self._other(tried, able, space)

    def _other(self, tried: Columns, able: Array, space: Space) -> _Form | None:
        """The same rows with other words, priced; None where there is none to price."""
        planner = self.planner
        if not len(able):
            return None
        costs = planner.costs.evaluate(tried)
        possible = costs.memory.total <= planner.cluster.device.memory_gb * GIB
        for mask in rejections(tried, planner.sizes, planner.workload.sequence, space).values():
            possible &= ~mask
        return _Form(planner, tried, costs, self.rows[able], possible)

    def fastest(self, among: Array, top: int) -> list[Estimate]:
        """Estimates of the fastest of some rows."""
        order = among[np.argsort(self.seconds[among], kind="stable")[:top]]
        return self.planner.estimates(self.columns, self.costs, order)
