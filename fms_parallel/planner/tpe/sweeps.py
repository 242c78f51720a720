"""Sweeps of transformer-perf-estimates: systems x NVLink domains over device counts, bandwidth x capacity, and
FLOPs x capacity x bandwidth. One row per point with its best configuration, or without one where nothing fits.

It knows which numbers of a system are varied; each point is one search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from fms_parallel.errors import ConfigError
from fms_parallel.planner.tpe.search import search
from fms_parallel.planner.tpe.system import Model, System


def point(model: Model, system: System, strategy: str, gpus: int, batch: int, compat: bool) -> dict[str, Any]:
    """The best configuration of one system and size, with what was varied."""
    row: dict[str, Any] = {
        "system": system.name,
        "nvlink_size": system.nvlink_size,
        "gpus": gpus,
        "matrix_flops_fp16": system.matrix_flops_fp16,
        "hbm_bandwidth": system.hbm_bandwidth,
        "hbm_capacity": system.hbm_capacity,
        "t": None,
    }
    try:
        found = search(model, system, strategy, gpus, batch, 1, compat)
    except ConfigError:  # no candidate at this size is a point without an answer
        return row
    return {**row, **found.rows()[0]} if found.feasible else row


def over_systems(
    model: Model,
    systems: Sequence[System],
    domains: Sequence[int],
    strategy: str,
    sizes: Sequence[int],
    batch: int,
    compat: bool = True,
) -> Iterator[dict[str, Any]]:
    """Every system with every NVLink domain at every number of devices."""
    for system, domain, gpus in product(systems, domains, sizes):
        yield point(model, replace(system, nvlink_size=domain), strategy, gpus, batch, compat)


def over_memory(
    model: Model,
    system: System,
    strategy: str,
    gpus: int,
    batch: int,
    bandwidths: Sequence[float],
    capacities: Sequence[float],
    flops: Sequence[float] = (),
    compat: bool = True,
) -> Iterator[dict[str, Any]]:
    """Every HBM bandwidth (GB/s) with every capacity (GB), and every matrix rate (TFLOP/s; vector rates in step)."""
    for rate, bandwidth, capacity in product(flops or (system.matrix_flops_fp16,), bandwidths, capacities):
        vector = system.vector_flops_fp16 * rate / system.matrix_flops_fp16
        varied = replace(
            system, matrix_flops_fp16=rate, vector_flops_fp16=vector, hbm_bandwidth=bandwidth, hbm_capacity=capacity
        )
        yield point(model, varied, strategy, gpus, batch, compat)
