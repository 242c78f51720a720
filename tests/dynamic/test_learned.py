"""What a run has learned is in its checkpoint, and the run that goes on from there knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fms_parallel.dynamic.adaptive import AdaptiveLayout
from fms_parallel.dynamic.learned import for_members, remembered
from fms_parallel.dynamic.manager import ParallelismManager
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.planner.hardware import Cluster, load_devices
from fms_parallel.training import train
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from tests.training.runs import OPTIONS, TINY, rows

CLUSTER = Cluster.parse("cpu:1", load_devices())


def build(layout: ParallelLayout, **how: Any) -> Any:
    return get_model("llama", "micro", distributed_strategy=layout, **TINY, **how)


def run(folder: Path, steps: int, **more: Any) -> tuple[AdaptiveLayout, list[dict[str, Any]]]:
    """A run whose layout may change, and what it knew after each step."""
    hook = AdaptiveLayout(build, CLUSTER, layouts=[""], decide_every=2)
    known: list[dict[str, Any]] = []

    def told(numbers: dict[str, Any]) -> None:
        hook.on_step(numbers)
        assert hook.adaptation is not None
        known.append(json.loads(json.dumps(hook.adaptation.known_here())))

    options = {**OPTIONS, "steps": steps, "output_path": str(folder), "resume": "auto", **more}
    train(build(ParallelLayout()), rows(), on_step=told, between_steps=hook, **options)
    return hook, known


def test_a_resumed_run_knows_what_the_one_before_it_had_learned(tmp_path: Path) -> None:
    _, first = run(tmp_path, 12)
    _, second = run(tmp_path, 13)
    learned = first[-1]["selector"]
    assert learned["calibration"] is not None and learned["policy"]["learned"]["weights"]
    assert second[0] == first[-1]


def test_what_was_learned_on_another_machine_does_not_count() -> None:
    values = {"machine": ["another"], "hardware": None, "adaptation": {}}
    assert remembered(values, CLUSTER) is None and remembered(None, CLUSTER) is None
    assert remembered({**values, "machine": [str(CLUSTER)]}, CLUSTER) is CLUSTER
    assert for_members(values, CLUSTER, 3).gpus == 3 and for_members(values, CLUSTER, 3).device == CLUSTER.device


def test_a_manager_is_given_what_an_earlier_one_has_learned() -> None:
    how: dict[str, Any] = {"batch_size": 8, "hardware": CLUSTER, "steps": 4}
    managers = [
        ParallelismManager(build, lambda model: make_optimizer(model, TrainOptions()), rows(), **how) for _ in range(2)
    ]
    managers[0].initialize()
    managers[0].adaptation.costs.rest = 0.125
    managers[0].adaptation.selector.refused[ParallelLayout(fsdp=2)] = 2
    managers[1].initialize(json.loads(json.dumps(managers[0].learned())))
    assert managers[1].adaptation.costs.rest == 0.125
    assert managers[1].learned() == managers[0].learned()
