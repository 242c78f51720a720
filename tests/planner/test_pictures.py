"""What pictures say, read off their SVG, in which matplotlib writes every text beside its outlines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fms_parallel.planner.cli import main
from fms_parallel.strategy.show import main as show

TPE = ("--model", "gpt3_1T", "--global-batch", "4096")


def texts(path: Path) -> list[str]:
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", path.read_text(), re.DOTALL)]


def test_a_schedule_without_costs_is_drawn_in_forward_passes_not_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    show(["pp=2,microbatches=4", "--picture", str(path)])
    assert "time, in forward passes of one micro-batch through one stage" in texts(path)
    assert "seconds" not in texts(path)
    job = ("--model", "llama:3.1-8b", "--gpus", "h100:2", "--global-batch", "4")
    main(["simulate", "pp=2,microbatches=4", *job, "--plot", str(path)])
    assert "seconds" in texts(path)


def test_every_system_of_a_sweep_shows_where_its_time_and_memory_go(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    sizes = ("--num-gpus", "1024", "4096", "--domains", "4", "8")
    main(["sweep", *TPE, "--systems", "A100", "B200", *sizes, "--plot", str(path)])
    found = texts(path)
    for system in ("A100", "B200"):
        assert {f"{system}, domain {domain}" for domain in (4, 8)} <= set(found)
        # once in the legend of the curves, and below both of its bars
        assert found.count(f"{system}, domain 4") == 3
    assert {"1024", "4096", "computing", "pipeline idle", "activations", "optimizer"} <= set(found)


def test_maps_of_a_sweep_say_time_units_and_configurations(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    varied = ("--bandwidths", "2000", "8000", "--capacities", "30", "80", "--flops", "1000", "2500")
    main(["sweep", *TPE, "--systems", "B200", "--num-gpus", "4096", *varied, "--plot", str(path)])
    found = texts(path)
    assert {"1000 TFLOP/s", "2500 TFLOP/s", "memory bandwidth, GB/s", "memory capacity, GB", "2000", "30"} <= set(found)
    # 30 GB are too few: two of four cells in both maps
    assert sum(text.startswith("dp ") for text in found) == 4 and "11.6 s" in found


def test_configurations_of_a_search_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.svg"
    words = ("--tensor-parallel", "2d-summa", "--system", "B200", "--num-gpus", "4096", "--top", "3")
    main(["search", "--compat=tpe", *TPE, *words, "--plot", str(path)])
    degrees = [line.split()[:6] for line in capsys.readouterr().out.splitlines()[1:4]]
    found = texts(path)
    for dp, tp1, tp2, _, pp, mbs in degrees:
        for text in (f"dp {dp}", f"tp {tp1}x{tp2}", f"pp {pp}", f"mbs {mbs}"):
            assert found.count(text) >= 2  # below its time and below its memory
    assert {"tensor parallel", "weights"} <= set(found)
