"""What a run has learned (how fast its machine is, what layouts and changes took), as JSON values for a checkpoint.

    learned(adaptation, hardware)     ->  {"machine": [...], "hardware": {...}, "adaptation": {...}}
    remembered(values, hardware)      ->  the hardware that the numbers are relative to; None on another machine

What layouts took is known relative to what was predicted, so the measured hardware is kept with it. It knows values.
"""

from __future__ import annotations

from typing import Any

from fms_parallel.dynamic.adaptation import Adaptation
from fms_parallel.dynamic.hardware import HardwareProfile
from fms_parallel.planner.hardware import Cluster

Hardware = HardwareProfile | Cluster


def learned(adaptation: Adaptation, hardware: Hardware) -> dict[str, Any]:
    """Plain values, the same on every rank. Collective."""
    return {"machine": machine(hardware), "hardware": _plain(hardware), "adaptation": adaptation.learned()}


def kept(adaptation: Adaptation, hardware: Hardware) -> dict[str, Any]:
    """What this rank knows, for a job that goes on with other members. Not collective."""
    return {"hardware": _plain(hardware), "adaptation": adaptation.known_here()}


def for_members(values: dict[str, Any], described: Hardware | None, ranks: int) -> Cluster:
    """Machines like those that `values` were learned on, for another number of ranks."""
    if values["hardware"] is not None:
        return HardwareProfile.of_json(values["hardware"]).cluster(ranks)
    assert isinstance(described, Cluster)
    return Cluster(((described.device, ranks),))


def _plain(hardware: Hardware) -> dict[str, Any] | None:
    return hardware.as_json() if isinstance(hardware, HardwareProfile) else None


def remembered(values: dict[str, Any] | None, hardware: Hardware) -> Hardware | None:
    """The hardware as it was when `values` were learned, or None: there are none, or the machine is another one."""
    if not values or values["machine"] != machine(hardware):
        return None
    return hardware if values["hardware"] is None else HardwareProfile.of_json(values["hardware"])


def machine(hardware: Hardware) -> list[str]:
    """What makes it another machine: the device and the host of every rank, or the cluster that was described."""
    if isinstance(hardware, Cluster):
        return [str(hardware)]
    return [f"{name} on {host}" for name, host in zip(hardware.names, hardware.hosts, strict=True)]
