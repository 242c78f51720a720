"""Collectives against hand-computed rings and trees, and against published NCCL timings."""

from __future__ import annotations

import numpy as np
import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.planner.hardware import Link, load_devices
from fms_parallel.planner.topology import Group, Network

NET = Network(Link(100, 2, 3, (0.5, 0.8)), Link(10, 5, 20, (0.5, 0.6, 0.9)))


def one(collective: str, size: float, degree: int, inside: int) -> float:
    return float(NET.seconds(collective, size, Group(np.array(degree), np.array(inside))))


@pytest.mark.parametrize(
    ("degree", "inside", "wire"),
    [(4, 1, 10e9 * 0.5), (8, 2, 2 * 10e9 * 0.6), (2, 2, 100e9 * 0.8), (12, 4, 4 * 10e9 * 0.9)],
)
def test_allgather_is_a_ring_over_the_slowest_wire(degree: int, inside: int, wire: float) -> None:
    latency = 2e-6 if degree == inside else 5e-6
    expected = (degree - 1) * latency + 1e9 * (degree - 1) / degree / wire
    assert one("allgather", 1e9, degree, inside) == pytest.approx(expected, rel=1e-12)


def test_allreduce_is_two_rings_when_large_and_a_tree_when_small() -> None:
    ring = one("allgather", 4e9, 2, 2) + one("reducescatter", 4e9, 2, 2)
    assert one("allreduce", 4e9, 2, 2) == pytest.approx(ring, rel=1e-12)
    # 64 nodes: 6 levels up and down, against 126 hops of a ring
    assert one("allreduce", 8.0, 64, 1) == pytest.approx(2 * 6 * 20e-6, rel=1e-3)


def test_one_member_and_nothing_to_send_take_no_time() -> None:
    for name in ("allgather", "allreduce", "p2p", "alltoall"):
        assert one(name, 1e9, 1, 1) == 0
        assert one(name, 0, 8, 4) == 0


def test_group_counts_members_inside_a_node() -> None:
    group = Group.of(np.array([4, 4, 4, 2]), np.array([1, 4, 8, 16]), 8)
    assert group.inside.tolist() == [4, 2, 1, 1]
    assert group.nodes.tolist() == [1, 2, 4, 2]


def test_unknown_collective_is_named() -> None:
    with pytest.raises(ConfigError, match="allreduce"):
        one("alreduce", 1, 2, 2)


# NCCL tests on Perlmutter (4 A100 and 4 NICs per node), out of place; transformer-perf-estimates' sample data.
PERLMUTTER = [
    ("allgather", 512 << 20, 16, 2, 33.0),
    ("allgather", 1 << 30, 8, 2, 33.3),
    ("allgather", 4 << 30, 8, 4, 70.4),
    ("allreduce", 8 << 30, 1, 4, 229.7),
    ("allreduce", 512 << 20, 8, 4, 69.4),
    ("reducescatter", 4 << 30, 32, 2, 33.5),
    ("reducescatter", 256 << 20, 64, 1, 13.5),
]


@pytest.mark.parametrize(("operation", "size", "nodes", "inside", "bus_gb_s"), PERLMUTTER)
def test_perlmutter_is_within_ten_percent_of_nccl(
    operation: str, size: int, nodes: int, inside: int, bus_gb_s: float
) -> None:
    n = nodes * inside
    measured = size * (n - 1) / n / (bus_gb_s * 1e9) * (2 if operation == "allreduce" else 1)
    network = Network.of(load_devices()["a100-perlmutter"])
    predicted = float(network.seconds(operation, size, Group(np.array(n), np.array(inside))))
    assert predicted == pytest.approx(measured, rel=0.1)
