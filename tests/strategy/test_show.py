"""The drawn layout against the mesh that torch makes of it, and the drawn schedule against its closed form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner.simulate import makespan
from fms_parallel.schedule_file import write_schedule
from fms_parallel.schedules import SCHEDULES
from fms_parallel.strategy.show import as_file, main, rank_grid, timeline


@pytest.mark.parametrize("text", ["", "tp=4", "pp=2,fsdp=2,tp=2,sp", "dp=2,fsdp=3,cp=2,tp=2"])
def test_ranks_lie_as_in_the_mesh(text: str) -> None:
    layout = ParallelLayout.parse(text)
    lines = [line.split("ranks")[1] for line in rank_grid(layout).splitlines()]
    drawn = [[int(word) for word in line.split()] for line in lines]
    assert drawn == torch.arange(layout.world_size).view(layout.degrees).flatten(0, 3).tolist()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_step_takes_its_closed_form(schedule: str) -> None:
    """(micro-batches + stages - 1) * (forward + backward)."""
    layout = ParallelLayout.parse(f"pp=4,schedule={schedule},microbatches=8")
    assert makespan(timeline(layout)) == pytest.approx((8 + 3) * 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_drawn(schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib")
    picture = tmp_path / "step.svg"
    assert main([f"pp=2,schedule={schedule},microbatches=4", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^rank +\d+ \|", out, flags=re.MULTILINE)) == 2
    assert picture.read_text().count("<path") > 16  # 2 ranks x 4 micro-batches x forward and backward, at least


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no schedule to draw"):
        main(["tp=2", "--picture", str(tmp_path / "x.png")])
    with pytest.raises(ConfigError, match=r"x\.txt: the suffix says what is drawn; use \.png"):
        main(["pp=2", "--picture", str(tmp_path / "x.txt")])


def test_the_command_is_not_imported_by_its_own_package() -> None:
    """`python -m` would warn of it."""
    code = "import sys, fms_parallel.training; sys.exit('fms_parallel.strategy.show' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_written_and_its_layout_is_drawn(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step.csv"
    assert main([f"pp=2,schedule={schedule}", "--write-schedule", str(path)]) == 0
    own = re.findall(r"its layout is '(.+)'", capsys.readouterr().out)[0]
    layout = ParallelLayout.parse(own)
    assert (
        layout.schedule == f"file:{path}" and layout.stages == ParallelLayout.parse(f"pp=2,schedule={schedule}").stages
    )
    assert main([own]) == 0
    assert f"pp 1: stages {' '.join(map(str, layout.stages_of(1)))}" in capsys.readouterr().out
    work = layout.stages * layout.pieces * 3.0  # forward 1, backward 2, in one part or in two
    assert sum(event.end - event.start for event in timeline(layout)) == pytest.approx(work)


def test_the_written_1f1b_takes_its_closed_form(tmp_path: Path) -> None:
    write_schedule(as_file(ParallelLayout.parse("pp=4,microbatches=8")), tmp_path / "step.csv")
    layout = ParallelLayout.parse(f"pp=4,microbatches=8,schedule=file:{tmp_path}/step.csv")
    assert makespan(timeline(layout)) == pytest.approx((8 + 3) * 3)


def test_a_schedule_that_cannot_run_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "step.csv").write_text("0F0,0B0,0F1,0B1\n")
    with pytest.raises(LayoutError, match=r"step.csv with pp=2: the file has 1 rows"):
        main([f"pp=2,schedule=file:{tmp_path}/step.csv"])
    with pytest.raises(LayoutError, match="2 micro-batches cannot fill 4 stages"):
        main(["pp=4,microbatches=2"])
