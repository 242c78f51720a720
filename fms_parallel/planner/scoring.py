"""How good predictions are, in four numbers, and predicting every case of a measured table.

It knows relative errors; it fits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import SCHEDULES, Columns
from fms_parallel.planner.cost import CostModel
from fms_parallel.planner.efficiency import DEFAULT, Constants
from fms_parallel.planner.hardware import GIB, Device
from fms_parallel.planner.measured import Case, Collective
from fms_parallel.planner.operators import Workload
from fms_parallel.planner.software import Software, load_software
from fms_parallel.planner.topology import Group, Network

Array = NDArray[Any]


@dataclass(frozen=True)
class Score:
    """Errors of predictions relative to measurements.

    Attributes:
        n: rows. mape: mean of absolute relative errors. signed_median: median of the relative errors. p90: nine of ten
            absolute errors are below. spearman: rank correlation, None for fewer than three rows.
    """

    n: int
    mape: float
    signed_median: float
    p90: float
    spearman: float | None

    @classmethod
    def of(cls, predicted: Array, measured: Array) -> Score:
        """Score of two arrays of one length."""
        error = predicted / measured - 1
        size = np.abs(error)
        rank = _spearman(predicted, measured) if len(error) > 2 else None
        return cls(len(error), float(size.mean()), float(np.median(error)), float(np.quantile(size, 0.9)), rank)


def _spearman(a: Array, b: Array) -> float | None:
    ranks = [_ranks(x) for x in (a, b)]
    spread = [r.std() for r in ranks]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if min(spread) > 0 else None


def _ranks(values: Array) -> Array:
    """Ranks, equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = (last - (counts - 1) / 2)[inverse]
    return mean


@dataclass(frozen=True)
class Predictions:
    """Seconds and memory of every case, in order; memory in 2^30 bytes, `fits` against the device."""

    seconds: Array
    memory_gb: Array
    fits: Array


@dataclass(frozen=True)
class Predictor:
    """Predicts cases with the default constants, or with fitted ones."""

    devices: Mapping[str, Device]
    constants: Constants = DEFAULT

    def predict(self, cases: Sequence[Case]) -> Predictions:
        """Cases that share model, device and software are priced together."""
        seconds, used = np.zeros(len(cases)), np.zeros(len(cases))
        fits = np.zeros(len(cases), dtype=bool)
        for rows in _alike(cases).values():
            device = self.devices[cases[rows[0]].device]
            for row, (time, memory) in zip(rows, self._together([cases[i] for i in rows], device), strict=True):
                seconds[row], used[row] = time, memory
                fits[row] = memory <= device.memory_gb
        return Predictions(seconds, used, fits)

    def _together(self, cases: Sequence[Case], device: Device) -> list[tuple[float, float]]:
        options = [list(_options(case)) for case in cases]
        model = self.model(cases[0], device)
        costs = model.evaluate(Columns.of([row for rows in options for row in rows]))
        seconds, memory = costs.times.total, costs.memory.total / GIB
        found, start = [], 0
        for rows in options:
            part = slice(start, start + len(rows))
            start += len(rows)
            possible = np.where(memory[part] <= device.memory_gb, seconds[part], np.inf)
            best = int(np.argmin(possible if np.isfinite(possible).any() else seconds[part]))
            found.append((float(seconds[part][best]), float(memory[part][best])))
        return found

    def model(self, case: Case, device: Device) -> CostModel:
        """The cost model of one case; stages are even, as the published ones are."""
        software: Software = load_software(case.software).with_precision(case.precision)
        workload = Workload(case.global_batch, case.sequence, case.precision)
        constants = self.constants.having(device.constants) if self.constants is DEFAULT else self.constants
        return CostModel(case.shape, device, workload, software, constants, uneven=False)


def _alike(cases: Sequence[Case]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, case in enumerate(cases):
        key = (case.shape, case.device, case.software, case.precision, case.sequence)
        groups.setdefault(key, []).append(index)
    return groups


def _options(case: Case) -> Iterable[dict[str, int]]:
    """Rows of columns: the settings with every combination of what was not published."""
    for values in product(*case.unknown.values()):
        row = {**case.settings, **dict(zip(case.unknown, values, strict=True))}
        row.setdefault("count", case.global_batch // (row.get("dp", 1) * row.get("fsdp", 1)) // row["micro"])
        if row.get("virtual", 1) > 1:
            if row["count"] % row["pp"]:
                continue
            row.setdefault("schedule", SCHEDULES.index("interleaved1f1b"))
        yield row


def predict_collectives(rows: Sequence[Collective], device: Device) -> Array:
    """Seconds of measured collectives on a device's network."""
    network = Network.of(device)
    return np.array(
        [
            float(network.seconds(r.operation, r.size, Group(np.array(r.nodes * r.inside), np.array(r.inside))))
            for r in rows
        ]
    )


def with_links(device: Device, **factors: float) -> Device:
    """A device whose links are faster by a factor: `intra` or `inter`."""
    changed = {
        name: replace(getattr(device, name), gb_s=getattr(device, name).gb_s * factor)
        for name, factor in factors.items()
    }
    return replace(device, **changed)
