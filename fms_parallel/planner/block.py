"""Seconds of one block and of the model's ends, for one micro-batch: computing, and talking within tp, cp and ep.

It knows operators and collectives; it knows nothing of pipelines, of data parallelism and of whole steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import Columns
from fms_parallel.planner.operators import embedding_operators, head_operators, tokens_of
from fms_parallel.planner.timing import Seconds
from fms_parallel.planner.topology import Group

if TYPE_CHECKING:
    from fms_parallel.planner.cost import CostModel

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Seconds of one block and micro-batch: computing, and talking within tp, cp and ep."""

    forward: Array
    backward: Array
    core: Array
    matmuls: Array
    last: Array
    tp: Array
    gathers: Array
    cp_forward: Array
    cp_backward: Array
    ep: Array

    @classmethod
    def of(cls, model: CostModel, columns: Columns) -> Block:
        """Per distinct (tp, cp, sp, tp_parts, micro)."""
        seconds: Seconds = model.time_source.total(model.block_operators(columns))
        cp_forward, cp_backward = _context(model, columns, seconds)
        parts = (seconds.forward, seconds.backward, seconds.core, seconds.matmuls, seconds.last)
        shape = columns.tp.shape
        # Column-parallel matrices, one region's at a time, are about a quarter of a block's products.
        regions = np.where(columns.tp_parts == 1, 1, 2)
        tensor = regions * _tensor(model, columns), regions * _gather_again(model, columns, seconds.matmuls / 4)
        every = (*parts, *tensor, cp_forward, cp_backward, _expert(model, columns))
        return cls(*(np.broadcast_to(np.asarray(part, dtype=float), shape) for part in every))

    def spread(self, back: Array) -> Block:
        """Per row."""
        return Block(**{f.name: getattr(self, f.name)[back] for f in fields(self)})


def _tensor(model: CostModel, columns: Columns) -> Array:
    """Seconds of tp's collectives around one region, of one pass over it, that do not hide behind computation."""
    size = tokens_of(columns, model.workload.sequence) * model.shape.width * model.software.working_bytes
    group = Group.of(columns.tp, 1, model.device.per_node)
    halves = model.collective("allgather", size, group) + model.collective("reducescatter", size, group)
    whole = model.collective("allreduce", size, group)
    return np.where(columns.sp == 1, halves, whole) * (1 - model.software.overlap_tp * model.constants.overlap)


def _gather_again(model: CostModel, columns: Columns, products: Any) -> Array:
    """Seconds of gathering a region's input again in the backward pass, as far as it sticks out behind the `products`
    that find this input's gradient."""
    if not model.software.gather_again:
        return np.zeros(columns.tp.shape)
    size = tokens_of(columns, model.workload.sequence) * model.shape.width * model.software.working_bytes
    gather = model.collective("allgather", size, Group.of(columns.tp, 1, model.device.per_node))
    return np.where(columns.sp == 1, np.maximum(gather - model.constants.overlap * products, 0.0), 0.0)


def _context(model: CostModel, columns: Columns, seconds: Seconds) -> tuple[Array, Array]:
    """Seconds that keys and values of other cp ranks are waited for: a ring hides behind attention's own arithmetic."""
    shape = model.shape
    kv = 2 * np.maximum(shape.kv_heads / columns.tp, 1) * shape.head_width
    size = tokens_of(columns, model.workload.sequence) * kv * model.software.working_bytes
    group = Group.of(columns.cp, columns.tp, model.device.per_node)
    step = model.collective("p2p", size, group)
    hidden = model.constants.overlap * seconds.core / np.maximum(columns.cp, 1)
    pieces = model.constants.ring * np.log2(columns.cp) * seconds.core
    forward = (columns.cp - 1) * np.maximum(step - hidden, 0.0) + pieces
    # Keys and values go around again, and their gradients behind them.
    software = model.software
    back = 1 + max(software.ring_gradient_bytes, software.working_bytes) / software.working_bytes
    backward = (columns.cp - 1) * np.maximum(back * step - 2.5 * hidden, 0.0) + 2.5 * pieces
    return forward, backward


def _expert(model: CostModel, columns: Columns) -> Array:
    """Seconds of the two all-to-alls of one pass over a block."""
    if model.experts is None or model.experts.ep == 1:
        return np.zeros(columns.tp.shape)
    size = model.experts.exchanged_bytes(model.shape, columns, model.workload.sequence, model.software)
    group = Group.of(np.full(columns.tp.shape, model.experts.ep), columns.tp * columns.cp, model.device.per_node)
    return 2 * model.collective("alltoall", size, group)


@dataclass(frozen=True)
class Ends:
    """Seconds of what stands before the first block and after the last one, forward and backward."""

    embedding_forward: Array
    embedding_backward: Array
    head_forward: Array
    head_backward: Array

    @classmethod
    def of(cls, model: CostModel, columns: Columns) -> Ends:
        """Per distinct (tp, cp, sp, tp_parts, micro)."""
        sequence, source = model.workload.sequence, model.time_source
        embedding = source.total(embedding_operators(model.shape, columns, sequence, model.software))
        head = source.total(head_operators(model.shape, columns, sequence, model.software))
        # Forward: the gathered input of the head; backward: its gradient. The loss exchanges a few numbers per token.
        talk = _tensor(model, columns)
        again = _gather_again(model, columns, head.matmuls)
        parts = (embedding.forward + talk, embedding.backward, head.forward, head.backward + talk + again)
        return cls(*(np.broadcast_to(np.asarray(part, dtype=float), columns.tp.shape) for part in parts))

    def spread(self, back: Array) -> Ends:
        """Per row."""
        return Ends(**{f.name: getattr(self, f.name)[back] for f in fields(self)})
