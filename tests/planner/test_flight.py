"""Micro-batches that a rank holds at once, against torch's own orders of work walked through one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fms_parallel.layout import ParallelLayout
from fms_parallel.models.build import get_shape
from fms_parallel.planner import Cluster, Planner, Workload
from fms_parallel.planner.catalog import Model
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.filed import KINDS, moments
from fms_parallel.planner.flight import Flight, flights
from fms_parallel.planner.simulate import Work
from fms_parallel.schedule_file import write_schedule
from fms_parallel.schedules import SCHEDULES
from fms_parallel.strategy.show import as_file

ZERO_BUBBLE = "schedule=interleaved_zero_bubble,virtual_stages"
LAYOUTS = [f"pp={p},microbatches={m},schedule=zbv" for p, m in ((2, 2), (3, 4), (4, 6), (4, 8), (4, 20), (6, 12))]
LAYOUTS += [f"pp={p},microbatches={m},{ZERO_BUBBLE}={v}" for p, m, v in ((2, 4, 2), (3, 4, 2), (4, 6, 3), (4, 12, 3))]
LAYOUTS += [f"pp={p},microbatches={m},schedule=dualpipev" for p, m in ((2, 4), (3, 9), (4, 8))]


def weighed(found: list[Flight], between: float) -> float:
    """The most that is held when a micro-batch between two halves counts `between` of one before them."""
    return max(float(np.asarray(moment.whole + between * moment.split).flat[0]) for moment in found)


@pytest.mark.parametrize("between", [1.0, 1.7, 9.0])
@pytest.mark.parametrize("words", LAYOUTS)
def test_no_rank_of_torchs_order_holds_more_and_the_ends_hold_as_much(words: str, between: float) -> None:
    layout = ParallelLayout.parse(words)
    order, split = as_file(layout), [1] * layout.stages
    ranks = [[Work(KINDS.get(a.kind, "B"), a.stage, a.micro) for a in order.order(r)] for r in range(layout.pp)]
    walked = [weighed(moments(rank, split), between) for rank in ranks]
    columns = Columns.of_layout(layout, layout.pieces)
    ends = [weighed(flights(columns, last), between) for last in (False, True)]
    turns = SCHEDULES[layout.schedule].shape == "v"  # then the last stage is on the first rank
    assert ends == pytest.approx([walked[-1], walked[0]] if turns else [walked[0], walked[-1]])
    assert max(ends) == pytest.approx(max(walked))


@pytest.mark.parametrize("words", [*LAYOUTS[::4], "pp=4,microbatches=8", "pp=4,microbatches=8,schedule=gpipe"])
def test_a_schedule_takes_the_same_memory_from_its_file(words: str, tmp_path: Path) -> None:
    layout = ParallelLayout.parse(words)
    write_schedule(as_file(layout), tmp_path / "step.csv")
    own = f"pp={layout.pp},microbatches={layout.pieces},virtual_stages={layout.stages // layout.pp}"
    filed = ParallelLayout.parse(f"{own},schedule=file:{tmp_path / 'step.csv'}")
    # A head of next to no time, or the planner would make room for it.
    shape = get_shape("llama", vocab_size=256, width=512, layers=layout.stages, heads=8, kv_heads=4, ffn_width=1536)
    work = Workload(global_batch=layout.pieces, sequence=1024)
    planner = Planner.of(Model("even", shape), Cluster.parse("h100:8"), work)
    assert planner.estimate(filed).memory_gb == pytest.approx(planner.estimate(layout).memory_gb, rel=0.02)
