"""`plan`: from a model, a cluster and a workload to a ranked list of layouts. What `fms-plan search` prints.

It composes space, cost and ranking; it knows no formula of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import filed, mixed, schedule
from fms_parallel.planner.catalog import Model, find_model
from fms_parallel.planner.columns import SCHEDULES, Columns
from fms_parallel.planner.cost import CostModel, Costs
from fms_parallel.planner.efficiency import DEFAULT, Constants
from fms_parallel.planner.hardware import GIB, Cluster, Device
from fms_parallel.planner.operators import Workload
from fms_parallel.planner.simulate import Stages
from fms_parallel.planner.software import Software, load_software
from fms_parallel.planner.space import Space, candidates, rejections
from fms_parallel.planner.variants import variants
from fms_parallel.shape import ModelShape

Array = NDArray[Any]

TOO_LARGE = "does not fit in memory"
TOO_SLOW = "slower than --deadline and --budget allow"
CHUNK = 1 << 16
"""Layouts that are priced at once: arrays of this length stay in the cache."""


@dataclass(frozen=True)
class Estimate:
    """What a layout is predicted to do.

    Attributes:
        layout: what `get_model` and `train_causal.py` take. micro_batch: sequences of one micro-batch of one replica.
        micro_batches: of one replica in a step; without a pipeline these are gradient accumulation.
        step_time_s: seconds of one step. throughput: sequences per second. memory_gb: 2^30 bytes of the fullest rank.
        margin: free part of a device's memory. mfu: model FLOPs over peak. dollars_per_hour: of the whole cluster.
        breakdown: seconds of a step by purpose, they add up. memory_breakdown: 2^30 bytes by purpose.
    """

    layout: ParallelLayout
    micro_batch: int
    micro_batches: int
    step_time_s: float
    throughput: float
    tokens_per_s_per_gpu: float
    mfu: float
    memory_gb: float
    margin: float
    dollars_per_hour: float
    breakdown: Mapping[str, float]
    memory_breakdown: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values, the layout as its string."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "layout": str(self.layout), "layout_fields": _layout_fields(self.layout)}


def _layout_fields(layout: ParallelLayout) -> dict[str, Any]:
    fields_: dict[str, Any] = json.loads(layout.to_json())
    return fields_


@dataclass(frozen=True)
class Result:
    """A search: how many layouts were looked at, how many would run, why others would not, and the best."""

    model: Model
    cluster: Cluster
    workload: Workload
    considered: int
    feasible: int
    seconds: float
    rejected: Mapping[str, int]
    results: list[Estimate]
    examples: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `fms-plan search --json` prints."""
        return {
            "model": self.model.name,
            "cluster": str(self.cluster),
            "global_batch": self.workload.global_batch,
            "sequence": self.workload.sequence,
            "configurations_considered": self.considered,
            "feasible": self.feasible,
            "seconds": self.seconds,
            "rejected": dict(self.rejected),
            "rejected_examples": dict(self.examples),
            "results": [estimate.as_json() for estimate in self.results],
        }


