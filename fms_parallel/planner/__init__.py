"""The planner: which layout is fastest for a model on a cluster, whether it fits, and why. It needs no process group.

    from fms_parallel.planner import Cluster, Workload, plan
    best = plan("llama:3.1-70b", Cluster.parse("h100:64"), Workload(global_batch=1024, sequence=8192))[0]
    best.layout        # what get_model and train_causal.py take

`fms-plan` is the same on a command line. Names are loaded when they are first used, so that `fms-plan --help` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ROOMS = {
    **dict.fromkeys(("plan", "search", "Estimate", "Result", "Planner"), "api"),
    **dict.fromkeys(("Cluster", "Device", "Link", "load_devices"), "hardware"),
    **dict.fromkeys(("Model", "find_model"), "catalog"),
    **dict.fromkeys(("choose", "machine_at_hand"), "machine"),
    "Workload": "operators",
    "Space": "space",
    "Experts": "experts",
    "Constants": "efficiency",
    "Software": "software",
}

__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOMS]
