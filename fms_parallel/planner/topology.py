"""How long a collective takes over a hierarchy of links: rings and trees on nodes of switched devices.

It knows sizes, links and the placement of a group; it knows nothing of models. All arguments may be numpy arrays of one
shape, so that thousands of layouts cost one call.

A group of an axis with `degree` members at distance `stride` (the ranks of all inner axes) has `inside` members in a
node; the rest of the node belongs to neighbouring groups of the same axis, each with its own wires.
Formula: ring (n - 1) * (latency + bytes / n / bandwidth); NCCL takes the faster of ring and double tree for all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.hardware import Device, Link

Array = NDArray[Any]

SWITCHED = ("allgather", "reducescatter", "allreduce", "broadcast", "reduce", "alltoall")


@dataclass(frozen=True)
class Group:
    """Where the members of one group sit: `degree` in all, `inside` of them in each node."""

    degree: Array
    inside: Array

    @classmethod
    def of(cls, degree: Any, stride: Any, per_node: int) -> Group:
        """The group of a mesh axis whose inner axes have `stride` ranks in all."""
        degree, stride = np.asarray(degree), np.asarray(stride)
        return cls(degree, np.clip(per_node // stride, 1, degree))

    @property
    def nodes(self) -> Array:
        """Nodes that the group touches."""
        return -(-self.degree // self.inside)


@dataclass(frozen=True)
class Network:
    """The links of a cluster: devices of one node share `intra`, nodes share `inter`."""

    intra: Link
    inter: Link

    @classmethod
    def of(cls, device: Device) -> Network:
        """The network that a device's data sheet describes."""
        return cls(device.intra, device.inter)

    def seconds(self, collective: str, size: Any, group: Group) -> Array:
        """Seconds of one collective. `size`: bytes of the whole (gathered, or to be reduced) tensor.

        Raises:
            ConfigError: an unknown collective.
        """
        if collective == "p2p":
            return self.p2p(size, group)
        if collective not in SWITCHED:
            raise ConfigError(unknown("collective", collective, (*SWITCHED, "p2p")))
        size = np.asarray(size, dtype=float)
        if collective == "alltoall":
            return self._all_to_all(size, group)
        ring = self._ring(size, group)
        if collective == "allreduce":
            ring = np.minimum(2 * ring, self._tree(size, group))
        return np.where((group.degree > 1) & (size > 0), ring, 0.0)

    def p2p(self, size: Any, group: Group) -> Array:
        """Seconds to hand `size` bytes to the neighbour on an axis; the slowest of its hops."""
        size = np.asarray(size, dtype=float)
        across = group.nodes > 1
        rate = np.where(across, _rate(self.inter, 1), _rate(self.intra, 1))
        latency = np.where(across, self.inter.latency_us, self.intra.latency_us) * 1e-6
        return np.where((group.degree > 1) & (size > 0), latency + size / rate, 0.0)

    def _transfer(self, size: Array, group: Group) -> Array:
        """Seconds that the busiest wire needs to pass a tensor of `size` bytes once around."""
        inside, nodes = group.inside, group.nodes
        part = (group.degree - 1) / group.degree
        inner = np.where(inside > 1, 1 / _rate(self.intra, inside), 0.0)
        outer = np.where(nodes > 1, 1 / (inside * _rate(self.inter, inside)), 0.0)
        return size * part * np.maximum(inner, outer)

    def _ring(self, size: Array, group: Group) -> Array:
        hops = group.degree - 1
        slow = np.where(group.nodes > 1, self.inter.latency_us, self.intra.latency_us)
        return hops * slow * 1e-6 + self._transfer(size, group)

    def _tree(self, size: Array, group: Group) -> Array:
        levels = np.ceil(np.log2(np.maximum(group.nodes, 1)))
        latency = 2 * levels * self.inter.tree_us + 2 * (group.inside - 1) * self.intra.tree_us
        return latency * 1e-6 + 2 * self._transfer(size, group)

    def _all_to_all(self, size: Array, group: Group) -> Array:
        """Every member keeps 1/n of its part; what leaves the node passes the member's own wire."""
        own = size / group.degree
        away = (group.degree - group.inside) / group.degree
        near = (group.inside - 1) / group.degree
        rate = np.maximum(own * near / _rate(self.intra, group.inside), own * away / _rate(self.inter, 1))
        latency = np.where(group.nodes > 1, self.inter.latency_us, self.intra.latency_us) * 1e-6
        return np.where((group.degree > 1) & (size > 0), latency * np.log2(np.maximum(group.degree, 2)) + rate, 0.0)


def _rate(link: Link, members: Any) -> Array:
    """Bytes per second of one member's wire when `members` of its group drive theirs."""
    table = np.asarray(link.efficiency)
    return link.gb_s * 1e9 * table[np.clip(np.asarray(members), 1, len(table)) - 1]
