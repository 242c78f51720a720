"""A schedule from a file: what is read, what is written, and the sentence for every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import schedules

from fms_parallel import compat
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.schedule_file import (
    Action,
    FileSchedule,
    _ready,
    cell_text,
    of_orders,
    parse_cells,
    read_schedule,
    write_schedule,
)
from fms_parallel.shape import ModelShape

SHAPE = ModelShape(layers=4, width=8, heads=2, kv_heads=2, head_width=4, ffn_width=8, vocab=9, max_positions=8)

GOOD = "0F0,0F1,0B0,0B1\n,1F0,1B0,1F1,1B1\n"
PARTS = "0F0,0F1,0I0,0B1,0W0\n1F0,1I0,1W0,1F1,1B1\n"
TOGETHER = "0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n1F0,1B0,1F1,(1B1;1F2)OVERLAP_F_B,1B2\n"


def rows_of(text: str) -> FileSchedule:
    return parse_cells([line.split(",") for line in text.splitlines()], "step.csv")


def test_cells_are_read_as_torch_reads_them() -> None:
    for text in (GOOD, PARTS, TOGETHER):
        for row in rows_of(text).rows:
            for cell in row:
                theirs = schedules._Action.from_str(cell_text(cell))
                parts = () if theirs is None else theirs.sub_actions or (theirs,)
                assert cell == tuple(
                    (part.stage_index, part.computation_type.value, part.microbatch_index) for part in parts
                )


@pytest.mark.parametrize("text", [GOOD, PARTS, TOGETHER])
def test_what_is_written_reads_back(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a = b.csv"
    write_schedule(rows_of(text), path)
    read = read_schedule(str(path))
    assert [read.order(rank) for rank in range(2)] == [rows_of(text).order(rank) for rank in range(2)]
    path.write_text(path.read_text().replace(",", " , ") + "\n\n")  # blanks, and empty lines at the end
    assert [read_schedule(str(path)).order(rank) for rank in range(2)] == [read.order(rank) for rank in range(2)]


def test_ranks_hold_the_stages_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    path.write_text("1F0,1B0,1F1,1B1\n0F0,0F1,0B0,0B1\n")
    layout = ParallelLayout.parse(f"pp=2,schedule=file:{path}")
    assert (layout.stages_of(0), layout.stages_of(1), layout.homes) == ([1], [0], (1, 0))
    assert ParallelLayout.parse("pp=2,schedule=zbv").homes == (0, 1, 1, 0)
    layout.validate(SHAPE)


@pytest.mark.parametrize("text", [GOOD, PARTS, TOGETHER])
def test_a_schedule_that_can_run_is_accepted(text: str) -> None:
    micros = 1 + max(action.micro for action in rows_of(text).order(0))
    assert rows_of(text).refusal(micros, 2, 2) is None


FOUR = "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"the file is empty"),
        (GOOD + "2F0\n", r"the file has 3 rows, one for each rank: write pp=3, or 2 rows"),
        (",,\n,\n", r"the file has 0 stages: they must be a multiple of its 2 ranks"),
        (GOOD.replace("1B1", "1B1,2F0"), r"the file has 3 stages: they must be a multiple of its 2 ranks"),
        (FOUR, r"the file has 4 stages, the layout 2: write virtual_stages=2"),
        ("0F0,0B0\n1F0,1B0\n", r"the file has one micro-batch: nothing can overlap"),
        (GOOD.replace("1B1", "1B1,1F2"), r"the file has 3 micro-batches, the layout 2: write microbatches=3"),
        ("0F0,1F0,0F1,1F1,1B0,1B1,0B0,0B1\n,,\n", r"row 2 does nothing: every rank needs a stage"),
        (
            GOOD.replace("1B1", "1B1,0B1"),
            r"row 2, cell 6 \(0B1\): stage 0 is on another rank already \(row 1, cell 1 \(0F0\)\); a stage has one",
        ),
        (GOOD.replace("0F1", "0F0"), r"row 1, cell 2 \(0F0\): was done already in row 1, cell 1 \(0F0\)"),
        (
            GOOD.replace("0F1", "0B1").replace("0B1\n", "0F1\n"),
            r"row 1, cell 2 \(0B1\): comes before 0F1, which it needs",
        ),
        (PARTS.replace("0I0,0B1,0W0", "0W0,0B1,0I0"), r"row 1, cell 3 \(0W0\): comes before 0I0, which it needs"),
        (
            PARTS.replace("0W0", "0B0"),
            r"row 1, cell 5 \(0B0\): row 1, cell 3 \(0I0\) goes backward as well; use either B",
        ),
        (GOOD.replace("0B1", "0W0"), r"row 1, cell 4 \(0W0\): row 1, cell 3 \(0B0\) goes backward as well"),
        (GOOD.replace(",1B0", ""), r"1B0 is missing: each micro-batch goes forward and backward once per stage"),
        (PARTS.replace(",0W0", ""), r"0W0 is missing"),
        (GOOD.replace("1F0,1B0,", ""), r"1F0 is missing"),
        (
            GOOD.replace("0F1,0B0", "0B0,0F1").replace("1F0,1B0,1F1", "1F1,1F0,1B0"),
            r"ranks wait for each other for ever: row 1, cell 2 \(0B0\) waits for 1B0 \(or 1I0\); "
            r"row 2, cell 2 \(1F1\) waits for 0F1\. Move what is waited for to an earlier cell",
        ),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    path.write_text(text)
    layout = ParallelLayout.parse(f"pp=2,schedule=file:{path}")
    with pytest.raises(LayoutError, match=rf"^schedule=file:{path} with pp=2: {words}"):
        layout.validate(SHAPE)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("0X0", "write stage, kind and micro-batch, as in 0F3; kinds are F, B, I and W"),
        ("F0", "write stage, kind"),
        ("0F", "write stage, kind"),
        ("0F0x", "write stage, kind"),
        ("(0F0;0X1)OVERLAP_F_B", "write stage, kind"),
        ("0SEND_F0", "sends, receives and gathers are added by torch; leave forward and backward only"),
        ("0UNSHARD", "sends, receives and gathers are added by torch"),
    ],
)
def test_a_cell_that_says_nothing_known_is_named(cell: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    path.write_text(GOOD.replace("1F1", cell))
    with pytest.raises(LayoutError) as caught:
        read_schedule(str(path))
    assert str(caught.value).startswith(f"schedule=file:{path}, row 2, cell 4 ({cell!r}): {words}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    layout = ParallelLayout.parse(f"pp=2,schedule=file:{tmp_path}/none.csv")  # a layout alone opens no file
    with pytest.raises(LayoutError, match=f"schedule=file:{tmp_path}/none.csv cannot be read: .*No such file"):
        layout.validate(SHAPE)
    with pytest.raises(LayoutError, match="cannot be written"):
        write_schedule(rows_of(GOOD), tmp_path / "no" / "folder.csv")


def test_an_action_prints_as_its_cell() -> None:
    assert str(Action(3, "I", 12)) == "3I12"


# ---- against torch ----------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> list[list[Action]]:
    """Any order in which ranks could do the work, at times with one rank's shuffled."""
    ranks, micros = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    stages = ranks * draw(st.integers(1, 2))
    others = draw(st.lists(st.integers(0, ranks - 1), min_size=stages - ranks, max_size=stages - ranks))
    homes = draw(st.permutations([*range(ranks), *others]))  # every rank has a stage
    waiting = []
    for stage in range(stages):
        for micro in range(micros):
            kinds = ("F", "B") if draw(st.booleans()) else ("F", "I", "W")
            waiting.append([Action(stage, kind, micro) for kind in kinds])
    done: set[Action] = set()
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    while waiting:
        ready = [chain for chain in waiting if _ready(chain[0], done, stages - 1)]
        chain = draw(st.sampled_from(ready))
        rows[homes[chain[0].stage]].append(chain[0])
        done.add(chain.pop(0))
        waiting = [chain for chain in waiting if chain]
    if draw(st.booleans()):
        rows[0] = draw(st.permutations(rows[0]))
    return rows


def torch_runs(rows: list[list[Action]], stages: int, micros: int) -> bool:
    """Whether torch can order the sends and receives of this work."""
    place = {"group_size": len(rows), "group_rank": 0, "num_stages": stages, "submod": nn.Identity()}
    fake = [SimpleNamespace(**place, stage_index=0, is_first=True, is_last=stages == 1)]
    try:
        cells = [[str(action) for action in row] for row in rows]
        compat.schedule_of_cells(fake, micros, lambda *_: torch.zeros(()), cells)
    except (AssertionError, ValueError):
        return False
    return True


@settings(derandomize=True, max_examples=100, deadline=None)
@given(orders())
def test_what_is_accepted_is_what_torch_can_run(rows: list[list[Action]]) -> None:
    stages, micros = (1 + max(getattr(a, name) for row in rows for a in row) for name in ("stage", "micro"))
    refusal = of_orders(rows).refusal(micros, len(rows), stages)
    assert (refusal is None) == torch_runs(rows, stages, micros), refusal
