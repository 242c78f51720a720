"""Jobs whose ranks are killed, frozen, or die between the gradients' sum and the update: no committed step is lost.

Real processes and real signals; a watchdog ends every process that a test has started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.distributed.start import Launch
from fms_parallel.dynamic.adaptive import AdaptiveLayout
from fms_parallel.dynamic.elastic import train_elastic
from fms_parallel.dynamic.membership import Membership
from fms_parallel.dynamic.policy import Situation, Verdict
from fms_parallel.dynamic.recovery import ElasticSwitch
from fms_parallel.dynamic.selector import DynamicStrategySelector
from fms_parallel.dynamic.supervise import Rendezvous, Supervisor
from fms_parallel.errors import FmsError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config, get_model
from fms_parallel.phases import Work
from fms_parallel.planner.hardware import Cluster, load_devices
from fms_parallel.training import TrainOptions, train
from fms_parallel.training.metrics import METRICS, read_metrics
from tests.training.runs import TINY, rows

SIZES: dict[str, Any] = {**TINY, "dropout": 0.2, "layers": 4}
RUN: dict[str, Any] = {"batch_size": 12, "lr": 1e-2, "warmup_steps": 2, "steps": 10, "max_grad_norm": 0.5}
LIMIT = 150.0


def build(layout: ParallelLayout | str | None, **how: Any) -> nn.Module:
    return get_model("llama", "micro", distributed_strategy=layout, **SIZES, **how)


def tell(folder: str, name: str, *words: Any) -> None:
    """A line in a file that the test reads: what a process that is killed has said stays said."""
    with open(Path(folder) / name, "a", encoding="utf-8") as file:
        file.write(" ".join(str(word) for word in words) + "\n")


def told(folder: Path, name: str) -> list[list[str]]:
    path = folder / name
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def die(how: str) -> None:
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(1)  # until the signal is there


def work(membership: Membership, folder: str, case: dict[str, Any]) -> None:
    """One member: it trains, and where the case says so it dies."""
    torch.set_num_threads(1)
    uid, fate = membership.uid, case.get("fates", {}).get(membership.uid, {})

    def on_step(numbers: dict[str, Any]) -> None:
        tell(folder, f"losses-{uid}", numbers["step"], float(numbers["loss"]).hex(), time.time())
        if case.get("pace"):
            time.sleep(case["pace"])
        if numbers["step"] == fate.get("after"):
            tell(folder, "died", uid, time.time())
            die(fate["by"])

    def on_recovery(report: Any) -> None:
        words = (report.step, report.redone, report.source, report.layout or "-", report.seconds, time.time())
        tell(folder, f"recoveries-{uid}", *words)

    if "between" in fate:
        _die_between_sum_and_update(fate, folder, uid)
    if "moving" in fate:
        _die_in_a_move(fate, folder, uid)
    options = TrainOptions.of(**(RUN | case.get("options", {})))
    cluster = Cluster.parse(case["cluster"], load_devices()) if "cluster" in case else None
    adapt = None
    if case.get("tour"):
        adapt = AdaptiveLayout(build, cluster, policy=Tour(), every=1, decide_every=2, switch=ElasticSwitch)
    try:
        outcome = train_elastic(
            build,
            rows(60),
            f"{case['layout']},precision=fp64",
            membership,
            options=options,
            buddy_every=case.get("buddy_every"),
            cluster=cluster,
            adapt=adapt,
            relayout={"shared_memory": True, "round_bytes": 1 << 14} if case.get("tour") else None,
            on_step=on_step,
            on_recovery=on_recovery,
        )
    except FmsError as error:
        tell(folder, f"failed-{uid}", error)
        sys.exit(1)
    if adapt is not None:
        layouts = [event.more["after"] for event in adapt.history.of("switch")]
        tell(folder, f"changes-{uid}", *layouts)
    tell(folder, "ended", uid, outcome.step)


class Tour:
    """A policy that goes to the next layout at every decision."""

    def decide(self, situation: Situation) -> Verdict:
        names = sorted(arm.name for arm in situation.arms)
        return Verdict(names[(names.index(situation.current) + 1) % len(names)], "on tour", 1.0, 1.0)


def _die_between_sum_and_update(fate: dict[str, Any], folder: str, uid: str) -> None:
    """Die inside the step when the gradients are summed: before the vote, in it, or just behind it."""
    from fms_parallel.dynamic.elastic import ElasticTrainer

    enrol = ElasticTrainer._commit_in_two_phases

    def patched(trainer: Any) -> None:
        def kill(*_: Any) -> None:
            if trainer.step == fate["between"]:
                tell(folder, "died", uid, time.time())
                die(fate["by"])

        if fate["place"] == "before":
            trainer.optimizer.register_step_pre_hook(kill)
        enrol(trainer)
        if fate["place"] == "behind":
            trainer.optimizer.register_step_pre_hook(kill)

    ElasticTrainer._commit_in_two_phases = patched  # type: ignore[method-assign]


def _die_in_a_move(fate: dict[str, Any], folder: str, uid: str) -> None:
    """Die while pieces go through shared memory, when some are there and others are not."""
    from fms_parallel.distributed.trade import Trade

    fill, filled = Trade._fill, [0]

    def patched(trade: Trade, peer: int) -> None:
        filled[0] += 1
        if filled[0] == fate["moving"]:
            tell(folder, "died", uid, time.time())
            die(fate["by"])
        fill(trade, peer)

    Trade._fill = patched  # type: ignore[method-assign]


class Members:
    """Processes of one job and their supervisors, in threads; all of them gone when the block ends."""

    def __init__(self, folder: Path, case: dict[str, Any], world: int, kill: bool = True) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.folder, self.world = folder, world
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        options = {"timeout": 60.0, "silence": case.get("silence", 3.0)}
        rendezvous = Rendezvous("127.0.0.1", self.store.port, tuple(options.items()))
        self.kill = kill
        self.supervisor = Supervisor(rendezvous, work, (str(folder), case))
        self.processes: dict[str, Any] = {}
        self.codes: dict[str, int] = {}
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Members:
        uids = [str(rank) for rank in range(self.world)]
        for uid in uids:
            self.start(uid, uids)
        return self

    def start(self, uid: str, members: list[str] | None) -> None:
        process = self.supervisor.start(uid, members, Launch(0, self.world, 0, self.world))
        self.processes[uid] = process

        def watch() -> None:
            self.codes[uid] = self.supervisor.watch(uid, process, kill=self.kill)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        self.threads.append(thread)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen within {LIMIT} s"
            time.sleep(0.02)

    def wait_for_end(self) -> dict[str, int]:
        self.wait_for(lambda: len(self.codes) == len(self.processes), "the end of every process")
        return self.codes

    def __exit__(self, *_: Any) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        for thread in self.threads:
            thread.join(10)


def expected_losses(options: dict[str, Any] | None = None) -> list[float]:
    losses: list[float] = []
    model = build(ParallelLayout(precision="fp64"))
    train(model, rows(60), on_step=lambda n: losses.append(n["loss"]), **(RUN | (options or {})))
    return losses


def check_losses(folder: Path, uid: str, expected: list[float], first: int = 1) -> None:
    """Every step once, in order, with the losses of one process that nothing happened to."""
    lines = told(folder, f"losses-{uid}")
    assert [int(line[0]) for line in lines] == list(range(first, len(expected) + 1))
    worst = max(abs(float.fromhex(line[1]) - expected[int(line[0]) - 1]) for line in lines)
    assert worst <= 1e-12, worst


LOSSES: list[float] = []


@pytest.fixture
def losses() -> list[float]:
    if not LOSSES:
        LOSSES.extend(expected_losses())
    return LOSSES


CASES: dict[str, dict[str, Any]] = {
    "killed, replicas": {
        "layout": "dp=2,fsdp=2",
        "cluster": "cpu:4",
        "next": "planned",
        "fates": {"3": {"after": 4, "by": "SIGKILL"}},
        "goes_on": (4, 0),
        "source": "survivors",
    },
    "first rank killed": {
        "layout": "dp=2,fsdp=2",
        "next": "fsdp=3,precision=fp64",
        "fates": {"0": {"after": 4, "by": "SIGKILL"}},
        "goes_on": (4, 0),
        "source": "survivors",
    },
    "before the vote": {
        "layout": "dp=2,fsdp=2",
        "fates": {"2": {"between": 4, "place": "before", "by": "SIGKILL"}},
        "goes_on": (4, 0),
        "source": "survivors",
    },
    "behind the vote": {
        "layout": "dp=2,fsdp=2",
        "fates": {"2": {"between": 4, "place": "behind", "by": "SIGKILL"}},
        "goes_on": (5, 0),
        "source": "survivors",
    },
    "changing layouts": {
        "layout": "dp=2,fsdp=2",
        "fates": {"3": {"after": 5, "by": "SIGKILL"}},
        "goes_on": (5, 0),
        "source": "survivors",
        "cluster": "cpu:4",
        "tour": True,
    },
    "killed in a move": {
        "layout": "dp=2,fsdp=2",
        "fates": {"1": {"moving": 5, "by": "SIGKILL"}},
        "goes_on": (4, 0),
        "source": "survivors",
        "cluster": "cpu:4",
        "tour": True,
    },
    "frozen in a move": {
        "layout": "dp=2,fsdp=2",
        "rare": True,
        "fates": {"2": {"moving": 5, "by": "SIGSTOP"}},
        "goes_on": (4, 0),
        "source": "survivors",
        "cluster": "cpu:4",
        "tour": True,
        "silence": 2.0,
    },
    "frozen": {
        "layout": "dp=3",
        "fates": {"1": {"after": 4, "by": "SIGSTOP"}},
        "goes_on": (4, 0),
        "source": "survivors",
        "silence": 2.0,
    },
    "no replica, buddy": {
        "layout": "pp=2,fsdp=2",
        "fates": {"1": {"after": 4, "by": "SIGKILL"}},
        "goes_on": (4, 0),
        "source": "buddies",
        "buddy_every": 1,
    },
    "no replica, buddy of every third step": {
        "layout": "fsdp=3",
        "fates": {"2": {"after": 5, "by": "SIGKILL"}},
        "goes_on": (3, 2),
        "source": "buddies",
        "buddy_every": 3,
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if case.get("rare") else name for name, case in CASES.items()]
)
def test_a_lost_rank_costs_no_committed_step_and_changes_no_loss(
    name: str, tmp_path: Path, losses: list[float]
) -> None:
    case = CASES[name]
    world = ParallelLayout.parse(case["layout"]).world_size
    with Members(tmp_path, case, world) as members:
        codes = members.wait_for_end()
    (lost,) = case["fates"]
    survivors = [str(rank) for rank in range(world) if str(rank) != lost]
    assert {uid: codes[uid] for uid in survivors} == dict.fromkeys(survivors, 0)
    assert codes[lost] == -signal.SIGKILL
    for uid in survivors:
        check_losses(tmp_path, uid, losses)
        ((step, redone, source, layout, *_),) = told(tmp_path, f"recoveries-{uid}")
        assert source == case["source"]
        assert (int(step), int(redone)) == case["goes_on"]
        wanted = case.get("next", layout)
        assert layout == (planned(3) if wanted == "planned" else wanted)
        for words in told(tmp_path, f"changes-{uid}"):
            assert words and all(ParallelLayout.parse(word).world_size == 3 for word in words)


def planned(ranks: int) -> str:
    """What the planner finds fastest, asked directly."""
    shape = get_config("llama", "micro", **SIZES).shape()
    selector = DynamicStrategySelector(Cluster.parse(f"cpu:{ranks}", load_devices()), shape, precision="fp64")
    found = str(selector.initial(Work(13, RUN["batch_size"])).layout)
    assert found != "fsdp=3,precision=fp64"  # else it would tell nothing
    return found


def test_a_replacement_joins_and_the_layout_that_was_asked_for_returns(tmp_path: Path) -> None:
    """Killed at step 4, three ranks go on; a new process joins, four have replicas of shards again."""
    options = {"steps": 24}
    case = {"layout": "dp=2,fsdp=2", "fates": {"3": {"after": 4, "by": "SIGKILL"}}, "options": options, "pace": 0.25}
    with Members(tmp_path, case, 4) as members:
        members.wait_for(lambda: "3" in members.codes, "the death of a member")
        members.start("3.1", None)
        codes = members.wait_for_end()
    assert codes == {"0": 0, "1": 0, "2": 0, "3": -signal.SIGKILL, "3.1": 0}
    expected = expected_losses(options)
    for uid in ("0", "1", "2"):
        check_losses(tmp_path, uid, expected)
        lost, joined = told(tmp_path, f"recoveries-{uid}")
        assert [lost[3], joined[3]] == ["fsdp=3,precision=fp64", "dp=2,fsdp=2,precision=fp64"]
        assert [joined[1], joined[2]] == ["0", "survivors"]
    check_losses(tmp_path, "3.1", expected, first=int(joined[0]) + 1)


def test_what_is_nowhere_else_comes_from_the_last_checkpoint(tmp_path: Path) -> None:
    """No replica and no copies: back to step 4 of 10, and one line for each step in the end."""
    folder = str(tmp_path / "run")
    options = {"output_path": folder, "checkpoint_steps": 2}
    case = {"layout": "fsdp=3", "fates": {"1": {"after": 5, "by": "SIGKILL"}}, "options": options}
    with Members(tmp_path, case, 3) as members:
        codes = members.wait_for_end()
    assert codes == {"0": 0, "1": -signal.SIGKILL, "2": 0}
    expected = expected_losses()
    for uid in ("0", "2"):
        check_losses(tmp_path, uid, expected)
        ((step, redone, source, *_),) = told(tmp_path, f"recoveries-{uid}")
        assert (step, redone, source) == ("4", "1", "checkpoint")
    assert [line["step"] for line in read_metrics(Path(folder) / METRICS)] == list(range(1, 11))


def test_what_is_nowhere_is_said(tmp_path: Path) -> None:
    """Every survivor ends with a sentence, none waits."""
    case = {"layout": "fsdp=2", "fates": {"1": {"after": 3, "by": "SIGKILL"}}}
    with Members(tmp_path, case, 2) as members:
        codes = members.wait_for_end()
    assert codes["0"] == 1
    ((why,),) = [[" ".join(line)] for line in told(tmp_path, "failed-0")]
    assert "the state of the lost members is nowhere" in why and "use replicas (dp), buddy_every" in why


def test_an_error_that_is_no_loss_is_not_hidden(tmp_path: Path) -> None:
    """A loss that is not finite ends the job, at once and with its own words."""
    case = {"layout": "dp=2", "options": {"lr": 1e300}}
    with Members(tmp_path, case, 2) as members:
        codes = members.wait_for_end()
    assert set(codes.values()) == {1}
    assert any("not finite" in " ".join(line) for uid in "01" for line in told(tmp_path, f"failed-{uid}"))


def test_a_frozen_member_that_wakes_does_not_go_on(tmp_path: Path) -> None:
    """Given up while it was stopped; here nobody kills it before it wakes."""
    case = {"layout": "dp=3", "fates": {"1": {"after": 4, "by": "SIGSTOP"}}, "silence": 2.0}
    with Members(tmp_path, case, 3, kill=False) as members:
        members.wait_for(lambda: len(told(tmp_path, "ended")) == 2, "the end of the others")
        os.kill(members.processes["1"].pid, signal.SIGCONT)
        codes = members.wait_for_end()
    assert codes == {"0": 0, "1": 1, "2": 0}
    assert any("was given up by the others" in " ".join(line) for line in told(tmp_path, "failed-1"))


@pytest.mark.slow
def test_a_job_that_torchrun_started_goes_on_when_a_rank_is_killed(tmp_path: Path) -> None:
    """The script with --elastic, its supervisors and all; it raises when no later step comes."""
    from benchmarks.recovery import measure

    text = tmp_path / "text.txt"
    text.write_text("what a rank has learned is not lost. " * 1000)
    assert measure(("--elastic",), text) > 0
