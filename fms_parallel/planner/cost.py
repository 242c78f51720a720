"""Seconds and bytes of many layouts at once: the planner's one cost model.

It composes operators, network, schedule and memory; it searches nothing and prints nothing. What repeats is computed
once: everything inside a block depends on (tp, cp, sp, micro) only.

    step = micro-batches * slowest rank + pipeline idle + what data parallelism does not hide + optimizer
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner import memory, schedule
from fms_parallel.planner.block import Block, Ends
from fms_parallel.planner.columns import BUDGET, OFFLOADS, Columns
from fms_parallel.planner.efficiency import DEFAULT, Constants
from fms_parallel.planner.experts import Experts
from fms_parallel.planner.hardware import Device
from fms_parallel.planner.operators import (
    Op,
    Workload,
    attention_operators,
    feed_forward_operators,
    tokens_of,
)
from fms_parallel.planner.software import Software
from fms_parallel.planner.timing import Roofline, TimeSource
from fms_parallel.planner.topology import Group, Network
from fms_parallel.shape import ModelShape

Array = NDArray[Any]


@dataclass(frozen=True)
class Times:
    """Seconds of one step, by what they are spent on; they add up to `total`."""

    compute: Array
    recompute: Array
    tp: Array
    cp: Array
    ep: Array
    fsdp: Array
    dp: Array
    pp: Array
    bubble: Array
    optimizer: Array
    other: Array

    @property
    def total(self) -> Array:
        """Seconds of one step."""
        return np.asarray(sum(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Costs:
    """Times, memory and stage split of every layout."""

    times: Times
    memory: memory.Memory
    most: Array
    last: Array
    full: Array

    def take(self, which: Array) -> Costs:
        """The rows that an index array picks."""
        times = Times(**{f.name: getattr(self.times, f.name)[which] for f in fields(Times)})
        peak = memory.Memory(**{f.name: getattr(self.memory, f.name)[which] for f in fields(memory.Memory)})
        return Costs(times, peak, self.most[which], self.last[which], self.full[which])


@dataclass(frozen=True)
class CostModel:
    """Everything that does not change during a search.

    Attributes:
        source: seconds of operators; the roofline when None. uneven: the last stage may be lighter, to carry the head.
    """

    shape: ModelShape
    device: Device
    workload: Workload
    software: Software
    constants: Constants = DEFAULT
    experts: Experts | None = None
    source: TimeSource | None = None
    uneven: bool = True

    def evaluate(self, columns: Columns) -> Costs:
        """Costs of every layout in `columns`."""
        return self.step(columns).costs()

    def step(self, columns: Columns) -> Step:
        """What blocks and ends of every layout in `columns` take."""
        inner, back = _unique(columns)
        return Step(self, columns, Block.of(self, inner).spread(back), Ends.of(self, inner).spread(back))

    def pieces(self, columns: Columns) -> dict[str, float]:
        """Seconds of one micro-batch on one block, on the ends, and from stage to stage, for the first row.

        Backward includes recomputation; `weight` is the part of it that makes weight gradients.
        """
        step = self.step(columns)
        block, again = step.block, step.again()
        exchanged = block.tp * (1.0 + step.repeated()) + block.gathers + block.cp_backward + block.ep
        backward = block.backward + again + exchanged
        hops = 2 * (columns.count * columns.virtual * (not self.software.overlap_pp) + columns.pp - 1)
        found = {
            "forward": block.forward + block.tp + block.cp_forward + block.ep,
            "backward": backward + step.whole_again() * block.cp_forward,
            "weight": block.backward / 2,
            "hop": step.hop() / np.maximum(hops, 1),
            **{f.name: getattr(step.ends, f.name) for f in fields(step.ends)},
        }
        return {name: float(value[0]) for name, value in found.items()}

    @property
    def time_source(self) -> TimeSource:
        """Who prices an operator."""
        host = replace(self.constants, host_us=self.constants.host_us * self.software.host)
        return self.source or Roofline(self.device, self.workload.precision, host)

    def block_operators(self, columns: Columns) -> list[Op]:
        """The operators of one block."""
        sequence = self.workload.sequence
        rest = attention_operators(self.shape, columns, sequence, self.software)
        if self.experts is not None:
            return rest + self.experts.operators(self.shape, columns, sequence, self.software)
        return rest + feed_forward_operators(self.shape, columns, sequence, self.software)

    def collective(self, name: str, size: Any, group: Group) -> Array:
        """Seconds of one collective with the fitted factors of the network."""
        seconds = Network.of(self.device).seconds(name, size, group) * self.constants.network
        return np.where(group.nodes > 1, seconds, seconds * self.constants.inner)


def _unique(columns: Columns) -> tuple[Columns, Array]:
    """The distinct (tp, cp, sp, tp_parts, micro) and where each row finds its own."""
    key = ((columns.tp << 40) | (columns.cp << 28) | (columns.sp << 27) | (columns.tp_parts << 26)) + columns.micro
    _, first, back = np.unique(key, return_index=True, return_inverse=True)
    return columns.take(first), back


@dataclass(frozen=True)
class Step:
    """One whole step of every layout."""

    model: CostModel
    columns: Columns
    block: Block
    ends: Ends

    def costs(self) -> Costs:
        """Times and memory."""
        c, model = self.columns, self.model
        again = self.again()
        one = self.one()
        head = (self.ends.head_forward + self.ends.head_backward) / one
        stages = schedule.blocks_of_stages(model.shape.layers, c, head if model.uneven else 0.0)
        rank, final = schedule.blocks_of_ranks(c, *stages)
        peak = memory.peak(model.shape, c, model.workload.sequence, model.software, model.experts, (rank, final))
        return Costs(self.times(rank, final, again), peak, *stages)

    def one(self) -> Array:
        """Seconds of one block and micro-batch, forward and backward with everything in between."""
        return self.block.forward + self.block.backward + self.again() + self.talk()

    def again(self) -> Array:
        """Seconds of one block's recomputation, without what it exchanges."""
        partly = {
            "core": self.block.core,
            "memory": self.block.forward - self.block.matmuls,
            "half": self.block.forward - self.block.matmuls / 2,
        }[self.model.software.selective]
        fully = self.block.forward - (self.block.last if self.model.software.early_stop else 0.0)
        fully = fully * self.whole_again()
        by_policy = [np.zeros_like(partly), np.maximum(partly, 0.0), fully]
        if self.columns.budgets:
            by_policy.append(self.beyond_budget())
        return np.choose(self.columns.recompute, by_policy)

    def beyond_budget(self) -> Array:
        """Seconds of making again what a recompute budget does not keep: all passes over memory, and of products and
        attention the part that has no room. What the last product makes is never needed again."""
        c, model = self.columns, self.model
        kept = memory.Kept.of(model.shape, c, model.workload.sequence, model.software)
        missing = kept.missing(c.share)
        return self.block.forward - self.block.matmuls + missing * (self.block.matmuls - self.block.last)

    def talk(self) -> Array:
        """Seconds that one block waits for tp, cp and ep in forward, backward and recomputed forward."""
        return self.tensor_talk() + self.context_talk() + 2 * self.block.ep

    def tensor_talk(self) -> Array:
        """tp: one pass forward, one backward, inputs gathered again, and what recomputation repeats."""
        return self.block.tp * (2.0 + self.repeated()) + self.block.gathers

    def repeated(self) -> Array:
        """Part of a forward pass's exchanges within tp that the backward pass repeats; an early stop spares one."""
        software = self.model.software
        # The last of a block's four is spared; where the feed-forward is whole there are two, and both are needed.
        spared = np.where(self.columns.tp_parts == 1, 1.0, 0.75) if software.early_stop else 1.0
        fully = self.whole_again() * spared
        return np.choose(self.columns.recompute, [0.0, software.selective_talk, fully, fully])

    def context_talk(self) -> Array:
        """cp: forward, backward, and forward again where a block is recomputed whole."""
        return self.block.cp_forward * (1.0 + self.whole_again()) + self.block.cp_backward

    def whole_again(self) -> Array:
        """The part of the blocks that is recomputed whole."""
        c = self.columns
        part = np.where(c.recompute == 2, c.recomputed(self.model.shape.layers), 0.0)
        # A compiler makes no collective again unless nothing at all is kept.
        return np.where((c.recompute == BUDGET) & (c.budget == 0), 1.0, part) if c.budgets else part

    def times(self, rank: Array, final: Array, again: Array) -> Times:
        """Seconds by purpose. The slowest rank decides each micro-batch: a full one or the last one with the head."""
        c, block, ends, micro_us = self.columns, self.block, self.ends, self.model.constants.micro_us
        plain = block.forward + block.backward
        head = ends.head_forward + ends.head_backward
        start = ends.embedding_forward + ends.embedding_backward
        one = plain + again + self.talk()
        heavy = np.maximum(
            rank * one + np.where(c.pp == 1, head, 0.0) + start, final * one + head + np.where(c.pp == 1, start, 0.0)
        )
        last_is_slower = (c.pp > 1) & (final * one + head > rank * one + start)
        blocks = np.where(last_is_slower, final, rank)
        outside = heavy - blocks * one
        mean = (self.model.shape.layers * one + head + start) / c.pp
        forward = mean * (block.forward + block.tp) / one
        idle = schedule.bubble(c, forward, mean - forward, mean * block.backward / 2 / one)
        hop = self.hop()
        fsdp = self.sharded(rank, again)
        optimizer = self.optimizer(rank)
        zero = np.zeros(len(c))
        return Times(
            compute=c.count * (blocks * plain + outside),
            recompute=c.count * blocks * again,
            tp=c.count * blocks * self.tensor_talk() + self.whole_feed_forwards(rank),
            cp=c.count * blocks * self.context_talk(),
            ep=c.count * blocks * 2 * block.ep,
            fsdp=fsdp,
            dp=self.replicas(rank, plain),
            pp=hop,
            bubble=idle * self.model.constants.idle,
            optimizer=optimizer,
            other=zero + self.model.constants.step_us * 1e-6 + c.count * micro_us * 1e-6 + self.hooks(blocks),
        )

    def whole_feed_forwards(self, rank: Array) -> Array:
        """Seconds of adding up, once a step, the gradients of feed-forwards that every rank of tp has whole."""
        c, model = self.columns, self.model
        size = rank * model.shape.ffn_parameters * model.software.reduce_bytes
        group = Group.of(c.tp, 1, model.device.per_node)
        seconds = model.collective("allreduce", size, group) + model.constants.copy_ns * 1e-9 * size * 2
        return np.where(c.tp_parts == 1, seconds, 0.0)

    def hooks(self, blocks: Array) -> Array:
        """Seconds of the host that axes add to blocks and that do not hide behind kernels."""
        c, constants, software = self.columns, self.model.constants, self.model.software
        one = constants.host_us * 1e-6 * software.host * (1 - constants.hidden)
        # A pipeline's data parallelism works once per step.
        times = {"tp": c.count, "sp": c.count, "cp": c.count}
        each = sum(
            number * np.where(getattr(c, axis) > (axis != "sp"), times.get(axis, np.where(c.pp > 1, 1, c.count)), 0)
            for axis, number in software.host_of.items()
        )
        return np.asarray(blocks * one * each)

    def hop(self) -> Array:
        """Seconds of handing micro-batches on: each waits once per direction, and the ramp passes every stage."""
        c, model = self.columns, self.model
        whole = tokens_of(c, model.workload.sequence) * model.shape.width * model.software.working_bytes
        apart = (c.sp == 1) | (not model.software.hop_whole)
        size = whole / np.where(apart, c.tp, 1)
        inner = c.dp * c.fsdp * c.cp * c.tp
        once = model.collective("p2p", size, Group.of(c.pp, inner, model.device.per_node))
        # Where each rank sends its part without sp, the receivers gather it.
        gather = model.collective("allgather", whole, Group.of(c.tp, 1, model.device.per_node))
        once = once + np.where((c.sp == 0) & apart & (c.pp > 1), gather, 0.0)
        steady = 0.0 if model.software.overlap_pp else c.count * c.virtual
        return np.where(c.pp > 1, 2 * once * (steady + c.pp - 1), 0.0)

    def block_parameters(self) -> Array:
        """Parameters of one block on one rank, gathered."""
        return self.states().block()

    def rank_parameters(self, rank: Array) -> Array:
        """Parameters of the fullest rank, gathered: its blocks and one table."""
        states = self.states()
        return rank * states.block() + states.table()

    def states(self) -> memory.States:
        """Who counts parameters."""
        return memory.States(self.model.shape, self.columns, self.model.software, self.model.experts)

    def sharded(self, rank: Array, again: Array) -> Array:
        """Seconds that fsdp's gathers and reductions stick out behind the computation of each block."""
        c, model = self.columns, self.model
        shards = self.states().shards()
        group = Group.of(shards, c.cp * c.tp * c.fsdp // shards, model.device.per_node)
        size = self.block_parameters()
        gather = model.collective("allgather", size * model.software.working_bytes, group)
        reduce = model.collective("reducescatter", size * model.software.reduce_bytes, group)
        gather = gather + model.constants.copy_ns * 1e-9 * size * model.software.working_bytes
        reduce = reduce + model.constants.copy_ns * 1e-9 * size * model.software.reduce_bytes
        overlap = model.constants.overlap
        forward = overlap * (self.block.forward + self.block.tp + self.block.cp_forward)
        backward = overlap * (self.block.backward + again + self.block.tp + self.block.cp_backward)
        once = np.maximum(gather - forward, 0.0) + np.maximum(gather - backward, 0.0)
        ending = np.maximum(gather + reduce - backward, 0.0) - np.maximum(gather - backward, 0.0)
        tables = 2 * gather / np.maximum(size, 1) * self.rank_parameters(np.zeros_like(rank))
        # In a pipeline a stage is gathered once and kept; only the first gather and the reductions are in the way.
        times = np.where(c.pp > 1, 1, c.count)
        # Blocks that stay gathered miss the gather of their backward pass.
        spared = times * np.maximum(gather - backward, 0.0) + ending - np.maximum(reduce - backward, 0.0)
        return np.where(shards > 1, rank * (times * once + ending) - c.kept * spared + tables + reduce, 0.0)

    def replicas(self, rank: Array, plain: Array) -> Array:
        """Seconds of averaging gradients over dp that the last micro-batch's backward pass does not hide."""
        c, model = self.columns, self.model
        shards = self.states().shards()
        size = self.rank_parameters(rank) / shards
        group = Group.of(c.dp, c.fsdp * c.cp * c.tp, model.device.per_node)
        sharded = c.zero >= 1
        gather = model.collective("allgather", size * model.software.working_bytes, group)
        scatter = model.collective("reducescatter", size * model.software.reduce_bytes, group)
        whole = np.where(
            sharded, gather + scatter, model.collective("allreduce", size * model.software.reduce_bytes, group)
        )
        whole = whole + model.constants.copy_ns * 1e-9 * size * model.software.reduce_bytes * 2
        overlap = model.software.overlap_dp * model.constants.overlap
        hidden = np.minimum(whole * overlap, rank * plain * 2 / 3)
        # Ranks of a cp group hold the same parameters and see other tokens: their gradients are added, too.
        context = Group.of(c.cp, c.tp, model.device.per_node)
        extra = np.where(
            shards > c.fsdp, 0.0, model.collective("allreduce", size * model.software.reduce_bytes, context)
        )
        return np.where(c.dp > 1, whole - hidden, 0.0) + np.where(c.cp > 1, extra * (1 - overlap), 0.0)

    def optimizer(self, rank: Array) -> Array:
        """Seconds of reading gradients and reading and writing parameters and state, at memory or host speed."""
        c, model, software = self.columns, self.model, self.model.software
        own = self.rank_parameters(rank) / self.states().shards() / np.where(c.zero >= 1, c.dp, 1)
        states = software.optimizer_bytes
        size = own * (software.gradient_bytes * 2 + 2 * software.parameter_bytes + 2 * states)
        seconds = model.constants.update * size / (model.device.memory_gb_s * 1e9 * model.constants.stream)
        moved = own * (2 * states + software.gradient_bytes + software.parameter_bytes)
        return seconds + np.where(
            c.offload >= OFFLOADS.index("optimizer_state"), moved / (model.device.host_gb_s * 1e9), 0.0
        )
