"""Clusters of several kinds of devices: each pipeline stage on one kind, with as many blocks as that kind is fast.

It knows how to balance a pipeline over unlike stages; operators, links and memory are the cost model's. Stages follow
the order of the cluster's groups, so nodes are started in that order. Beside these layouts the search prices every
layout as if all devices were the slowest one: layouts without a pipeline wait for it anyway.

    step = micro-batches * slowest stage + what it waits for the others + sends + what data parallelism does not hide
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner import memory
from fms_parallel.planner.columns import OFFLOADS, SCHEDULES, Columns
from fms_parallel.planner.cost import CostModel, Step, Times
from fms_parallel.planner.flight import plain
from fms_parallel.planner.hardware import GIB, Device
from fms_parallel.planner.simulate import Stages

if TYPE_CHECKING:
    from fms_parallel.planner.api import Estimate, Planner

Array = NDArray[Any]

TRIED = 64
"""Layouts that are cut into whole blocks and priced stage by stage: the fastest if stages could be balanced exactly."""


def estimates(planner: Planner, columns: Columns, top: int) -> list[Estimate]:
    """The best layouts with one kind of device per stage, fastest first."""
    groups = planner.cluster.groups
    rows = columns.take(possible(planner, columns))
    if not len(rows):
        return []
    steps = [model.step(rows) for model in models(planner)]
    ranks = planner.cluster.gpus // rows.pp
    speed = sum(count // ranks / step.one() for step, (_, count) in zip(steps, groups, strict=True))
    bound = (rows.count + rows.pp - 1) * planner.model.shape.layers / speed
    order = np.argsort(bound, kind="stable")[: max(TRIED, top)]
    found = [_Pipeline.of(planner, rows.take(order[i : i + 1])) for i in range(len(order))]
    best = sorted((e for e in (p.estimate() for p in found if p is not None)), key=lambda e: e.step_time_s)
    return best[:top]


def possible(planner: Planner, columns: Columns) -> Array:
    """Layouts whose stages lie on one kind of device each, in the one schedule that is priced here."""
    fits = (columns.pp > 1) & (columns.virtual == 1) & (columns.schedule == SCHEDULES.index("1f1b"))
    fits &= columns.offload == OFFLOADS.index("none")
    for _, count in planner.cluster.groups:
        fits &= count * columns.pp % planner.cluster.gpus == 0
    return fits


def estimate(planner: Planner, row: Columns, split: Sequence[int] | None) -> Estimate | None:
    """One layout as it is cut, or with the best cut of a cluster of several kinds.

    None where the closed form of the cost model counts: an even pipeline on one kind, another schedule, no room.
    """
    if (len(planner.cluster.groups) == 1 and split is None) or not possible(planner, row)[0]:
        return None
    pipeline = _Pipeline.of(planner, row, split)
    return None if pipeline is None else pipeline.estimate()


def stages(planner: Planner, row: Columns, split: Sequence[int]) -> Stages | None:
    """Seconds of every stage for the event simulator; None where stages are not of one kind each, or all alike."""
    if len(planner.cluster.groups) == 1 or not possible(planner, row)[0]:
        return None
    pieces = [model.pieces(row) for model in models(planner)]
    own = [pieces[kind] for kind in kinds_of(planner, row)]
    last = len(own) - 1
    ends = {0: "embedding", last: "head"}
    forward, backward = (
        [
            blocks * piece[way] + (piece[f"{ends[stage]}_{way}"] if stage in ends else 0.0)
            for stage, (blocks, piece) in enumerate(zip(split, own, strict=True))
        ]
        for way in ("forward", "backward")
    )
    weight = [blocks * piece["weight"] for blocks, piece in zip(split, own, strict=True)]
    return Stages(forward, backward, weight, planner.costs.pieces(row)["hop"])


def kinds_of(planner: Planner, row: Columns) -> list[int]:
    """The kind of device of each stage, as an index into the cluster's groups."""
    ranks = planner.cluster.gpus // int(row.pp[0])
    return [kind for kind, (_, count) in enumerate(planner.cluster.groups) for _ in range(count // ranks)]


def models(planner: Planner) -> list[CostModel]:
    """The cost model of each kind of device, with its own links: only sends between stages cross from kind to kind."""
    return [
        replace(planner.costs, device=device, constants=planner.constants_of(device))
        for device, _ in planner.cluster.groups
    ]


def balance(seconds: Sequence[float], extra: Sequence[float], most: Sequence[int], layers: int) -> list[int] | None:
    """Blocks of each stage so that the slowest is as fast as can be; None when `layers` blocks have no room.

    Args:
        seconds: of one block on each stage. extra: of what the stage does besides. most: blocks that its memory holds.

    Each block goes to the stage that would be done first with it, which is optimal for equal blocks.
    """
    if layers < len(seconds) or min(most) < 1 or sum(most) < layers:
        return None
    blocks = [1] * len(seconds)
    for _ in range(layers - len(seconds)):
        free = [stage for stage in range(len(seconds)) if blocks[stage] < most[stage]]
        chosen = min(free, key=lambda stage: (blocks[stage] + 1) * seconds[stage] + extra[stage])
        blocks[chosen] += 1
    return blocks


@dataclass(frozen=True)
class _Pipeline:
    """One layout: the kind of each stage (an index into the cluster's groups), its blocks, and the steps per kind."""

    planner: Planner
    row: Columns
    steps: Sequence[Step]
    kinds: Sequence[int]
    blocks: Sequence[int]

    @classmethod
    def of(cls, planner: Planner, row: Columns, split: Sequence[int] | None = None) -> _Pipeline | None:
        """One row of columns with a given cut, or with the best one; None where no cut fits."""
        kinds = kinds_of(planner, row)
        pipeline = cls(planner, row, [model.step(row) for model in models(planner)], kinds, split or ())
        if split is not None:
            return pipeline
        stages = range(len(kinds))
        one = [float(pipeline.steps[kind].one()[0]) for kind in kinds]
        most = [pipeline.room(stage) for stage in stages]
        blocks = balance(one, [pipeline.extra(stage) for stage in stages], most, planner.model.shape.layers)
        return None if blocks is None else replace(pipeline, blocks=blocks)

    def device(self, stage: int) -> Device:
        """The device of a stage."""
        return self.planner.cluster.groups[self.kinds[stage]][0]

    def extra(self, stage: int) -> float:
        """Seconds of a micro-batch on a stage besides its blocks."""
        ends = self.steps[self.kinds[stage]].ends
        names = {0: "embedding", len(self.kinds) - 1: "head"}
        if stage not in names:
            return 0.0
        return float(sum(getattr(ends, f"{names[stage]}_{way}")[0] for way in ("forward", "backward")))

    def memory(self, stage: int, blocks: int) -> memory.Memory:
        """Bytes of a rank of a stage with so many blocks."""
        planner, last = self.planner, len(self.kinds) - 1
        held = np.minimum(len(self.kinds) - stage, self.row.count)
        known = (planner.model.shape, self.row, planner.workload.sequence, planner.software, planner.model.experts)
        ends = np.array([stage == 0]), np.array([stage == last])
        return memory.of_stage(*known, np.array([blocks]), [plain(held)], *ends)

    def room(self, stage: int) -> int:
        """Blocks that fit: memory is linear in them."""
        one, two = (float(self.memory(stage, blocks).total[0]) for blocks in (1, 2))
        return int((self.device(stage).memory_gb * GIB - one) // (two - one)) + 1

    def seconds(self, stage: int) -> float:
        """One micro-batch forward and backward."""
        return self.blocks[stage] * float(self.steps[self.kinds[stage]].one()[0]) + self.extra(stage)

    def idle(self, stage: int) -> float:
        """Seconds that a stage waits in 1F1B: for the stages before it, and for those behind it to answer.

        While the answer is under way it works on the forward passes (at the end: the backward passes) of the
        micro-batches that it is ahead.
        """
        block, ends = self.steps[self.kinds[stage]].block, self.steps[self.kinds[stage]].ends
        names = {0: "embedding", len(self.kinds) - 1: "head"}
        one = float((block.forward + block.tp + block.cp_forward + block.ep)[0])
        extra = float(getattr(ends, f"{names[stage]}_forward")[0]) if stage in names else 0.0
        forward = self.blocks[stage] * one + extra
        before = sum(self.seconds(s) for s in range(stage))
        behind = sum(self.seconds(s) for s in range(stage + 1, len(self.kinds)))
        ahead = min(len(self.kinds) - stage, int(self.row.count[0])) - 1
        waits = (max(behind - ahead * way, 0.0) for way in (forward, self.seconds(stage) - forward))
        return before + sum(waits)

    def times(self) -> dict[str, float]:
        """Seconds by purpose: of the slowest stage, of waiting for the others, of what comes after the pipeline."""
        stages = range(len(self.kinds))
        count = int(self.row.count[0])
        slowest = max(stages, key=lambda stage: count * self.seconds(stage) + self.idle(stage))
        step, blocks = self.steps[self.kinds[slowest]], self.blocks[slowest]
        again = float(step.again()[0])
        found = dict.fromkeys((f.name for f in fields(Times)), 0.0)
        found["tp"] = count * blocks * float(step.tensor_talk()[0])
        found["cp"] = count * blocks * float(step.context_talk()[0])
        found["ep"] = count * blocks * 2 * float(step.block.ep[0])
        found["recompute"] = count * blocks * again
        found["compute"] = count * self.seconds(slowest) - sum(found.values())
        found["bubble"] = self.idle(slowest)
        found["pp"] = float(self.planner.costs.step(self.row).hop()[0])
        found["other"] = max(step.model.constants.step_us * 1e-6 for step in self.steps)
        ends = [self.after(stage) for stage in stages]
        longest = max(stages, key=lambda stage: sum(ends[stage].values()))
        return {**found, **ends[longest]}

    def after(self, stage: int) -> dict[str, float]:
        """Seconds that a stage spends on sharding, averaging gradients and the optimizer."""
        step, rank = self.steps[self.kinds[stage]], np.array([self.blocks[stage]])
        plain = step.block.forward + step.block.backward
        return {
            "fsdp": float(step.sharded(rank, step.again())[0]),
            "dp": float(step.replicas(rank, plain)[0]),
            "optimizer": float(step.optimizer(rank)[0]),
        }

    def estimate(self) -> Estimate:
        """What the planner reports; memory is that of the stage with the least part left."""
        from fms_parallel.planner.api import Estimate, layout_precision

        workload, cluster = self.planner.workload, self.planner.cluster
        times = self.times()
        seconds = sum(times.values())
        used = [self.memory(stage, blocks) for stage, blocks in enumerate(self.blocks)]
        left = [1 - float(m.total[0]) / (self.device(s).memory_gb * GIB) for s, m in enumerate(used)]
        fullest = int(np.argmin(left))
        tokens = workload.global_batch * workload.sequence
        flops = self.planner.model.flops_per_token(workload.sequence) * tokens
        peak = sum(count * device.peak(workload.precision) / device.sustained for device, count in cluster.groups)
        return Estimate(
            layout=self.row.layout(0, layout_precision(workload.precision), tuple(self.blocks)),
            micro_batch=int(self.row.micro[0]),
            micro_batches=int(self.row.count[0]),
            step_time_s=seconds,
            throughput=workload.global_batch / seconds,
            tokens_per_s_per_gpu=tokens / seconds / cluster.gpus,
            mfu=flops / seconds / peak,
            memory_gb=float(used[fullest].total[0]) / GIB,
            margin=left[fullest],
            dollars_per_hour=cluster.price_per_hour,
            breakdown=times,
            memory_breakdown={f.name: float(getattr(used[fullest], f.name)[0]) / GIB for f in fields(memory.Memory)},
        )
