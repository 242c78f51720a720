"""What FASOP says nodes, sends, all-reduces and memory cost. It knows one placement of GPUs; it partitions nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.fasop.tables import Gpu, Model
from fms_parallel.planner.hardware import read_data

Array = NDArray[Any]

BITS = 16
SHARED_INTRA, SHARED_INTER = 3.5, 1.05
"""What the seed divides links by that several pairs share."""
STATES = 18
"""Bytes per parameter: 16-bit weights and gradients, fp32 master copy and two moments."""


@dataclass(frozen=True)
class Job:
    """One configuration on one placement: `nodes` in order, each with `per_node` ranks, rank = (stage, replica, shard).

    Attributes:
        profile: (rows, 10) ms by node type. bits: of one element. extend: go beyond the last profiled row in
            proportion instead of pricing it like the last one.
    """

    model: Model
    nodes: tuple[Gpu, ...]
    per_node: int
    profile: dict[str, Array]
    tp: int
    dp: int
    pp: int
    mbs: int
    gbs: int
    bits: int = BITS
    extend: bool = False

    @property
    def micros(self) -> int:
        """Micro-batches of one replica."""
        return self.gbs // self.dp // self.mbs

    def node_of(self, rank: int) -> int:
        """Index of the node that holds a rank."""
        return rank // self.per_node

    @cached_property
    def elements(self) -> Array:
        """Activation elements that leave each node of the model."""
        h, s, b = self.model.width, self.model.sequence, self.mbs
        whole, shard = b * s * h, b * s * h / self.tp
        sizes = (whole, shard, shard, shard, whole, 4 * shard, 4 * shard, 4 * shard, whole, b * s * self.model.vocab)
        return np.array(sizes, dtype=float)[self.model.columns]

    @cached_property
    def parameters(self) -> Array:
        """Parameters of each node of the model on one rank."""
        h, kv = self.model.width, self.model.width**2 * self.model.kv_heads / self.model.heads
        table = self.model.vocab * h
        sizes = (table, h * h, kv, kv, h * h, 4 * h * h, 0, 4 * h * h, 4 * h * h, table)
        return np.array(sizes, dtype=float)[self.model.columns] / self.tp

    def node_seconds(self, gpu: str) -> Array:
        """Seconds of one micro-batch, forward and backward (twice the forward), of each node of the model."""
        rows = read_data("fasop.json")["rows"]
        row = next((i for i, size in enumerate(rows) if self.mbs <= size), len(rows) - 1)
        table = self.profile[gpu]
        factor = self.mbs / rows[len(table) - 1] if self.extend and row >= len(table) else 1.0
        return (3 * table[min(row, len(table) - 1)] / 1000 * factor)[self.model.columns].astype(np.float32)

    @property
    def beyond_profile(self) -> bool:
        """Whether the micro-batch is larger than the largest profiled one."""
        rows = read_data("fasop.json")["rows"]
        return any(self.mbs > rows[len(table) - 1] for table in self.profile.values())

    def stage_types(self) -> list[str]:
        """The slower type of the nodes that each stage touches."""
        width = self.dp * self.tp
        slow = {name: float(table[:, 1:9].sum()) for name, table in self.profile.items()}
        found = []
        for stage in range(self.pp):
            ranks = range(stage * width, (stage + 1) * width)
            names = {self.nodes[self.node_of(rank)].name for rank in ranks}
            found.append(max(sorted(names), key=lambda name: slow[name]))
        return found

    def send_rate(self, stage: int) -> float:
        """Bits per second from a stage to the next: the slowest pair."""
        width = self.dp * self.tp
        return min(self._pair(rank, rank + width) for rank in range(stage * width, (stage + 1) * width))

    def _pair(self, a: int, b: int) -> float:
        here, there = self.node_of(a), self.node_of(b)
        if here != there:
            return min(self.nodes[here].inter, self.nodes[there].inter) / (self.dp * self.tp * SHARED_INTER)
        gpu = self.nodes[here]
        return gpu.within(a % self.per_node, b % self.per_node, gpu.send, SHARED_INTRA)

    @cached_property
    def send_seconds(self) -> Array:
        """(nodes of the model, pp - 1): seconds to hand on after each node, from each stage."""
        if self.pp == 1:
            return np.zeros((len(self.model.columns), 1), dtype=np.float32)
        columns = [self.elements * self.bits / self.send_rate(stage) for stage in range(self.pp - 1)]
        return np.stack(columns, axis=1).astype(np.float32)

    def replica_seconds(self, parameters: float, slow_type: str) -> float:
        """Seconds of the ring all-reduce of gradients of one stage; only the last shard's ring is looked at."""
        if self.dp == 1:
            return 0.0
        shard = self.tp - 1
        ring = [d * self.tp + shard for d in range(self.dp)]
        pairs = zip(ring, [*ring[1:], ring[0]], strict=True)
        rate = min(self._reduce_rate(a, b) for a, b in pairs)
        if self.tp * self.dp >= self.per_node:
            rate /= self.tp
        elif self.tp > 1 and slow_type in ("A10", "A40"):
            rate /= self.per_node / self.dp
        return 2 * (self.dp - 1) * parameters * self.bits / (self.dp * rate)

    def _reduce_rate(self, a: int, b: int) -> float:
        here, there = self.node_of(a), self.node_of(b)
        if here != there:
            return min(self.nodes[here].inter, self.nodes[there].inter)
        gpu = self.nodes[here]
        return gpu.within(a % self.per_node, b % self.per_node, gpu.allreduce, 1.0)

    def embedding_seconds(self) -> float:
        """Seconds of the all-reduce of the embedding between first and last stage, also of untied models."""
        if self.pp == 1:
            return 0.0
        far = (self.pp - 1) * self.dp * self.tp
        rate = min(self._reduce_rate(r, r + far) for r in range(self.dp * self.tp))
        return self.model.width * self.model.vocab * self.bits / (rate / min(self.dp, self.per_node)) / self.tp

    def stage_memory(self, partition: list[int], corrected: bool = False) -> list[float]:
        """2^30 bytes of each stage: 18 per parameter, and activation elements counted as bytes, as the seed does.

        `corrected`: two bytes per element, and the micro-batches in flight of each stage instead of the first one's.
        """
        kept = self.elements.copy()
        kept[-1] = self.mbs * self.model.sequence * self.model.width
        found, start = [], 0
        for stage, count in enumerate(partition):
            part = slice(start, start + count)
            start += count
            flight = min(self.pp - stage if corrected else self.pp, self.micros)
            activations = flight * kept[part].sum() * (self.bits / 8 if corrected else 1)
            found.append(float(STATES * self.parameters[part].sum() + activations) / 2**30)
        return found
