"""Changing the layout of a running job: because it pays, or because a rank died.

from fms_parallel.dynamic import train
train(model, data, steps=10_000, batch_size=64)
"""

from __future__ import annotations

from typing import Any

from fms_parallel.phases import Phase as Phase

_HOMES = {
    **dict.fromkeys(("train", "AdaptiveLayout"), "adaptive"),
    **dict.fromkeys(("ParallelismManager", "train_step", "share_of_batch"), "manager"),
    **dict.fromkeys(("HardwareProfiler", "HardwareProfile"), "hardware"),
    **dict.fromkeys(("ModelProfiler", "ModelProfile", "DatasetProfiler", "DatasetProfile"), "workload"),
    **dict.fromkeys(("RulePolicy", "ThompsonPolicy", "Policy"), "policy"),
    "KnowledgePolicy": "knowledge",
    "DynamicStrategySelector": "selector",
    **dict.fromkeys(("draw_history", "read_history"), "history"),
    "Relayout": "relayout",
    "TrainingState": "state",
}

__all__ = sorted([*_HOMES, "Phase"])


def __getattr__(name: str) -> Any:
    """Names that need torch come when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
