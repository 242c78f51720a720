"""Schedules from files: events against those of named schedules, what ranks hold against counting, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import Workload
from fms_parallel.planner.api import Planner
from fms_parallel.planner.cli import main
from fms_parallel.planner.filed import events, most_held
from fms_parallel.planner.simulate import ORDERS, makespan

PLANNER = Planner.of("llama:3.1-8b", "h100:8", Workload(32, 2048))


def written(name: str, path: Path, ranks: int, virtual: int, micros: int, doubled: bool = False) -> ParallelLayout:
    """A file with the order of a named schedule, and the layout that names it."""
    orders = [ORDERS[name](rank, ranks, virtual, micros) for rank in range(ranks)]
    split = {"F": "{0}F{1}", "B": "{0}I{1},{0}W{1}" if doubled else "{0}B{1}"}
    path.write_text("\n".join(",".join(split[w.kind].format(w.stage, w.micro) for w in order) for order in orders))
    words = f"pp={ranks},tp=2,sp,microbatches={micros},virtual_stages={virtual},schedule=file:{path}"
    return ParallelLayout.parse(words)


@pytest.mark.parametrize(("name", "virtual"), [("1f1b", 1), ("gpipe", 1), ("interleaved1f1b", 2)])
def test_a_named_schedule_from_its_file_takes_as_long(name: str, virtual: int, tmp_path: Path) -> None:
    layout = written(name, tmp_path / "step.csv", 4, virtual, 8)
    by_name = ParallelLayout.parse(f"pp=4,tp=2,sp,microbatches=8,virtual_stages={virtual},schedule={name}")
    assert makespan(events(PLANNER, layout)) == pytest.approx(makespan(events(PLANNER, by_name)), rel=1e-12)


def test_parts_add_up_to_the_events_and_what_is_outside(tmp_path: Path) -> None:
    layout = written("1f1b", tmp_path / "step.csv", 4, 1, 8)
    found = PLANNER.estimate(layout)
    parts = found.breakdown
    outside = sum(parts[name] for name in ("fsdp", "dp", "optimizer", "other"))
    assert found.layout == layout and found.throughput == pytest.approx(32 / found.step_time_s)
    assert found.step_time_s == pytest.approx(makespan(events(PLANNER, layout)) + outside, rel=1e-9)


def test_weights_apart_hold_activations_until_the_weights_are_done(tmp_path: Path) -> None:
    whole, apart = (written("1f1b", tmp_path / f"{d}.csv", 4, 1, 8, bool(d)) for d in (0, 1))
    assert PLANNER.estimate(whole).memory_gb == pytest.approx(PLANNER.estimate(apart).memory_gb)
    split = PLANNER.split(whole)
    for name, most in (("1f1b", 4), ("gpipe", 8)):
        assert most_held(ORDERS[name](0, 4, 1, 8), split) == most * split[0]
    gpipe = written("gpipe", tmp_path / "gpipe.csv", 4, 1, 8)
    assert PLANNER.estimate(gpipe).memory_gb > PLANNER.estimate(whole).memory_gb


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    layout = written("1f1b", tmp_path / "step.csv", 4, 1, 8)
    with pytest.raises(LayoutError, match="8 micro-batches, the layout 16"):
        PLANNER.estimate(ParallelLayout.parse(str(layout).replace("microbatches=8", "microbatches=16")))


def test_simulate_draws_a_schedule_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = written("1f1b", tmp_path / "step.csv", 4, 1, 8)
    job = ["--model", "llama:3.1-8b", "--gpus", "h100:8", "--global-batch", "32", "--seq", "2048"]
    assert main(["simulate", str(layout), *job, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pipeline_s"] == pytest.approx(makespan(events(PLANNER, layout)))


def test_schedules_with_two_stages_per_rank_need_no_further_word() -> None:
    found = PLANNER.estimate(ParallelLayout.parse("pp=4,tp=2,sp,microbatches=8,schedule=zbv"))
    assert found.layout.stages == 8 and found.step_time_s > 0
