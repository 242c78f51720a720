"""What one rank holds at its fullest moment, in bytes, for many layouts at once.

It knows what software keeps; it knows nothing of seconds. The fullest rank is the first stage (most micro-batches in
flight, and the embedding) or the last one (head and logits); both are counted and the larger is reported.
Formulas: activations Korthikanti et al. 2022 (arXiv 2205.05198); ZeRO Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner import schedule
from fms_parallel.planner.columns import OFFLOADS, Columns
from fms_parallel.planner.experts import Experts
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.operators import tokens_of
from fms_parallel.planner.software import Software
from fms_parallel.shape import ModelShape

Array = NDArray[Any]


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank by purpose, one entry per layout."""

    parameters: Array
    gradients: Array
    optimizer: Array
    gathered: Array
    activations: Array
    logits: Array
    reserve: Array

    @property
    def total(self) -> Array:
        """All of it."""
        return np.asarray(sum(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Kept:
    """Bytes per token of a rank that one block keeps for its backward pass.

    Attributes:
        everything: without recomputation. enters: what enters the block. products: results of matrix products and of
            attention, without those that the backward pass does not read. received: results of collectives within tp.
            selective: with that policy.
    """

    everything: Array
    enters: Array
    products: Array
    received: Array
    selective: Array

    @classmethod
    def of(cls, shape: ModelShape, columns: Columns, sequence: int, software: Software) -> Kept:
        """For every layout."""
        w, tp = software.working_bytes, columns.tp
        shard = np.where(columns.sp == 1, tp, 1)
        outside = shape.width / shard
        inputs = shape.width / (shard if software.gather_again else 1)
        q = shape.heads * shape.head_width / tp
        kv = np.maximum(shape.kv_heads, tp) * shape.head_width / tp
        ffn = shape.ffn_width / tp
        ups = 2 if shape.gated else 1
        scores = 0.0 if software.fused_attention else (2 * w + 1) * shape.heads * sequence / columns.cp / tp
        core = 4 * shape.heads / tp if software.fused_attention else scores
        masks = 2 * outside * software.dropout
        keys = q if software.repeats_kv else kv
        everything = w * (2 * outside + 2 * inputs + 2 * q + 2 * keys + (ups + 1) * ffn) + masks + core
        everything = everything + software.ring_keeps * w * q * (columns.cp > 1)
        selective = {
            "core": everything - (scores if not software.fused_attention else 0.0),
            # Block input; results of qkv, attention, output projection, up and gate, down.
            "memory": w * (outside + 2 * q + 2 * kv + 2 * shape.width + ups * ffn) + 4 * shape.heads / tp,
            "half": w * (outside + q + kv + q + ffn) + 4 * shape.heads / tp,
        }[software.selective]
        products = w * (2 * q + 2 * kv + shape.width * (tp == 1) + ups * ffn) + 4 * shape.heads / tp
        received = w * np.where(columns.sp == 1, 2 * shape.width + outside, shape.width) * (tp > 1)
        return cls(everything, w * outside, products, received, selective)

    def within(self, share: Array | float) -> Array:
        """A recompute budget: what enters, and `share` of the rest that is kept without one.

        torch's compiler (`activation_memory_budget`) fills that with results of products and attention, which cost most
        to make again; what is cheap to make it never keeps, so that a large budget is not used up. It repeats no
        collective unless nothing is kept: what they gave is kept on top.
        """
        return self.enters + np.where(share > 0, self.received, 0.0) + self.chosen(share)

    def chosen(self, share: Array | float) -> Array:
        """Of products and attention what a budget keeps."""
        return np.asarray(np.minimum(share * (self.everything - self.enters), self.products))

    def missing(self, share: Array) -> Array:
        """The part of products and attention that has no room in a budget."""
        return 1 - self.chosen(share) / self.chosen(1.0)


def activation_bytes_per_token(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> Array:
    """Bytes that one block keeps per token of a rank, by the layout's recompute policy."""
    kept, part = Kept.of(shape, columns, sequence, software), columns.recomputed(shape.layers)
    partly = part * kept.enters + (1 - part) * kept.everything
    by_policy = [kept.everything, kept.selective, partly]
    if columns.budgets:
        by_policy.append(kept.within(columns.share))
    return np.choose(columns.recompute, [np.broadcast_to(x, columns.tp.shape) for x in by_policy])


def peak(
    shape: ModelShape,
    columns: Columns,
    sequence: int,
    software: Software,
    experts: Experts | None,
    blocks: tuple[Array, Array],
) -> Memory:
    """Memory of the fullest rank. `blocks`: of the first rank and of the last one, over all their stages."""
    held = schedule.in_flight(columns)
    alone = columns.pp == 1
    whole = np.ones(len(columns), dtype=bool)
    known = (shape, columns, sequence, software, experts)
    ends = (
        of_stage(*known, blocks[0], held, whole, alone),
        of_stage(*known, blocks[1], _held_by_last(columns, held), alone, whole),
    )
    fuller = ends[1].total > ends[0].total
    return Memory(
        **{f.name: np.where(fuller, getattr(ends[1], f.name), getattr(ends[0], f.name)) for f in fields(Memory)}
    )


def of_stage(
    shape: ModelShape,
    columns: Columns,
    sequence: int,
    software: Software,
    experts: Experts | None,
    blocks: Array,
    held: Array,
    embedding: Array,
    head: Array,
) -> Memory:
    """A rank with so many blocks that holds activations of `held` micro-batches, and perhaps an end of the model."""
    tokens = tokens_of(columns, sequence)
    kept = tokens * activation_bytes_per_token(shape, columns, sequence, software) * software.fragmentation
    again = _one_block_again(shape, columns, sequence, software) * tokens
    ring = _ring(shape, columns, software) * tokens
    logits = np.where(head, _logits(shape, columns, tokens, software), 0.0)
    outside = tokens * shape.width * software.working_bytes
    hops = _hops(columns, software, held, embedding, head) * outside / np.where(columns.sp == 1, columns.tp, 1)
    states = States(shape, columns, software, experts)
    parameters, gradients, optimizer, gathered = states.rank(blocks, embedding, head, held)
    pooled, here = states.pooled(gradients)
    # Gradients of earlier micro-batches are there beside all activations, if one is begun after another has ended.
    # A rank with several stages has done with all micro-batches of one before the next where there are pp of them.
    v = columns.virtual
    parts = np.where(columns.count <= columns.pp, v, 1)
    earlier = np.where(software.gradient_buffers, here, here / parts * (columns.count > held))
    everything = kept * blocks * held + outside + hops
    none = np.zeros_like(logits)
    if software.logits_at_once:
        # By the last block's backward pass the head's input is gone; a pipeline still holds what it hands on.
        after = everything + again - np.where(columns.pp == 1, outside, 0.0)
        moments = [(everything, logits, earlier), (after, none, earlier)]
    else:  # logits and what their gradient needs outlast the head: published peaks have them beside a block's
        moments = [(everything + again, logits, earlier), (everything + again + ring, none, earlier)]
    # After a stage's first backward pass all gradients of it are there: the first stage to do so, then the last.
    left = np.where(columns.count > 1, 0, kept) + again + ring + hops
    moments.append((kept * blocks * (held - 1 / v) + left, none, here / parts))
    moments.append((kept * blocks * (held - 1) / v + left, none, here))
    fullest = np.argmax([sum(moment) for moment in moments], axis=0)
    activations, logits, gradients = (np.choose(fullest, [moment[i] for moment in moments]) for i in range(3))
    reserve = np.full(len(columns), software.reserve_gb * GIB)
    return Memory(parameters, gradients + pooled, optimizer, gathered, activations, logits, reserve)


def _hops(columns: Columns, software: Software, held: Array, embedding: Array, head: Array) -> Array:
    """Tensors between stages that a rank keeps besides what its blocks keep.

    A buffer of its own for every micro-batch's gradient that comes, and for every activation (those of micro-batches in
    flight are the blocks' inputs); and what it handed on, until the backward pass of that micro-batch.
    """
    count, sends, takes = columns.count, columns.virtual - head, columns.virtual - embedding
    hops = sends * (count + held) + takes * np.maximum(count - held, 0)
    return np.where((columns.pp > 1) & software.hop_buffers, hops, 0)


def _ring(shape: ModelShape, columns: Columns, software: Software) -> Array:
    """Per token, while attention runs backward over cp: keys and values of all ranks, gradients of queries, keys and
    values added up in fp32, and the two of them that are handed on."""
    q = shape.heads * shape.head_width / columns.tp
    each = 2 * software.working_bytes * columns.cp + 4 * (3 + 2)
    return np.where((columns.cp > 1) & software.ring_gathers, each * q, 0.0)


def _logits(shape: ModelShape, columns: Columns, tokens: Array, software: Software) -> Array:
    """All at once: logits, their fp32 copy, log-probabilities and the gradient. In chunks, one in fp32 besides."""
    elements, w = tokens * shape.vocab / columns.tp, software.working_bytes
    if not software.logits_at_once:
        return elements * (w + 3 * 4)
    chunk = np.minimum(elements, software.logits_at_once)
    # The head's input and its gradient over all tokens of the tp group, and the gradient of a rank's own part.
    ends = (2 + 1 / np.where(columns.sp == 1, columns.tp, 1)) * tokens * shape.width * w
    ends = ends + 4 * shape.vocab * shape.width / columns.tp
    return chunk * (w if w >= 4 else 2 * w + 4) + ends


def _held_by_last(columns: Columns, first: Array) -> Array:
    """Micro-batches in flight on the last rank: one in 1F1B, all in GPipe, and those of its other stages."""
    code = columns.schedule
    all_of_them = (code == schedule.CODE["gpipe"]) | (code == schedule.CODE["looped_bfs"])
    steady = np.where(
        columns.virtual > 1, np.minimum((columns.pp * (columns.virtual - 1) + 1) / columns.virtual, first), 1.0
    )
    return np.where(all_of_them | (columns.pp == 1), first, steady)


def _one_block_again(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> Array:
    """While a block runs backward: all of it once if it is recomputed, and the gradients of its widest tensors."""
    ups = 2 if shape.gated else 1
    gradients = software.working_bytes * (2 * shape.width + ups * shape.ffn_width / columns.tp)
    whole = activation_bytes_per_token(
        shape, columns.with_(recompute=np.zeros_like(columns.recompute)), sequence, software
    )
    kept = activation_bytes_per_token(shape, columns.with_(every=np.ones_like(columns.every)), sequence, software)
    return gradients + whole - kept


@dataclass(frozen=True)
class States:
    """Parameters, gradients, optimizer state and gathered copies of one rank."""

    shape: ModelShape
    columns: Columns
    software: Software
    experts: Experts | None

    def rank(self, blocks: Array, embedding: Any, head: Any, held: Any = 1.0) -> tuple[Array, Array, Array, Array]:
        """Bytes of the four kinds for a rank with so many blocks and `held` micro-batches in flight."""
        c, s = self.columns, self.software
        tables = self.table() * (
            np.asarray(embedding, dtype=float) + np.asarray(head, dtype=float) * self.separate_head()
        )
        last_norm = np.asarray(head, dtype=float) * self.shape.norm_parameters
        whole = blocks * self.block() + tables + last_norm
        shards = self.shards()
        over_dp = np.where(c.zero >= 1, c.dp, 1)
        kept = np.where(c.offload == OFFLOADS.index("params"), 0.0, 1.0)
        state = np.where(c.offload >= OFFLOADS.index("optimizer_state"), 0.0, 1.0)
        gradients = np.where(
            self.waiting(), s.gradient_bytes, s.gradient_bytes / shards / np.where(c.zero >= 2, c.dp, 1)
        )
        return (
            whole * s.parameter_bytes / shards * kept,
            whole * gradients * kept,
            whole * s.optimizer_bytes / shards / over_dp * state,
            self.gathered(whole, blocks * self.block() * (np.asarray(held, dtype=float) - 1)),
        )

    def pooled(self, gradients: Array) -> tuple[Array, Array]:
        """Of gradients what has a pool of its own during the whole step, and what is where activations are.

        An allocator keeps a pool for each stream: what a reduction made is nobody else's memory afterwards.
        """
        shards, waiting = self.shards(), self.waiting()
        pooled = np.where((shards > 1) & self.software.stream_pools, gradients / np.where(waiting, shards, 1), 0.0)
        return pooled, np.where(waiting, gradients, gradients - pooled)

    def waiting(self) -> Array:
        """Where gradients of all but the last micro-batch wait whole for the reduction of the last one."""
        return np.asarray((self.shards() > 1) & (self.columns.count > 1))

    def shards(self) -> Array:
        """Ranks that share one copy of a parameter."""
        c, when = self.columns, self.software.shard_over_cp
        over = (when == "always") | ((when == "with fsdp") & (c.fsdp > 1))
        return np.asarray(c.fsdp * np.where(over, c.cp, 1))

    def gathered(self, whole: Array, more: Array) -> Array:
        """Copies in the working precision: with fsdp of two blocks (or those kept), without of all if states are wider.

        `more`: parameters of the blocks for each micro-batch in flight but one, of which software may keep copies.

        A pipeline gathers its stage once per step and keeps it, and gradients of all but the last micro-batch wait
        whole on their rank (both as torch's pipeline runtime does with FSDP2); buffers of two gathers stay reserved.
        """
        c, s = self.columns, self.software
        wider = np.asarray(s.parameter_bytes > s.working_bytes)
        copied = wider | (s.replicas_copy & ((c.dp > 1) | (c.cp > 1)))
        # Blocks that stay gathered are all there at the head; while others are gathered two by two, they are gone.
        two_blocks = self.block() * (np.maximum(c.kept, 2) * s.working_bytes + s.reduce_bytes)
        two_blocks = two_blocks + 2 * self.table() * s.working_bytes
        kept = whole * s.working_bytes
        staged = kept + 2 * self.block() * s.working_bytes * s.stream_pools
        flying = more * s.working_bytes * (wider & s.cast_again & (c.pp > 1))
        return np.where(
            self.shards() > 1, np.where(c.pp > 1, staged, np.minimum(two_blocks, kept)), kept * copied + flying
        )

    def block(self) -> Array:
        """Parameters of one block on one rank, gathered: matrices over tp, norms whole."""
        shape, tp = self.shape, self.columns.tp
        kv = (np.maximum(shape.kv_heads, tp) - shape.kv_heads) * shape.head_width * shape.width * 2
        ffn = shape.ffn_parameters if self.experts is None else self.experts.parameters(shape) / self.experts.ep
        return (shape.attention_parameters + kv + ffn) / tp + 2 * shape.norm_parameters

    def table(self) -> Array:
        """Parameters of the embedding on one rank; the head has as many."""
        positions = self.shape.max_positions * self.shape.width if self.shape.learned_positions else 0
        return self.shape.vocab * self.shape.width / self.columns.tp + positions / 2

    def separate_head(self) -> Array:
        """1 where the head is a second table: not tied, or tied across two ranks of a pipeline."""
        return np.where((self.columns.pp > 1) | (not self.shape.tied), 1.0, 0.0)
