"""A schedule from a file against one process: every gradient, with stages anywhere, and an exact refusal otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.schedule_file import write_schedule
from fms_parallel.schedules import SCHEDULES
from fms_parallel.strategy.show import as_file
from fms_parallel.training import evaluate
from fms_parallel.verify import TOLERANCE
from tests.distributed.test_layouts import BIASED, ranks_of
from tests.distributed.test_pipeline import TIED, compare
from tests.poison import poisoned_memory
from tests.training.runs import rows, tiny

NEIGHBOURS = "0F0,1F0,0F1,1F1,1B0,0B0,1B1,0B1\n2F0,3F0,3I0,2B0,2F1,3F1,3B1,2B1,3W0\n"
"""Stages 0 and 1 on rank 0, 2 and 3 on rank 1."""

UNEVEN = "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,2F0,3F0,3B0,2B0,1B0,1F1,2F1,3F1,3B1,2B1,1B1,1F2,2F2,3F2,3B2,2I2,1I2,2W2,1W2\n"
"""One stage on rank 0, three on rank 1."""

BACKWARDS = "1F0,1B0,1F1,1B1,1F2,1B2\n0F0,0F1,0B0,0F2,0B1,0B2\n"
"""The last stage on the first rank."""

RING = "0F0,0F1,3F0,(3F1;3B0)OVERLAP_F_B,3B1,0B0,0B1\n1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1\n"
"""First and last stage on one rank."""

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("pp=2,virtual_stages=2,microbatches=2", NEIGHBOURS, {"dropout": 0.2, **TIED}),
    ("pp=2,virtual_stages=2,microbatches=3,recompute=full", UNEVEN, TIED),
    ("pp=2,microbatches=3", BACKWARDS, TIED),
    ("pp=2,virtual_stages=2,microbatches=2", RING, TIED),
    ("pp=2,fsdp=2,virtual_stages=2,microbatches=2", NEIGHBOURS, TIED),
    ("pp=2,tp=2,sp,microbatches=3,stage_split=1,3", BACKWARDS, BIASED),
    ("pp=2,dp=2,virtual_stages=2,microbatches=2", RING, {}),
]


@pytest.mark.parametrize(("layout", "text", "config"), CASES, ids=[f"{layout}-{'-'.join(c)}" for layout, _, c in CASES])
def test_fp64_matches_one_process(layout: str, text: str, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "step.csv").write_text(text)
    layout = f"{layout},schedule=file:{tmp_path}/step.csv"
    for report in run_ranks(compare, ranks_of(layout), layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1):
        assert report.worst <= TOLERANCE["fp64"], report


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_named_schedule_runs_from_its_file(name: str, tmp_path: Path) -> None:
    layout = ParallelLayout.parse(f"pp=2,schedule={name},microbatches=4")
    write_schedule(as_file(layout), tmp_path / "step.csv")
    text = f"pp=2,schedule=file:{tmp_path}/step.csv,microbatches=4,virtual_stages={layout.stages // 2}"
    for report in run_ranks(compare, 2, text, {}, "fp64", 1):
        assert report.worst <= TOLERANCE["fp64"], report


def validation_loss(layout: str) -> float:
    with poisoned_memory():
        model = tiny(f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64"), layers=4)  # type: ignore[arg-type]
        return evaluate(model, rows(11), batch_size=8)


@pytest.mark.parametrize("name", ["", "zbv", "dualpipev", "interleaved_zero_bubble"])
def test_evaluation_matches_one_process(name: str, tmp_path: Path) -> None:
    """Also where neighbouring stages are on one rank, and forward and backward in one cell."""
    (tmp_path / "step.csv").write_text(RING)
    word = (
        f"schedule={name},microbatches=4"
        if name
        else f"schedule=file:{tmp_path}/step.csv,virtual_stages=2,microbatches=2"
    )
    found = run_ranks(validation_loss, 2, f"pp=2,{word}")
    assert found == pytest.approx([validation_loss("")] * 2, rel=1e-12)


def refused_for_another_file(folder: str) -> str:
    import os

    import torch.distributed as dist

    os.chdir(Path(folder, str(dist.get_rank())))
    try:
        tiny("pp=2,microbatches=3,schedule=file:step.csv")
    except LayoutError as error:
        return str(error)
    return "nothing"


def test_ranks_with_other_files_are_refused(tmp_path: Path) -> None:
    for rank, text in enumerate((BACKWARDS, BACKWARDS.replace("1B0,1F1", "1F1,1B0"))):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "step.csv").write_text(text)
    assert (
        run_ranks(refused_for_another_file, 2, str(tmp_path))
        == ["schedule=file:step.csv: rank 1 has read another schedule than rank 0; give every rank the same file."] * 2
    )
