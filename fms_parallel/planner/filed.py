"""Pipelines whose schedule a person wrote: priced by running the file's events, stage by stage.

It knows orders of work and what they hold at once; seconds and bytes of stages are the cost model's. Such a schedule
is estimated, never searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import memory
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.flight import Flight
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.simulate import Event, Work, makespan, run_orders, simulate
from fms_parallel.schedule_file import FORWARD, INPUTS, WEIGHTS, FileSchedule
from fms_parallel.schedules import find_schedule

if TYPE_CHECKING:
    from fms_parallel.planner.api import Estimate, Planner

KINDS = {FORWARD: "F", INPUTS: "B", WEIGHTS: "W"}
BUSY = ("compute", "recompute", "tp", "cp", "ep")
"""What a pipeline's ranks do between waiting."""


def named(layout: ParallelLayout) -> ParallelLayout:
    """The same layout with a schedule that has a name: its stages cost the same."""
    word = "1f1b" if layout.virtual_stages == 1 else "interleaved1f1b"
    return replace(layout, schedule=word)


def events(planner: Planner, layout: ParallelLayout) -> list[Event]:
    """Every event of one step of a pipeline, of a schedule with a name or from a file.

    Raises:
        LayoutError: a file that does not fit the layout. ConfigError: stages that the ranks cannot share.
    """
    found = find_schedule(layout.schedule)
    stages = planner.stages(layout)
    if not isinstance(found, FileSchedule):
        return simulate(layout.schedule, layout.pp, layout.pieces, stages)
    layout.check_schedule()
    return run_orders(_orders(found), stages)


def _orders(found: FileSchedule) -> list[list[Work]]:
    ranks = range(len(found.rows))
    return [[Work(KINDS.get(a.kind, "B"), a.stage, a.micro) for a in found.order(rank)] for rank in ranks]


def estimate(planner: Planner, layout: ParallelLayout) -> Estimate:
    """A layout with a schedule from a file: the pipeline's seconds are those of its events."""
    plain = planner.estimate_columns(Columns.of_layout(named(layout), planner.workload.global_batch))
    done = events(planner, layout)
    busiest = max(sum(e.end - e.start for e in done if e.rank == rank) for rank in range(layout.pp))
    parts = dict(plain.breakdown)
    scale = busiest / sum(parts[name] for name in BUSY)
    parts |= {name: parts[name] * scale for name in BUSY} | {"pp": 0.0, "bubble": makespan(done) - busiest}
    seconds = sum(parts.values())
    faster = plain.step_time_s / seconds
    used = _memory(planner, layout)
    weighed = {f.name: float(getattr(used, f.name)[0]) / GIB for f in fields(used)}
    total = sum(weighed.values())
    return replace(
        plain,
        layout=layout,
        step_time_s=seconds,
        throughput=plain.throughput * faster,
        tokens_per_s_per_gpu=plain.tokens_per_s_per_gpu * faster,
        mfu=plain.mfu * faster,
        memory_gb=total,
        margin=1 - total / planner.cluster.device.memory_gb,
        breakdown=parts,
        memory_breakdown=weighed,
    )


def _memory(planner: Planner, layout: ParallelLayout) -> memory.Memory:
    """Of the fullest rank: its stages' blocks, and the most that its order of work holds at once."""
    found = find_schedule(layout.schedule)
    assert isinstance(found, FileSchedule)
    columns = Columns.of_layout(named(layout), planner.workload.global_batch)
    split = planner.split(layout)
    ranks: list[memory.Memory] = []
    for order in _orders(found):
        own = {work.stage for work in order}
        blocks = np.array([float(_blocks(order, split))])
        ends = np.array([0 in own]), np.array([len(split) - 1 in own])
        model = planner.costs
        known = (model.shape, columns, model.workload.sequence, model.software, model.experts)
        ranks.append(memory.of_stage(*known, blocks, moments(order, split), *ends))
    return max(ranks, key=lambda one: float(one.total[0]))


def most_held(order: Sequence[Work], split: Sequence[int]) -> float:
    """Blocks times micro-batches whose activations a rank holds at its fullest moment."""
    return max((moment.held.item() for moment in moments(order, split)), default=0.0) * _blocks(order, split)


def moments(order: Sequence[Work], split: Sequence[int]) -> list[Flight]:
    """The moments of a rank that can be its fullest: at no other it holds as much in all and between two halves."""
    apart = {(work.stage, work.micro) for work in order if work.kind == "W"}
    own, ran = {work.stage for work in order}, set[int]()
    blocks, within = _blocks(order, split), sum(stage + 1 in own for stage in own)
    takes = max(len(own - {0}), 1)
    whole = halves = answered = 0
    found: dict[tuple[int, int], Flight] = {}
    for work in order:
        size, halved = split[work.stage], (work.stage, work.micro) in apart
        first_half = halved and work.stage > 0  # the first stage has no inputs to ask for
        if work.kind == "F":
            whole += size
        elif work.kind == "B" and first_half:
            whole, halves, answered = whole - size, halves + size, answered + 1
        now = (whole / blocks, halves / blocks, answered / takes, ran == own, within)
        found[whole + halves, halves] = Flight(*(np.array([float(value)]) for value in now))
        if work.kind == ("W" if halved else "B"):
            whole, halves = (whole, halves - size) if first_half else (whole - size, halves)
            ran.add(work.stage)
    return [f for key, f in found.items() if not any(k != key and k[0] >= key[0] and k[1] >= key[1] for k in found)]


def _blocks(order: Sequence[Work], split: Sequence[int]) -> int:
    return sum(split[stage] for stage in {work.stage for work in order})
