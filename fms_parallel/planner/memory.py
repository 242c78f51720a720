"""What one rank holds at its fullest moment, in bytes, for many layouts at once.

It knows what software keeps; it knows nothing of seconds. The fullest rank is the first stage (most micro-batches in
flight, and the embedding) or the last one (head and logits); both are counted and the larger is reported.
Formulas: activations Korthikanti et al. 2022 (arXiv 2205.05198); ZeRO Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner import schedule
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.experts import Experts
from fms_parallel.planner.flight import Flight, flights
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.operators import tokens_of
from fms_parallel.planner.software import Software
from fms_parallel.planner.states import States
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
            selective: with that policy. gradients: of results of products and norms, between the halves of a split
            backward pass.
    """

    everything: Array
    enters: Array
    products: Array
    received: Array
    selective: Array
    gradients: Array

    @classmethod
    def of(cls, shape: ModelShape, columns: Columns, sequence: int, software: Software) -> Kept:
        """For every layout."""
        w, tp = software.working_bytes, columns.tp
        shard = np.where(columns.sp == 1, tp, 1)
        outside = shape.width / shard
        inputs = shape.width / (shard if software.gather_again else 1)
        # A whole feed-forward reads the rank's own tokens, and gives no more.
        whole = columns.tp_parts == 1
        both, given = inputs + np.where(whole, outside, inputs), shape.width + np.where(whole, outside, shape.width)
        q = shape.heads * shape.head_width / tp
        kv = np.maximum(shape.kv_heads, tp) * shape.head_width / tp
        ffn = shape.ffn_width / tp
        ups = 2 if shape.gated else 1
        scores = 0.0 if software.fused_attention else (2 * w + 1) * shape.heads * sequence / columns.cp / tp
        core = 4 * shape.heads / tp if software.fused_attention else scores
        masks = 2 * outside * software.dropout
        keys = q if software.repeats_kv else kv
        everything = w * (2 * outside + both + 2 * q + 2 * keys + (ups + 1) * ffn) + masks + core
        everything = everything + software.ring_keeps * w * q * (columns.cp > 1)
        selective = {
            "core": everything - (scores if not software.fused_attention else 0.0),
            # Block input; results of qkv, attention, output projection, up and gate, down.
            "memory": w * (outside + 2 * q + 2 * kv + given + ups * ffn) + 4 * shape.heads / tp,
            "half": w * (outside + q + kv + q + ffn) + 4 * shape.heads / tp,
        }[software.selective]
        products = w * (2 * q + 2 * kv + shape.width * (tp == 1) + ups * ffn) + 4 * shape.heads / tp
        received = w * np.where(columns.sp == 1, given + outside, shape.width) * (tp > 1)
        # Of what adds up over tp it is the gradient of all tokens.
        gradients = w * (2 * outside + 2 * shape.width + q + 2 * kv + ups * ffn)
        return cls(everything, w * outside, products, received, selective, gradients)

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
    """Memory of the fullest rank. `blocks`: of the first rank and of the last one, over all their stages.

    In a V schedule the first rank has both ends of the model: `blocks` are then of the last rank, and of that one.
    """
    known = (shape, columns, sequence, software, experts)
    alone, bent = columns.pp == 1, np.isin(columns.schedule, schedule.TURNS)
    whole = np.ones(len(columns), dtype=bool)
    ends = (
        of_stage(*known, blocks[0], flights(columns, last=False), alone | ~bent, alone),
        of_stage(*known, blocks[1], flights(columns, last=True), alone | bent, whole),
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
    moments: Sequence[Flight],
    embedding: Array,
    head: Array,
) -> Memory:
    """A rank with so many blocks, at the fullest of some moments, and perhaps with an end of the model."""
    states = States(shape, columns, software, experts)
    most = np.max([moment.held for moment in moments], axis=0)
    parameters, gradients, optimizer, gathered = states.rank(blocks, embedding, head, most)
    pooled, here = states.pooled(gradients)
    working = _Working(shape, columns, sequence, software, blocks, embedding, head)
    sums = [each for moment in moments for each in working.sums(moment, here)]
    fullest = np.argmax(np.array([a + b + c for a, b, c in sums]), axis=0)
    activations, logits, gradients = (np.choose(fullest, [each[i] for each in sums]) for i in range(3))
    reserve = np.full(len(columns), software.reserve_gb * GIB)
    return Memory(parameters, gradients + pooled, optimizer, gathered, activations, logits, reserve)


