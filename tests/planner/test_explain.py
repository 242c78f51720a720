"""Explaining and drawing: differences add up, traces hold every event, plots are written where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fms_parallel.planner.cli import main

JOB = ["--model", "llama:3.1-8b", "--gpus", "h100:16", "--global-batch", "64", "--seq", "4096"]


def test_gains_add_up_to_the_difference_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "fsdp=4,tp=4,sp,recompute=full", "pp=16,microbatches=32", *JOB, "--json"])
    found = json.loads(capsys.readouterr().out)
    first, second = (entry["step_time_s"] for entry in found["layouts"])
    assert sum(found["seconds_gained"].values()) == pytest.approx(second - first)
    assert found["seconds_gained"]["bubble"] > 0 > found["seconds_gained"]["tp"]
    faster = found["layouts"][0 if first < second else 1]["layout"]
    assert found["explanation"].startswith(faster)


def test_text_shows_both_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "fsdp=16", "fsdp=8,tp=2,sp", *JOB])
    out = capsys.readouterr().out
    assert "a whole step" in out and "activations" in out and "would not run" in out


def test_trace_holds_every_piece_of_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot = tmp_path / "step.json", tmp_path / "step.svg"
    main(["simulate", "pp=4,fsdp=4,microbatches=8", *JOB, "--trace", str(trace), "--plot", str(plot), "--json"])
    found = json.loads(capsys.readouterr().out)
    events = json.loads(trace.read_text())["traceEvents"]
    assert len(events) == 4 * 8 * 2
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(found["pipeline_s"] * 1e6)
    assert {e["tid"] for e in events} == {0, 1, 2, 3}
    assert plot.read_text().lstrip().startswith("<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step.json", "step.svg"]


def test_text_gantt_has_a_line_per_rank(capsys: pytest.CaptureFixture[str]) -> None:
    main(["simulate", "pp=4,fsdp=4,microbatches=8,schedule=zbv,virtual_stages=2", *JOB])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines[:4]] == [f"rank {r:3}" for r in range(4)]