@dataclass(frozen=True)
class Planner:
    """A cost model for one model on one cluster, with what turns its columns into estimates.

    `constants` are those of the cluster's slowest mixture; `base` those before any device's own.
    """

    model: Model
    cluster: Cluster
    workload: Workload
    software: Software
    constants: Constants = DEFAULT
    base: Constants = DEFAULT

    @classmethod
    def of(
        cls,
        model: Model | str,
        cluster: Cluster | str,
        workload: Workload,
        software: Software | str = "native",
        constants: Constants = DEFAULT,
    ) -> Planner:
        """Names are looked up; constants of the device's file count over `constants`."""
        model = find_model(model) if isinstance(model, str) else model
        cluster = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
        software = load_software(software) if isinstance(software, str) else software
        own = constants.having(cluster.device.constants)
        return cls(model, cluster, workload, software.with_precision(workload.precision), own, constants)

    def constants_of(self, device: Device) -> Constants:
        """The constants of one kind of device of the cluster."""
        return self.base.having(device.constants)

    @property
    def sizes(self) -> ModelShape:
        """What layouts are checked against."""
        experts = self.model.experts
        return self.model.shape if experts is None else replace(self.model.shape, experts=experts.count)

    @property
    def costs(self) -> CostModel:
        """The cost model."""
        return CostModel(
            self.model.shape, self.cluster.device, self.workload, self.software, self.constants, self.model.experts
        )

    def estimates(self, columns: Columns, costs: Costs, rows: Array) -> list[Estimate]:
        """Estimates of some rows."""
        return [self._estimate(columns, costs, int(row)) for row in rows]

    def _estimate(self, columns: Columns, costs: Costs, row: int) -> Estimate:
        workload, gpus = self.workload, self.cluster.gpus
        seconds = float(costs.times.total[row])
        used = float(costs.memory.total[row])
        flops = self.model.flops_per_token(workload.sequence) * workload.global_batch * workload.sequence
        return Estimate(
            layout=columns.layout(row, layout_precision(workload.precision), self._split(columns, costs, row)),
            micro_batch=int(columns.micro[row]),
            micro_batches=int(columns.count[row]),
            step_time_s=seconds,
            throughput=workload.global_batch / seconds,
            tokens_per_s_per_gpu=workload.global_batch * workload.sequence / seconds / gpus,
            mfu=flops / seconds / gpus / (self.cluster.device.peak(workload.precision) / self.cluster.device.sustained),
            memory_gb=used / GIB,
            margin=1 - used / (self.cluster.device.memory_gb * GIB),
            dollars_per_hour=self.cluster.price_per_hour,
            breakdown={f.name: float(getattr(costs.times, f.name)[row]) for f in fields(costs.times)},
            memory_breakdown={f.name: float(getattr(costs.memory, f.name)[row]) / GIB for f in fields(costs.memory)},
        )

    def _split(self, columns: Columns, costs: Costs, row: int) -> tuple[int, ...] | None:
        stages = int(columns.pp[row] * columns.virtual[row])
        if columns.pp[row] == 1:
            return None
        split = schedule.stage_split(
            self.model.shape.layers, int(costs.most[row]), int(costs.last[row]), int(costs.full[row]), stages
        )
        return None if len(set(split)) == 1 else split

    def stages(self, layout: ParallelLayout) -> Stages:
        """Seconds of every stage of a layout, for the event simulator."""
        layout.validate(self.sizes)
        columns = Columns.of_layout(filed.named(layout), self.workload.global_batch)
        if layout.stage_split is not None and (found := mixed.stages(self, columns, layout.stage_split)) is not None:
            return found
        pieces = self.costs.pieces(columns)
        split = self.split(layout)
        count = len(split)
        forward = [blocks * pieces["forward"] for blocks in split]
        backward = [blocks * pieces["backward"] for blocks in split]
        for index, name in ((0, "embedding"), (count - 1, "head")):
            forward[index] += pieces[f"{name}_forward"]
            backward[index] += pieces[f"{name}_backward"]
        weight = [blocks * pieces["weight"] for blocks in split]
        return Stages(forward, backward, weight, pieces["hop"])

    def split(self, layout: ParallelLayout) -> tuple[int, ...]:
        """Blocks of each stage: those of the layout, or as even as they come."""
        if layout.stage_split is not None:
            return layout.stage_split
        most, rest = divmod(self.model.shape.layers, layout.stages)
        return tuple(most + (index < rest) for index in range(layout.stages))

    def estimate_columns(self, columns: Columns) -> Estimate:
        """The estimate of the first row."""
        return self._estimate(columns, self.costs.evaluate(columns), 0)

    def estimate(self, layout: ParallelLayout, micro_batch: int | None = None) -> Estimate:
        """One layout; without a pipeline `micro_batch` says how its share of the batch is accumulated.

        Raises:
            LayoutError: a layout that the model cannot have. ConfigError: a batch that does not divide.
        """
        layout.validate(self.sizes)
        share = self.workload.global_batch // layout.data_parallel
        pieces = layout.data_parallel * layout.pieces
        if self.workload.global_batch % pieces:
            raise ConfigError(
                f"{self.workload.global_batch} sequences do not divide over {layout.data_parallel} replicas with "
                f"{layout.pieces} micro-batches each: use a multiple of {pieces}."
            )
        if layout.schedule not in SCHEDULES:
            return filed.estimate(self, layout)
        columns = Columns.of_layout(layout, self.workload.global_batch)
        if layout.pp == 1 and micro_batch is not None:
            if micro_batch < 1 or share % micro_batch:
                raise ConfigError(
                    f"micro-batches of {micro_batch}: {share} sequences of each replica do not divide into them: use a "
                    f"divisor of {share}."
                )
            columns = columns.with_(micro=np.array([micro_batch]), count=np.array([share // micro_batch]))
        found = mixed.estimate(self, columns, layout.stage_split)
        if found is not None:
            return found
        found = self.estimate_columns(columns)
        return found if layout.stage_split is None else replace(found, layout=layout)


def layout_precision(precision: str) -> str:
    """The precision that a layout has a word for."""
    return "bf16" if precision == "fp8" else precision


def plan(
    model: Model | str,
    cluster: Cluster | str,
    workload: Workload,
    *,
    space: Space | None = None,
    top: int = 10,
    software: Software | str = "native",
    constants: Constants = DEFAULT,
) -> list[Estimate]:
    """The best layouts, fastest first; see `search`, which also says what was rejected and why."""
    return search(model, cluster, workload, space=space, top=top, software=software, constants=constants).results


def search(
    model: Model | str,
    cluster: Cluster | str,
    workload: Workload,
    *,
    space: Space | None = None,
    top: int = 10,
    software: Software | str = "native",
    constants: Constants = DEFAULT,
) -> Result:
    """Price every layout of the space and keep the fastest that fit.

    Raises:
        ConfigError: an unknown model, GPU, software or pin.
    """
    return search_with(Planner.of(model, cluster, workload, software, constants), space or Space(), top)


def search_with(planner: Planner, space: Space, top: int, step_limit: float | None = None) -> Result:
    """The same for a planner that is there already; `step_limit`: seconds that a step may take."""
    began = time.perf_counter()
    workload = planner.workload
    everything = candidates(planner.cluster.gpus, workload.global_batch, space)
    alive, counts, examples = _apply_rules(planner, everything, space)
    columns = everything.take(alive)
    best: list[tuple[float, Estimate]] = []
    fitting = more = 0
    most = np.inf if step_limit is None else step_limit
    limit = planner.cluster.device.memory_gb * GIB
    for start in range(0, len(columns), CHUNK):
        part = columns.take(slice(start, start + CHUNK))
        costs = planner.costs.evaluate(part)
        used, seconds = costs.memory.total, costs.times.total
        slow = (used <= limit) & (seconds > most)
        fits = np.flatnonzero((used <= limit) & ~slow)
        fitting += len(fits)
        _note(counts, examples, TOO_LARGE, part, used > limit)
        _note(counts, examples, TOO_SLOW, part, slow)
        order = fits[np.argsort(seconds[fits], kind="stable")[:top]]
        best += [(e.step_time_s, e) for e in planner.estimates(part, costs, order)]
        bar = sorted(time for time, _ in best)[top - 1] if len(best) >= top else np.inf
        count, faster = variants(planner, part, costs, fits, space, top, bar)
        more += count
        best += [(e.step_time_s, e) for e in faster]
    if len(planner.cluster.groups) > 1:
        best += [(e.step_time_s, e) for e in mixed.estimates(planner, columns, top) if e.step_time_s <= most]
    best.sort(key=lambda pair: pair[0])
    results = [estimate for _, estimate in best[:top]]
    spent = time.perf_counter() - began
    looked, fitting = len(everything) + more, fitting + more
    return Result(planner.model, planner.cluster, workload, looked, fitting, spent, counts, results, examples)


def _apply_rules(planner: Planner, columns: Columns, space: Space) -> tuple[Array, dict[str, int], dict[str, str]]:
    alive = np.ones(len(columns), dtype=bool)
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for reason, mask in rejections(columns, planner.sizes, planner.workload.sequence, space).items():
        _note(counts, examples, reason, columns, alive & mask)
        alive &= ~mask
    return np.flatnonzero(alive), counts, examples


def _note(counts: dict[str, int], examples: dict[str, str], reason: str, columns: Columns, mask: Array) -> None:
    number = int(np.count_nonzero(mask))
    if number:
        counts[reason] = counts.get(reason, 0) + number
        if reason not in examples:
            examples[reason] = str(columns.layout(int(np.argmax(mask)), "bf16"))