@dataclass(frozen=True)
class _Working:
    """What a rank with so many blocks holds while it works, besides its states."""

    shape: ModelShape
    columns: Columns
    sequence: int
    software: Software
    blocks: Array
    embedding: Array
    head: Array

    def sums(self, moment: Flight, here: Array) -> list[tuple[Array, Array, Array]]:
        """(activations, logits, gradients) around one moment; `here`: gradients of all weights."""
        software, v = self.software, self.columns.virtual
        kept, outside = self._kept, self._outside
        again, ring, logits = self._again, self._ring, self._logits
        none, hops, earlier = np.zeros_like(logits), self._hops(moment), self._earlier(moment, here)
        # A moment has its last micro-batch between two halves: before that it was whole.
        first_half = np.minimum(moment.split, 1 / v)
        held = moment.whole + first_half
        everything = kept * held + self._split * (moment.split - first_half) + outside + hops
        if software.logits_at_once:
            # By the last block's backward pass the head's input is gone; a pipeline still holds what it hands on.
            after = everything + again - np.where(self.columns.pp == 1, outside, 0.0)
            found = [(everything, logits, earlier), (after, none, earlier)]
        else:  # logits and what their gradient needs outlast the head: published peaks have them beside a block's
            found = [(everything + again, logits, earlier), (everything + again + ring, none, earlier)]
        # After a stage's first backward pass all gradients of it are there: the first stage to do so, then the last.
        left = np.where(self.columns.count > 1, 0, kept / self.blocks) + again + ring + hops
        begun = [(kept * (held - 1 / v) + left, here / self._parts), (kept * (held - 1) / v + left, here)]
        if np.any(moment.split):
            halved = moment.split > 0
            between = kept * moment.whole + self._split * moment.split + self._norm_again() + hops
            begun = [(np.where(halved, between, a), np.where(halved, earlier, b)) for a, b in begun]
        return [*found, *((activations, none, gradients) for activations, gradients in begun)]

    @cached_property
    def _tokens(self) -> Array:
        return tokens_of(self.columns, self.sequence)

    @cached_property
    def _kept(self) -> Array:
        """A micro-batch of all blocks between forward and backward."""
        each = activation_bytes_per_token(self.shape, self.columns, self.sequence, self.software)
        return self._tokens * each * self.software.fragmentation * self.blocks

    @cached_property
    def _again(self) -> Array:
        return _one_block_again(self.shape, self.columns, self.sequence, self.software) * self._tokens

    @cached_property
    def _ring(self) -> Array:
        return _ring(self.shape, self.columns, self.software) * self._tokens

    @cached_property
    def _logits(self) -> Array:
        return np.where(self.head, _logits(self.shape, self.columns, self._tokens, self.software), 0.0)

    @cached_property
    def _split(self) -> Array:
        """One between the two halves of a backward pass: all of the graph, recomputed or not, and gradients."""
        shape, columns, software = self.shape, self.columns, self.software
        kept = Kept.of(shape, columns, self.sequence, software)
        each = self._tokens * (kept.everything + kept.gradients) * software.fragmentation * self.blocks
        # The gradient of a stage's last product is what came, in the buffer that it came in; with sp it is gathered.
        came = np.where(columns.sp == 1, 0.0, self._outside)
        ends = np.where(self.head, _head_again(shape, columns, self._tokens, software), -came)
        return each + columns.virtual * ends

    def _norm_again(self) -> Array:
        """The second half begins with the backward pass of norms, which is in fp32: inputs, gradients, products."""
        tensors = 2 if self.software.working_bytes >= 4 else 4
        return tensors * 4 * self._tokens * self.shape.width / np.where(self.columns.sp == 1, self.columns.tp, 1)

    @cached_property
    def _outside(self) -> Array:
        """A micro-batch's tensor between blocks."""
        return self._tokens * self.shape.width * self.software.working_bytes

    def _earlier(self, moment: Flight, here: Array) -> Array:
        """Gradients of earlier micro-batches, beside all activations if one is begun after another has ended."""
        if self.software.gradient_buffers:
            return here
        begun = here / self._parts * (self.columns.count > moment.held)
        return np.where(moment.late, here, begun)

    @cached_property
    def _parts(self) -> Array:
        """A rank with several stages has done with all micro-batches of one before the next where there are pp."""
        return np.where(self.columns.count <= self.columns.pp, self.columns.virtual, 1)

    def _hops(self, moment: Flight) -> Array:
        """Tensors between stages that a rank keeps besides what its blocks keep.

        A buffer of its own for every micro-batch's gradient that comes, and for every activation (those of
        micro-batches in flight are the blocks' inputs); what it handed on, until that micro-batch's backward pass is
        over; and gradients that the first half of a backward pass leaves with its inputs. Within a rank nothing is
        copied.
        """
        columns = self.columns
        count, sends, takes = columns.count, columns.virtual - self.head, columns.virtual - self.embedding
        hops = sends * count + (sends - moment.within) * moment.held + takes * np.maximum(count - moment.held, 0)
        hops = hops + (takes - moment.within) * moment.answered
        part = self._outside / np.where(columns.sp == 1, columns.tp, 1)
        return np.where((columns.pp > 1) & self.software.hop_buffers, hops, 0) * part


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


def _head_again(shape: ModelShape, columns: Columns, tokens: Array, software: Software) -> Array:
    """Of the head between the halves of a backward pass: input and output gradient of its norm, gradients by logits."""
    w, part = software.working_bytes, tokens * shape.width / np.where(columns.sp == 1, columns.tp, 1)
    if not software.logits_at_once:
        return 2 * w * part + tokens * shape.vocab / columns.tp * (w + 4)
    # A loss in chunks has found both gradients by then, that of the table in fp32.
    return 3 * w * part + 4 * shape.vocab * shape.width / columns.tp


def _one_block_again(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> Array:
    """While a block runs backward: all of it once if it is recomputed, and the gradients of its widest tensors."""
    ups = 2 if shape.gated else 1
    gradients = software.working_bytes * (2 * shape.width + ups * shape.ffn_width / columns.tp)
    whole = activation_bytes_per_token(
        shape, columns.with_(recompute=np.zeros_like(columns.recompute)), sequence, software
    )
    kept = activation_bytes_per_token(shape, columns.with_(every=np.ones_like(columns.every)), sequence, software)
    return gradients + whole - kept
