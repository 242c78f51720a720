"""The machine at hand as a cluster, and the fastest layout that it and the strategies can run: what `auto` means.

It knows how CUDA and the data files name devices, and it asks its caller what can be run; it knows no strategy. An
unknown device is an error, never a similar one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from fms_parallel.errors import ConfigError, FmsError, unknown
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner.advice import nothing_fits
from fms_parallel.planner.api import Estimate, Planner, Result, search_with
from fms_parallel.planner.hardware import GIB, Cluster, Device
from fms_parallel.planner.space import Space

CPU = "cpu"
CLOSE = 0.12
"""A device reports less memory than its data sheet, at most by this part."""
TRIED = 512
"""Layouts of a ranking that are offered to the strategies, fastest first."""


def machine_at_hand(
    device_type: str, world: int, per_node: int, local_rank: int, known: Mapping[str, Device]
) -> Cluster:
    """`world` devices of the kind that this rank has, in nodes of `per_node`.

    Raises:
        ConfigError: a GPU that no device file describes.
    """
    if device_type == CPU:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / per_node
        device = replace(known[CPU], memory_gb=memory)
    else:
        import torch

        properties = torch.cuda.get_device_properties(local_rank)
        device = recognise(properties.name, properties.total_memory / GIB, known)
    return Cluster(((replace(device, per_node=per_node), world),))


def recognise(name: str, memory_gb: float, known: Mapping[str, Device]) -> Device:
    """The device that CUDA calls `name`, with the memory that it reports.

    Raises:
        ConfigError: none of the known kinds, or none of its sizes.
    """
    kind = next((word for word in re.split(r"[\s-]+", name.lower()) if word in known), None)
    if kind is None:
        raise ConfigError(f"{unknown('GPU', name, known)} Say which with --gpus, or describe it with --devices.")
    sizes = [d for key, d in known.items() if re.fullmatch(rf"{re.escape(kind)}(-\d+gb)?", key)]
    nearest = min(sizes, key=lambda device: abs(device.memory_gb - memory_gb))
    if abs(nearest.memory_gb - memory_gb) > CLOSE * nearest.memory_gb:
        has = ", ".join(f"{device.name} with {device.memory_gb:g}" for device in sizes)
        raise ConfigError(
            f"GPU {name!r} has {memory_gb:.1f} GiB; the device files know {has} GiB. Say which with --gpus, or "
            "describe it with --devices."
        )
    return replace(nearest, memory_gb=memory_gb)


def choose(planner: Planner, space: Space, runs: Callable[[Estimate], None]) -> tuple[Estimate, Result]:
    """The fastest estimate that fits and that `runs` accepts, and the search that found it.

    Args:
        runs: raises an error of this library for what cannot be run.
    Raises:
        ConfigError: nothing fits, or nothing of what fits can be run; the message says why.
    """
    result = search_with(planner, space, TRIED)
    if not result.results:
        raise nothing_fits(planner, space, result, None)
    refusals: dict[str, ParallelLayout] = {}
    for estimate in result.results:
        try:
            runs(estimate)
        except FmsError as error:
            refusals.setdefault(str(error), estimate.layout)
            continue
        return estimate, result
    reason, layout = next(iter(refusals.items()))
    raise ConfigError(
        f"none of the {len(result.results)} fastest layouts that fit can be run; {str(layout)!r} for one: {reason}"
    )
