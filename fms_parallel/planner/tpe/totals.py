"""From layers to a step: pipeline, data parallelism, memory. It knows configurations; it enumerates none.

t = (forward + backward) * micro-batches * blocks of a stage + sends + bubble + what data parallelism does not hide
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.tpe.layers import BLOCKS, Grid, Layer, timed
from fms_parallel.planner.tpe.system import Model, System, collective

Array = NDArray[Any]


@dataclass(frozen=True)
class Configurations:
    """One row per configuration: degrees, micro-batch, SUMMA panels, and members of each axis in one NVLink domain."""

    dp: Array
    tp1: Array
    tp2: Array
    pp: Array
    mbs: Array
    nb: Array
    nv1: Array
    nv2: Array
    nv_dp: Array
    nv_pp: Array

    def __len__(self) -> int:
        return len(self.dp)

    def take(self, which: Any) -> Configurations:
        """The rows that an index picks."""
        return Configurations(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


@dataclass(frozen=True)
class Totals:
    """Seconds of a step and GB of a device, with the seed's own parts."""

    t: Array
    mem: Array
    throughput: Array
    t_comp: Array
    t_mem: Array
    t_tp_comm: Array
    t_dp_comm: Array
    t_pp_comm: Array
    t_bubble: Array
    flops_per_gpu: Array
    wts_mem: Array
    wts_grad_mem: Array
    wts_optimizer_states_mem: Array
    acts_mem: Array


@dataclass(frozen=True)
class Block:
    """Sums over the layers of one block: seconds by kind and direction, GB, FLOP."""

    forward: Array
    backward: Array
    compute: Array
    memory: Array
    exchange: Array
    flops: Array
    weights: Array
    buffers: Array
    p2p: Array

    @classmethod
    def of(cls, layers: list[Layer], system: System, compat: bool) -> Block:
        """Every layer in both directions, added up."""
        times = [(timed(x, system, False, compat), timed(x, system, True, compat)) for x in layers]
        total = lambda values: np.asarray(sum(values))  # noqa: E731 - one word for eight sums
        return cls(
            forward=total(f.total for f, _ in times),
            backward=total(b.total for _, b in times),
            compute=total(f.compute + b.compute for f, b in times),
            memory=total(f.memory + b.memory for f, b in times),
            exchange=total(f.exchange + b.exchange for f, b in times),
            flops=total((x.flops[0] + x.flops[1]) * 1e-12 for x in layers),
            weights=total(x.weights for x in layers),
            buffers=total(x.buffer for x in layers),
            p2p=next(x.buffer for x in layers if x.name == "ln1"),
        )

    def spread(self, back: Array, size: int) -> Block:
        """One entry per configuration from one per distinct block."""
        return Block(**{f.name: np.broadcast_to(getattr(self, f.name), (size,))[back] for f in fields(self)})


def totals(model: Model, system: System, strategy: str, batch: int, c: Configurations, compat: bool) -> Totals:
    """Totals of every configuration; blocks that are alike are computed once."""
    grid, back = _distinct(c)
    block = Block.of(BLOCKS[strategy](model, system, grid, compat), system, compat).spread(back, len(grid.m1))
    micros = batch // c.dp // c.mbs
    stage = model.depth // c.pp
    replicas = c.dp * c.tp2 if strategy == "2d-seqp" else c.dp
    near = c.nv_dp * c.nv2 if strategy == "2d-seqp" else c.nv_dp
    hop = _hop(system, block.p2p, c, compat)
    sends = micros * 2 * hop
    core = (block.forward + block.backward) * micros * stage
    bubble = (c.pp - 1) * ((core + sends) if compat else core) / micros
    data = _data_parallel(system, block, stage, replicas, near, compat)
    weights = block.weights * stage
    optimizer = 6 * weights / replicas
    activations = block.buffers * stage * np.minimum(c.pp, micros)
    t = core + sends + bubble + data
    return Totals(
        t=t,
        mem=2 * weights + optimizer + activations,
        throughput=batch / t,
        t_comp=block.compute * micros * stage,
        t_mem=block.memory * micros * stage,
        t_tp_comm=block.exchange * micros * stage,
        t_dp_comm=data,
        t_pp_comm=sends,
        t_bubble=bubble,
        flops_per_gpu=block.flops * micros * stage,
        wts_mem=weights,
        wts_grad_mem=weights,
        wts_optimizer_states_mem=optimizer,
        acts_mem=activations,
    )


def _distinct(c: Configurations) -> tuple[Grid, Array]:
    key = c.tp1
    for column in (c.tp2, c.nv1, c.nv2, c.mbs, c.nb):
        key = key * (int(column.max()) + 1) + column
    _, first, back = np.unique(key, return_index=True, return_inverse=True)
    one = c.take(first)
    return Grid(one.tp1, one.tp2, one.nv1, one.nv2, one.mbs, one.nb), back


def _hop(system: System, volume: Array, c: Configurations, compat: bool) -> Array:
    """Seconds of one micro-batch's send, mean over the links of the pipeline."""
    slow_time = collective(system, "p2p", volume, 2, 1, compat)
    if system.nvlink_size == 1:
        return np.where(c.pp == 1, 0.0, slow_time)
    fast_time = collective(system, "p2p", volume, 2, 2, compat)
    links = np.maximum(c.pp - 1, 1)
    slow = (c.pp / c.nv_pp - 1).astype(np.int64)
    mixed = ((links - slow) * fast_time + slow * (0.0 if compat else slow_time)) / links
    return np.where(c.pp == 1, 0.0, np.where(c.nv_pp == 1, slow_time, mixed))


def _data_parallel(system: System, block: Block, stage: Array, n: Array, top: Array, compat: bool) -> Array:
    """Reduce-scatter of gradients behind the backward pass, all-gather of parameters behind the forward pass."""
    time: Array = np.zeros(len(n))
    for kind, hidden in (("reducescatter", block.backward), ("allgather", block.forward)):
        once = collective(system, kind, block.weights, n, top, compat)
        time = time + once + (stage - 1) * np.maximum(once - hidden, 0.0)
    return np.where(n == 1, 0.0, time)
