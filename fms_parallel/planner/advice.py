"""What to change when no layout works: the smallest cluster or the change that would help, found by searching again."""

from __future__ import annotations

from dataclasses import replace

from fms_parallel.errors import ConfigError
from fms_parallel.planner.api import TOO_LARGE, TOO_SLOW, Planner, Result, search_with
from fms_parallel.planner.hardware import Cluster
from fms_parallel.planner.space import Space

LARGEST = 1 << 13
"""Devices up to which a larger cluster is tried."""


def step_limit(cluster: Cluster, steps: int | None, hours: float | None, dollars: float | None) -> float | None:
    """Seconds that one step may take so that `steps` of them keep a deadline and a budget.

    Raises:
        ConfigError: a limit without `--steps`, or one that nothing can keep.
    """
    for flag, value in (("--steps", steps), ("--deadline", hours), ("--budget", dollars)):
        if value is not None and not value > 0:
            raise ConfigError(f"{flag} {value:g}: needs a number > 0.")
    if hours is None and dollars is None:
        return None
    if steps is None:
        raise ConfigError("--deadline and --budget need --steps N: the optimizer steps of the whole run.")
    limits = [hours * 3600 / steps] if hours is not None else []
    if dollars is not None and cluster.price_per_hour:
        limits.append(dollars / cluster.price_per_hour * 3600 / steps)
    return min(limits, default=None)


def nothing_fits(planner: Planner, space: Space, result: Result, limit: float | None) -> ConfigError:
    """The error for a search without results: what stood in the way, and the smallest change that works."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.rejected.items(), key=lambda x: -x[1]))
    if not result.considered:
        return ConfigError(_batch_message(planner, space))
    head = f"no layout of {planner.model.name} on {planner.cluster} works ({reasons})."
    ways = [way for way in (_more_devices(planner, space, limit), _offload(planner, space, limit)) if way]
    if limit is not None and result.rejected.get(TOO_SLOW):
        best = search_with(planner, space, 1).results[0].step_time_s
        ways.append(f"a limit of {best:.3g} s per step on this cluster (it is {limit:.3g} s)")
    if limit is None and not ways and result.rejected.get(TOO_LARGE):
        ways.append(f"no cluster of up to {LARGEST} such devices holds it: shorten --seq or choose a larger device")
    if not ways and (fewer := _fewer_devices(planner, space, limit)):
        ways.append(fewer)
    if any(word.startswith(("pin", "exclude")) for word in result.rejected):
        ways.append("drop a --pin or --exclude")
    return ConfigError(f"{head} What would: {'; or '.join(ways) or 'another model, --seq or limit'}.")


def _batch_message(planner: Planner, space: Space) -> str:
    batch, gpus = planner.workload.global_batch, planner.cluster.gpus
    nearest = -(-batch // gpus) * gpus
    return (
        f"--global-batch {batch} cannot be divided over any layout of {gpus} devices that pins and exclusions leave: "
        f"use a multiple of the replicas, as {nearest}, or allow more axes."
    )


def _more_devices(planner: Planner, space: Space, limit: float | None) -> str | None:
    device, count = planner.cluster.groups[0]
    if len(planner.cluster.groups) > 1:
        return None
    while count < LARGEST:
        count *= 2
        larger = replace(planner, cluster=Cluster(((device, count),)))
        if search_with(larger, space, 1, limit).results:
            return f"--gpus {device.name}:{count} (the smallest that works when doubling)"
    return None


def _fewer_devices(planner: Planner, space: Space, limit: float | None) -> str | None:
    """For a number of devices that nothing divides: the next power of two below it that works."""
    device, count = planner.cluster.groups[0]
    power = 1 << (count.bit_length() - 1)
    for fewer in (power >> n for n in range(power.bit_length())):
        smaller = replace(planner, cluster=Cluster(((device, fewer),)))
        if fewer < count and search_with(smaller, space, 1, limit).results:
            return f"--gpus {device.name}:{fewer}, which more degrees divide"
    return None


def _offload(planner: Planner, space: Space, limit: float | None) -> str | None:
    if "optimizer_state" in space.offloads:
        return None
    wider = replace(space, offloads=("optimizer_state",))
    return "--offload (optimizer state in host memory)" if search_with(planner, wider, 1, limit).results else None
