"""The recorded timeline of a real step against the rules of its schedule: who works on what, how often, after whom."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.data.feed import Batch
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.planner.simulate import B, Event, F, W, makespan
from fms_parallel.strategy.record import promised, recorded, write_timeline
from fms_parallel.training import train
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import train_step
from tests.distributed.test_layouts import TINY

LAYOUTS = ["pp=2,microbatches=4", "pp=2,schedule=interleaved1f1b,microbatches=4", "pp=2,schedule=zbv,microbatches=4"]


def step(layouts: list[str]) -> list[list[Event]]:
    """Of each layout, the events of its second step."""
    return [one_step(layout) for layout in layouts]


def one_step(layout: str) -> list[Event]:
    model = get_model("llama", "micro", distributed_strategy=layout, **{**TINY, "layers": 4})
    optimizer = make_optimizer(model, TrainOptions())
    tokens = torch.arange(4 * 8).view(4, 8) % 97
    train_step(model, optimizer, [Batch(tokens, tokens)])
    with recorded(model) as recording:
        train_step(model, optimizer, [Batch(tokens, tokens)])
    events = recording.events()
    train_step(model, optimizer, [Batch(tokens, tokens)])
    assert recording.events() == events  # nothing is noted afterwards
    return events


@pytest.fixture(scope="module")
def found() -> dict[str, list[Event]]:
    mine, theirs = run_ranks(step, 2, LAYOUTS)
    assert mine == theirs
    return dict(zip(LAYOUTS, mine, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_works_once_on_every_micro_batch(layout: str, found: dict[str, list[Event]]) -> None:
    parsed, events = ParallelLayout.parse(layout), found[layout]
    work = [(e.work.kind, e.work.stage, e.work.micro) for e in events]
    both = [(kind, stage, micro) for kind, stage, micro in product((F, B), range(parsed.stages), range(4))]
    assert sorted(w for w in work if w[0] != W) == sorted(both)
    weights = [w for w in work if w[0] == W]
    assert len(set(weights)) == len(weights) and bool(weights) == ("zbv" in layout)
    assert all(e.rank == parsed.homes[e.work.stage] for e in events)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_works_on_what_has_not_arrived(layout: str, found: dict[str, list[Event]]) -> None:
    """On one machine: all ranks read one clock."""
    at = {(e.work.kind, e.work.stage, e.work.micro): e for e in found[layout]}
    for (kind, stage, micro), event in at.items():
        before = {F: (F, stage - 1, micro), B: (B, stage + 1, micro), W: (B, stage, micro)}[kind]
        if before in at:
            assert event.start >= at[before].end
    for rank in range(2):
        mine = sorted((e.start, e.end) for e in found[layout] if e.rank == rank)
        assert all(end <= start for (_, end), (start, _) in pairwise(mine))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_promise_is_no_longer_than_what_was(layout: str, found: dict[str, list[Event]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib")
    parsed, events = ParallelLayout.parse(layout), found[layout]
    ideal = promised(parsed, events)
    busiest = max(sum(e.end - e.start for e in events if e.rank == rank) for rank in range(2))
    assert busiest <= makespan(ideal) * (1 + 1e-9)
    write_timeline(parsed, events, tmp_path)
    trace = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert len(trace) == len(events) and (tmp_path / "timeline.png").stat().st_size > 1000


class Rows:
    """Five rows of ones."""

    seq_len = 8

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return torch.ones(9, dtype=torch.int64)


def test_without_stages_there_is_nothing_to_record(tmp_path: Path) -> None:
    model = get_model("llama", "micro", **TINY)
    with pytest.raises(ConfigError, match="no pp=N"), recorded(model):
        pass
    with pytest.raises(ConfigError, match="timeline_step=1 draws pipeline stages"):
        train(model, Rows(), steps=1, batch_size=1, timeline_step=1, output_path=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="after the last of 1 steps"):
        train(model, Rows(), steps=1, batch_size=1, timeline_step=2, output_path=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="timeline_step=1 without output_path"):
        TrainOptions(timeline_step=1)
