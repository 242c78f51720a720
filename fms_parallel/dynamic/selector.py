"""`DynamicStrategySelector`: the layouts that a job could have, what each would take now, and which one to have.

The planner prices, on the measured hardware and with the slowness that was measured since; a policy decides. It knows
sizes, devices and measurements; it changes nothing and talks to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fms_parallel.dynamic.policy import Arm, Learner, Policy, Situation, Verdict, get_policy
from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.fit import check_fit
from fms_parallel.layout import AXES, ParallelLayout
from fms_parallel.phases import Work
from fms_parallel.planner import mixed
from fms_parallel.planner.api import Estimate, Planner, search_with
from fms_parallel.planner.catalog import Model
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.hardware import Cluster, Device
from fms_parallel.planner.machine import TRIED
from fms_parallel.planner.operators import Workload
from fms_parallel.planner.space import Space
from fms_parallel.shape import ModelShape

TIMES = ("tflops", "vector_tflops", "memory_gb_s")
OVERHEADS = ("kernel_us", "host_us")

Runs = Callable[[ParallelLayout], None]
"""Raises an error of this library for a layout that the model cannot run in."""


@dataclass(frozen=True)
class Candidate:
    """A layout and what the planner expects of it now: seconds of a step, 2^30 bytes of the fullest rank."""

    layout: ParallelLayout
    seconds: float
    memory_gb: float
    reserve_gb: float = 0.0
    """Part of the memory that is there whatever the layout."""

    @property
    def arm(self) -> Arm:
        """As policies see it."""
        words = [f"{axis}={getattr(self.layout, axis)}" for axis in AXES if getattr(self.layout, axis) > 1]
        return Arm(str(self.layout), self.seconds, tuple(words))


class DynamicStrategySelector:
    """Chooses layouts for one model on one cluster.

    Args:
        cluster: of exactly the job's ranks. shape: of the model. precision: of every layout.
        policy: `knowledge`, `thompson`, `rules`, or an object of one's own. runs: refuses what strategies cannot do.
        layouts: the only ones to choose from; None: the fastest `most` of the planner's, one for each set of degrees.
        micro_batches: a rank's share of a step is accumulated in so many pieces. space: what the planner may use.
    """

    def __init__(
        self,
        cluster: Cluster,
        shape: ModelShape,
        *,
        precision: str = "fp32",
        policy: str | Policy = "knowledge",
        runs: Runs | None = None,
        layouts: Sequence[str | ParallelLayout] | None = None,
        micro_batches: int = 1,
        most: int = 8,
        space: Space | None = None,
    ) -> None:
        self.cluster, self.shape, self.precision = cluster, shape, precision
        self.policy, self.runs, self.most = get_policy(policy), runs or shape_allows(shape), most
        self.micro_batches, self.space = micro_batches, space or Space()
        self.given = None if layouts is None else [self._resolved(layout) for layout in layouts]
        self.refused: dict[ParallelLayout, int] = {}
        self.calibration: float | None = None
        self._found: dict[Work, list[Candidate]] = {}

    # ---- what there is ------------------------------------------------------------------------------------------

    def initial(self, work: Work) -> Candidate:
        """The layout to start in: the planner's fastest that fits and can be run.

        Raises:
            ConfigError: there is none.
        """
        return min(self.candidates(work), key=lambda candidate: candidate.seconds)

    def candidates(
        self, work: Work, current: ParallelLayout | None = None, slowness: Sequence[float] = ()
    ) -> list[Candidate]:
        """What the job could have: those found, the current one, and pipelines re-split for ranks that are slow now.

        Args:
            slowness: seconds of a block over those of the fastest rank, for each rank; empty: all alike.
        Raises:
            ConfigError: no layout fits.
        """
        found = [one.layout for one in self._search(work)]
        if current is not None and current not in found:
            found.append(current)
        if current is not None and current.stage_split is not None and not _uneven(slowness):
            found.append(replace(current, stage_split=None))
        if _uneven(slowness):
            found += [split for one in list(found) if (split := self.resplit(one, work, slowness)) is not None]
        priced = [self.priced(layout, work, slowness) for layout in dict.fromkeys(found)]
        return [one for one in priced if one is not None and (one.layout == current or self._proposable(one))]

    def _fits(self, candidate: Candidate) -> bool:
        return candidate.memory_gb <= self.cluster.device.memory_gb

    def _proposable(self, candidate: Candidate) -> bool:
        return self._fits(candidate) and self.refused.get(candidate.layout, 0) < 2

    def _search(self, work: Work) -> list[Candidate]:
        """The layouts for this work when all ranks are alike, fastest first."""
        if work not in self._found:
            if self.given is not None:
                priced = [self.priced(layout, work) for layout in self.given]
                usable = [one for one in priced if one is not None and self._fits(one)]
            else:
                usable = self._planned(work)
            if not usable:
                raise ConfigError(
                    f"no layout of {self.cluster.gpus} ranks fits {work.batch_size} rows of {work.seq_len} tokens: "
                    "use more ranks, a smaller batch, or more micro_batches."
                )
            self._found[work] = sorted(usable, key=lambda one: one.seconds)
        return self._found[work]

    def _planned(self, work: Work) -> list[Candidate]:
        """The planner's, one for each set of degrees: policies within one differ little, and trials are dear."""
        best: dict[tuple[int, ...], Candidate] = {}
        for estimate in search_with(self._planner(work), self.space, TRIED).results:
            if estimate.layout.degrees in best or (estimate.layout.pp == 1 and estimate.micro_batches > 1):
                continue
            layout = replace(estimate.layout, precision=self.precision)
            if self.can_run(layout, work):
                best[layout.degrees] = self._candidate(layout, estimate)
            if len(best) == self.most:
                break
        return list(best.values())

    def less_memory(self, work: Work, current: ParallelLayout) -> list[Candidate]:
        """Layouts that need at most 85 % of what the current one does, fastest first."""
        here = self.priced(current, work)
        if here is None:
            return []
        own = [
            replace(current, recompute=word) for word in ("every=2", "selective", "full") if current.recompute == "none"
        ]
        found = [one for layout in own if (one := self.priced(layout, work)) is not None]
        for estimate in search_with(self._planner(work), self.space, TRIED).results:
            layout = replace(estimate.layout, precision=self.precision)
            if (layout.pp > 1 or estimate.micro_batches == 1) and self.can_run(layout, work):
                found.append(self._candidate(layout, estimate))
        usable = [one for one in found if self.refused.get(one.layout, 0) < 2]
        most = here.reserve_gb + 0.85 * (here.memory_gb - here.reserve_gb)
        return sorted((one for one in usable if one.memory_gb <= most), key=lambda one: one.seconds)

    def calibrate(self, layout: ParallelLayout, work: Work, seconds: float) -> float | None:
        """Learn once how fast the job's devices are, from the measured seconds of a block, forward and backward.

        Returns:
            measured over predicted; None where a block's time is not computation alone (tp, cp, recomputation), or
            known already.
        """
        if self.calibration is not None or layout.tp * layout.cp > 1 or layout.recompute != "none" or seconds <= 0:
            return None
        planner = self._planner(work)
        found = planner.costs.pieces(Columns.of_layout(layout, planner.workload.global_batch))
        self._slow_down(seconds / (found["forward"] + found["backward"]))
        return self.calibration

    def _slow_down(self, factor: float) -> None:
        self.calibration = factor
        self.cluster = Cluster(
            tuple((slower(device, factor, "measured"), count) for device, count in self.cluster.groups)
        )
        self._found.clear()

    def learned(self) -> dict[str, Any]:
        """What a run in the same place may know again, as JSON values."""
        known = self.policy.learned() if isinstance(self.policy, Learner) else None
        refused = {layout.to_json(): times for layout, times in self.refused.items()}
        kind = type(self.policy).__name__
        return {"calibration": self.calibration, "refused": refused, "policy": {"kind": kind, "learned": known}}

    def recall(self, values: dict[str, Any]) -> None:
        """Know it again; what another policy learned is left."""
        if values["calibration"] is not None:
            self._slow_down(values["calibration"])
        self.refused = {ParallelLayout.from_json(layout): times for layout, times in values["refused"].items()}
        told = values["policy"]
        if told["kind"] == type(self.policy).__name__ and isinstance(self.policy, Learner):
            self.policy.recall(told["learned"])

    # ---- what it takes ------------------------------------------------------------------------------------------

    def priced(self, layout: ParallelLayout, work: Work, slowness: Sequence[float] = ()) -> Candidate | None:
        """One layout; None when it cannot be run with this work."""
        if not self.can_run(layout, work):
            return None
        planner = self._planner(work, self._slowed(layout, slowness))
        asked = replace(layout, precision=planner.workload.precision)
        if layout.pp > 1 and layout.schedule == "1f1b" and layout.stage_split is None:
            # Even and uneven pipelines by one formula, so that their difference is one of blocks.
            each, rest = divmod(self.shape.layers, layout.stages)
            asked = replace(asked, stage_split=tuple(each + (index < rest) for index in range(layout.stages)))
        try:
            return self._candidate(layout, planner.estimate(asked))
        except FmsError:
            return None

    def resplit(self, layout: ParallelLayout, work: Work, slowness: Sequence[float]) -> ParallelLayout | None:
        """The same stages under 1F1B, each with as many blocks as its ranks are fast; None where there are none."""
        if layout.pp == 1:
            return None
        words = {} if layout.schedule == "1f1b" else {"schedule": "1f1b", "virtual_stages": 1}
        even = replace(layout, stage_split=None, microbatches=layout.pieces, **words)  # type: ignore[arg-type]
        planner = self._planner(work, self._slowed(even, slowness))
        row = Columns.of_layout(even, planner.workload.global_batch)
        found = mixed.estimate(planner, row, None)
        return None if found is None else replace(even, stage_split=found.layout.stage_split)

    def _candidate(self, layout: ParallelLayout, estimate: Estimate) -> Candidate:
        reserve = estimate.memory_breakdown["reserve"]
        return Candidate(layout, estimate.step_time_s * self.micro_batches, estimate.memory_gb, reserve)

    def can_run(self, layout: ParallelLayout, work: Work) -> bool:
        """Whether model and rows can be cut this way."""
        pieces = layout.data_parallel * self.micro_batches * (layout.pieces if layout.pp > 1 else 1)
        if work.batch_size % pieces or (layout.cp > 1 and work.seq_len % (2 * layout.cp)):
            return False
        try:
            self.runs(layout)
        except FmsError:
            return False
        return True

    def _planner(self, work: Work, cluster: Cluster | None = None) -> Planner:
        cluster = cluster or self.cluster
        # A device that does not say how fast it is in fp64 is ranked by fp32: the order is what counts.
        precision = self.precision if self.precision in cluster.device.tflops else "fp32"
        workload = Workload(work.batch_size // self.micro_batches, work.seq_len, precision)
        return Planner.of(Model.of("job", self.shape), cluster, workload)

    def _slowed(self, layout: ParallelLayout, slowness: Sequence[float]) -> Cluster:
        """The cluster with slow devices: one group for each stage, because a stage waits for its slowest rank."""
        if not _uneven(slowness):
            return self.cluster
        per_stage = len(slowness) // layout.pp
        device = self.cluster.device
        slow = [max(slowness[i : i + per_stage]) for i in range(0, len(slowness), per_stage)]
        return Cluster(tuple((slower(device, factor, stage), per_stage) for stage, factor in enumerate(slow)))

    def _resolved(self, layout: str | ParallelLayout) -> ParallelLayout:
        found = ParallelLayout.parse(layout).resolve(self.cluster.gpus)
        return replace(found, precision=self.precision)

    # ---- which one ----------------------------------------------------------------------------------------------

    def decide(
        self,
        candidates: Sequence[Candidate],
        current: ParallelLayout,
        cost: Callable[[ParallelLayout], float],
        **now: Any,
    ) -> tuple[ParallelLayout, Verdict]:
        """The layout that the policy goes on in, and why.

        Args:
            candidates: of `candidates`. cost: seconds of a change to a layout. now: of `Situation`.
        """
        layouts = {str(one.layout): one.layout for one in candidates}
        arms = tuple(one.arm for one in candidates)
        situation = Situation(str(current), arms, cost=lambda name: cost(layouts[name]), **now)
        verdict = self.policy.decide(situation)
        return layouts[verdict.arm], verdict


def shape_allows(shape: ModelShape) -> Runs:
    """What the sizes alone refuse."""
    return lambda layout: check_fit(layout, shape)


def slower(device: Device, factor: float, word: object) -> Device:
    """A device that takes `factor` times as long for everything but talking."""
    rates: dict[str, Any] = {name: getattr(device, name) for name in TIMES}
    rates["tflops"] = {precision: peak / factor for precision, peak in device.tflops.items()}
    rates |= {name: rates[name] / factor for name in TIMES[1:]}
    constants = {name: value * (factor if name in OVERHEADS else 1.0) for name, value in device.constants.items()}
    return replace(device, name=f"{device.name}/{word}", constants=constants, **rates)


def _uneven(slowness: Sequence[float]) -> bool:
    return bool(slowness) and max(slowness) > 1.0
