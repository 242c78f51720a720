"""A managed run over ranks: the losses of a run that never changes, changes that pay, refusals that harm nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.checkpoint.agree import from_every_rank, rank_and_world
from fms_parallel.data.feed import Feed
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.dynamic.adaptive import train
from fms_parallel.dynamic.hardware import HardwareProfile, HardwareProfiler
from fms_parallel.dynamic.history import read_history
from fms_parallel.dynamic.manager import ParallelismManager, share_of_batch, train_step
from fms_parallel.dynamic.policy import Situation, Verdict
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.phases import Phase
from fms_parallel.planner.hardware import Cluster, load_devices
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from tests.training.runs import OPTIONS, TINY, rows

SIZES: dict[str, Any] = {**TINY, "layers": 4, "dropout": 0.2}


class Tour:
    """A policy that goes round: each decision the next layout."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def decide(self, situation: Situation) -> Verdict:
        names = [arm.name for arm in situation.arms]
        order = [name for wanted in self.names for name in names if name.split(",precision")[0] == wanted]
        at = order.index(situation.current) if situation.current in order else -1
        return Verdict(order[(at + 1) % len(order)], "on tour", 1.0, 1.0)


def build(layout: ParallelLayout, **how: Any) -> nn.Module:
    return get_model("llama", "micro", distributed_strategy=layout, **{**SIZES, **how})


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, TrainOptions(lr=1e-2))


def quiet(layout: ParallelLayout, **how: Any) -> nn.Module:
    """Without dropout, to be called by hand."""
    return get_model("llama", "micro", distributed_strategy=layout, **{**SIZES, "dropout": 0.0}, **how)


def wider(layout: ParallelLayout, **how: Any) -> nn.Module:
    return get_model("llama", "micro", distributed_strategy=layout, **{**SIZES, "ffn_width": 40}, **how)


def manager_of(ranks: int, build: Any = build, **more: Any) -> ParallelismManager:
    cluster = Cluster.parse(f"cpu:{ranks}", load_devices())
    values: dict[str, Any] = {"precision": "fp64", "hardware": cluster, "steps": 12, "profile_communication": False}
    return ParallelismManager(build, optimizer, rows(), batch_size=8, **(values | more))


def losses(manager: ParallelismManager) -> list[float]:
    """The documented loop."""
    told = []
    manager.initialize()
    for batch in manager.loader():
        metrics = train_step(manager.state, batch)
        manager.step(metrics)
        told.append(metrics["loss"])
    manager.cleanup()
    return told


def called(layout: str, folder: str | None = None, **adapt: Any) -> list[float]:
    """Losses of the one call on a plain module that every rank has whole, whose ends are one matrix."""
    told: list[float] = []
    plain = build(ParallelLayout(precision="fp64"), tied=True)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    outcome = train(
        plain,
        rows(),
        layout=f"{layout},precision=fp64" if layout else "precision=fp64",
        hardware=Cluster.parse(f"cpu:{rank_and_world()[1]}", load_devices()),
        on_step=lambda numbers: told.append(numbers["loss"]),
        adapt={"decide_every": 4, **adapt},
        phases=[Phase(3, seq_len=7), Phase(6, batch_size=4)],
        **{**OPTIONS, "steps": 9, "output_path": folder},
    )
    assert outcome.step == 9 and all(torch.equal(before[name], t) for name, t in plain.state_dict().items())
    return told


def toured(ranks: int, folder: str, *layouts: str) -> tuple[list[float], list[str], list[float], list[float]]:
    """A run that changes after every fourth step: losses, what it did; losses with phases; losses of the one call."""
    path = f"{folder}/history.jsonl"
    profiling = {"profile_communication": True, "history": path}
    manager = manager_of(ranks, layouts=layouts, policy=Tour(*layouts), decide_every=4, **profiling)
    told = losses(manager)
    events = read_history(path) if dist.get_rank() == 0 else []
    kinds = [event["kind"] for event in events if event["kind"] in ("start", "switch", "refused")]
    phased = manager_of(
        ranks, layouts=layouts, policy=Tour(*layouts), phases=[Phase(3, seq_len=7), Phase(7, batch_size=4)]
    )
    once = called(
        "fsdp=2",
        f"{folder}/run",
        layouts=["fsdp=2", "pp=2,microbatches=2"],
        policy=Tour("fsdp=2", "pp=2,microbatches=2"),
    )
    return told, kinds, losses(phased), once


def test_losses_are_those_of_a_run_in_one_process_that_never_changes(tmp_path: Path) -> None:
    expected = losses(manager_of(1, enable_dynamic_adaptation=False))
    short = losses(manager_of(1, enable_dynamic_adaptation=False, phases=[Phase(3, seq_len=7), Phase(7, batch_size=4)]))
    found = run_ranks(toured, 2, 2, str(tmp_path), "fsdp=2", "tp=2,sp", "pp=2,microbatches=2", timeout=240)
    one, pieces = called("", layouts=[""]), losses(manager_of(1, enable_dynamic_adaptation=False, micro_batches=2))
    assert max(abs(a - b) for a, b in zip(pieces, expected, strict=True)) <= 1e-12
    for told, _, phased, once in found:
        assert len(once) == 9 and max(abs(a - b) for a, b in zip(once, one, strict=True)) <= 1e-12
        assert len(told) == 12 and max(abs(a - b) for a, b in zip(told, expected, strict=True)) <= 1e-12
        assert max(abs(a - b) for a, b in zip(phased, short, strict=True)) <= 1e-12
    assert found[0][1] == ["start", "switch", "switch"]
    written = read_history(tmp_path / "run" / "layouts.jsonl")
    assert [event["after"] for event in written if event["kind"] == "switch"] == [
        "pp=2,microbatches=2,precision=fp64",
        "fsdp=2,precision=fp64",
    ]
    windows = [event for event in read_history(tmp_path / "history.jsonl") if event["kind"] == "window"]
    assert any(window["communication"] is not None and 0 < window["communication"] <= 1 for window in windows)


# ---- what is refused, on two ranks, in one job ------------------------------------------------------------------


def gentle() -> dict[str, Any]:
    """Everything that a run must survive in its old layout."""
    told: dict[str, Any] = {}
    manager = manager_of(2, quiet, layout="fsdp=2", enable_dynamic_adaptation=False, steps=40, every=1)
    manager.initialize()
    batches = manager.loader()

    def steps(number: int, metrics: Any = None) -> None:
        for _ in range(number):
            found = train_step(manager.state, next(batches))
            event = manager.step(found if metrics is None else metrics)
            told["last"] = None if event is None else event.reason

    def asked(layout: str) -> str:
        manager.request(layout)
        steps(1)
        return str(manager.history.events[-1].reason)

    first, whole = next(batches), Feed(rows(), global_batch=8, seed=0).batch(0)
    assert torch.equal(share_of_batch(manager.state, whole).input_ids, first.input_ids) and len(first.labels) == 4
    train_step(manager.state, first)
    manager.step({"accuracy": 0.5})
    steps(2, {"accuracy": 0.5})
    steps(1, {"loss": math.nan})
    steps(1, "all is well")
    told["metrics"] = [event.reason for event in manager.history.of("metrics")]
    told["counted"] = [event.more["measured"] for event in manager.history.of("window")][-1]
    told["ranks"] = asked("tp=4")
    told["differ"] = asked("tp=2" if dist.get_rank() else "dp=2")
    manager.relayout.memory_limit = 1000
    told["memory"] = asked("tp=2")
    manager.relayout.memory_limit = None
    manager.relayout.model_factory = wider
    told["another model"] = asked("tp=2")
    manager.relayout.model_factory = quiet
    manager.request("tp=2")
    train_step(manager.state, next(batches))
    ids = torch.arange(26).view(2, 13) % 61
    manager.state.model(ids, labels=ids).backward()  # an accumulation has begun
    event = manager.step({"loss": 1.0})
    told["accumulating"] = event.reason if event else "nothing"
    manager.state.model.zero_grad()
    told["layout before"] = str(manager.state.layout)
    manager.request("tp=2")
    steps(2)
    told["layout after"], told["status"] = str(manager.state.layout), manager.status()
    told["windows"] = [event.more for event in manager.history.of("window")]
    manager.cleanup()
    told["hardware"] = from_every_rank(HardwareProfiler(repeats=1).profile())
    return told


def test_what_cannot_be_is_refused_with_a_sentence_and_the_job_goes_on() -> None:
    one, other = run_ranks(gentle, 2, timeout=240)
    assert one["metrics"][0].startswith("the metrics ['accuracy'] have no 'loss'")
    assert "'loss' is nan" in one["metrics"][3] and "instead of a mapping" in one["metrics"][4]
    assert one["counted"] is False
    assert "needs 4 ranks" in one["ranks"] and "different layouts" in one["differ"]
    assert "are free" in one["memory"] and "builds another model" in one["another model"]
    assert "between two optimizer steps" in one["accumulating"]
    for told in (one, other):
        assert told["layout before"] == "fsdp=2,precision=fp64" and told["layout after"] == "tp=2,precision=fp64"
        assert told["status"]["switches"] == 1 and told["status"]["step"] == 12
    assert one["windows"] == other["windows"]  # both ranks know the same
    assert any(window["seconds"] and window["ranks"][1]["block"] > 0 for window in one["windows"])
    check_hardware(one["hardware"])


def check_hardware(told: list[HardwareProfile]) -> None:
    """The same on both ranks, plausible, and readable after a journey through JSON."""
    profile = told[0]
    assert told[1] == profile and profile.ranks == 2 and len(profile.nodes) == 1
    assert HardwareProfile.of_json(json.loads(json.dumps(profile.as_json()))) == profile
    assert {(link.source, link.target) for link in profile.links} == {(0, 1), (1, 0)}
    assert all(0 < link.latency_s < 5 and 1e5 < link.bytes_per_s < 1e12 for link in profile.links)
    assert all(1e7 < rate < 1e14 for rate in (*profile.flops_per_s, *profile.memory_bytes_per_s))
    assert profile.cluster().gpus == 2 and 0 < profile.cluster().device.memory_gb < 1e5
