"""Stragglers in simulation, profiles against formulas, candidates, histories: no ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fms_parallel.data import RandomRows
from fms_parallel.data.rows import IGNORE
from fms_parallel.dynamic.adaptation import Adaptation
from fms_parallel.dynamic.blocks import BlockClock
from fms_parallel.dynamic.describe import SwitchCosts, describe
from fms_parallel.dynamic.hardware import distances
from fms_parallel.dynamic.history import History, draw_history, read_history
from fms_parallel.dynamic.monitor import RankWindow, finite_metrics, summarised
from fms_parallel.dynamic.selector import DynamicStrategySelector
from fms_parallel.dynamic.stragglers import Stragglers
from fms_parallel.dynamic.workload import DatasetProfiler, ModelProfiler
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config, get_model
from fms_parallel.phases import Phase, Phases, Work
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.hardware import Cluster, load_devices

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "width": 64,
    "layers": 8,
    "heads": 4,
    "kv_heads": 4,
    "ffn_width": 128,
    "max_positions": 64,
}
WORK = Work(16, 32)


def build(layout: ParallelLayout, **how: Any) -> nn.Module:
    return get_model("llama", "micro", distributed_strategy=layout, **SIZES, **how)


def selector(ranks: int = 4, **more: Any) -> DynamicStrategySelector:
    return DynamicStrategySelector(
        Cluster.parse(f"cpu:{ranks}", load_devices()), get_config("llama", "micro", **SIZES).shape(), **more
    )


# ---- stragglers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", range(6))
def test_a_rank_three_times_slower_is_found_within_five_steps_whenever_it_begins(begins: int) -> None:
    draws, heard = np.random.default_rng(begins), Stragglers(4)
    seconds = np.ones((2, 4))
    for step in range(1, 40):
        slow = np.array([1, 1, 3 if step > begins + 10 else 1, 1])
        seconds = np.stack([seconds[-1], np.exp(draws.normal(0, 0.1, 4)) * slow])
        if step % 2 == 0:  # a window: the least of its two steps
            heard.hear(seconds.min(0).tolist())
        if heard.slowness[2] > 1:
            break
    assert step - (begins + 10) <= 5 and heard.slowness[2] == pytest.approx(3, rel=0.3)
    assert [heard.slowness[rank] for rank in (0, 1, 3)] == [1, 1, 1]
    for _ in range(2):
        heard.hear([1.0, 1.0, 1.0, 1.05])
    assert heard.slowness == (1, 1, 1, 1)


def test_noise_alone_makes_no_straggler_in_two_hundred_steps() -> None:
    for seed in range(20):
        draws, heard = np.random.default_rng(seed), Stragglers(4)
        for _ in range(100):
            steps = np.exp(draws.normal(0, 0.15, (2, 4))) * np.where(draws.random((2, 4)) < 0.05, 3, 1)
            assert heard.hear(steps.min(0).tolist()) == ""


def test_a_slow_rank_of_a_tp_group_goes_into_a_stage_with_fewer_blocks() -> None:
    """Ranks of tp wait for their slowest; a stage can have as many blocks as it is fast."""
    tp, staged = ParallelLayout.parse("tp=4,sp"), ParallelLayout.parse("pp=2,tp=2,sp,microbatches=8")
    found = selector(layouts=[tp, staged])
    found.shape = replace(found.shape, width=1024, ffn_width=2816, head_width=256)  # too large for overheads to count
    healthy = {one.layout: one.seconds for one in found.candidates(WORK, tp)}
    slow = {one.layout: one.seconds for one in found.candidates(WORK, tp, (1.0, 1.0, 1.0, 3.0))}
    assert slow[tp] > 2 * healthy[tp]
    best = min(slow, key=slow.__getitem__)
    assert best.pp == 2 and best.stage_split is not None and best.stage_split[0] > best.stage_split[1]
    assert slow[tp] / slow[best] >= 1.3


def test_a_slow_stage_gets_fewer_blocks_and_an_even_split_comes_back() -> None:
    even = ParallelLayout.parse("pp=4,microbatches=8")
    found = selector(layouts=[even])
    found.shape = replace(found.shape, width=1024, ffn_width=2816, head_width=256)  # too large for overheads to count
    slow = found.candidates(WORK, even, (1.0, 1.0, 3.0, 1.0))
    best = min(slow, key=lambda one: one.seconds)
    assert best.layout.stage_split is not None and best.layout.stage_split[2] == 1
    before = next(one.seconds for one in slow if one.layout == even)
    assert before / best.seconds >= 1.5
    again = found.candidates(WORK, best.layout)
    assert min(again, key=lambda one: one.seconds).layout == even


# ---- candidates -------------------------------------------------------------------------------------------------


def test_candidates_fit_ranks_batch_and_model_and_differ_in_degrees() -> None:
    found = selector(most=6).candidates(WORK)
    assert 3 <= len(found) <= 6 and len({one.layout.degrees for one in found}) == len(found)
    for one in found:
        one.layout.validate(selector().shape)
        assert one.layout.world_size == 4 and WORK.batch_size % one.layout.data_parallel == 0 and one.seconds > 0


def test_a_batch_that_no_layout_divides_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layout of 4 ranks"):
        selector(layouts=["dp=4"]).candidates(Work(16, 6))


def test_a_layout_refused_twice_is_not_proposed_again() -> None:
    found = selector()
    first = found.candidates(WORK)[0].layout
    found.refused[first] = 2
    assert first not in [one.layout for one in found.candidates(WORK)]


def test_measured_blocks_scale_computation_and_not_messages() -> None:
    found, layout = selector(), ParallelLayout.parse("pp=4,microbatches=8")
    before = {text: found.priced(ParallelLayout.parse(text), WORK) for text in ("dp=4", "tp=4")}
    planner = found._planner(WORK)
    pieces = planner.costs.pieces(Columns.of_layout(layout, WORK.batch_size))
    assert found.calibrate(layout, WORK, 10 * (pieces["forward"] + pieces["backward"])) == pytest.approx(10)
    assert found.calibrate(layout, WORK, 1.0) is None  # once
    grown = {text: found.priced(ParallelLayout.parse(text), WORK).seconds / one.seconds for text, one in before.items()}  # type: ignore[union-attr]
    assert 1 < grown["tp=4"] < grown["dp=4"] <= 10.001


def test_less_memory_is_less_by_the_planner() -> None:
    found = selector()
    here = found.priced(ParallelLayout.parse("dp=4"), WORK)
    lighter = found.less_memory(WORK, ParallelLayout.parse("dp=4"))
    assert here is not None and lighter
    assert all(one.memory_gb - one.reserve_gb <= 0.85 * (here.memory_gb - here.reserve_gb) for one in lighter)


def test_memory_that_is_nearly_full_brings_a_layout_that_needs_less() -> None:
    found = selector()
    adaptation = Adaptation(found, SwitchCosts(None, 1e9), Phases((), 16, 32), steps=100)
    adaptation.layout, adaptation._basis = ParallelLayout.parse("dp=4"), (WORK, (1.0,))
    told = adaptation._news(summarised(10, "dp=4", 1, [rank_window(memory=80.0, room=20.0)]), 10, False)
    assert told == "" and not adaptation.history.of("memory")
    told = adaptation._news(summarised(12, "dp=4", 1, [rank_window(memory=95.0, room=5.0)]), 12, False)
    proposal = adaptation._decide(12, told)
    assert "95% of a rank's memory" in told and len(adaptation.history.of("memory")) == 1
    assert proposal is not None and "GiB predicted" in proposal.reason
    there = found.priced(proposal.layout, WORK)
    assert there is not None and there.memory_gb < found.priced(adaptation.layout, WORK).memory_gb  # type: ignore[union-attr]
    found.less_memory = lambda *_: []  # type: ignore[method-assign]
    assert adaptation._decide(12, told) is None and "no layout needs less" in adaptation.history.events[-1].reason


def test_a_layout_without_a_price_is_kept_and_one_that_cannot_go_on_is_left() -> None:
    found = selector()
    adaptation = Adaptation(found, SwitchCosts(None, 1e9), Phases([Phase(20, batch_size=6)], 16, 32), steps=100)
    adaptation._basis = (WORK, (1.0,))
    adaptation.layout = unpriced = ParallelLayout.parse("pp=2,fsdp=2,recompute=budget=0.5")
    price = found.priced
    found.priced = lambda layout, *more: None if layout == unpriced else price(layout, *more)  # type: ignore[method-assign]
    assert adaptation._decide(10, "") is None and "no price" in adaptation.history.events[-1].reason
    adaptation.layout = ParallelLayout.parse("dp=4")
    proposal = adaptation._decide(20, "6 rows in a step")
    assert proposal is not None and 6 % proposal.layout.data_parallel == 0


def test_a_decision_that_fails_leaves_the_run_as_it_is() -> None:
    class Broken:
        def decide(self, situation: Any) -> Any:
            return 1 / 0

    adaptation = Adaptation(selector(policy=Broken()), SwitchCosts(None, 1e9), Phases((), 16, 32), steps=100)
    adaptation.layout, adaptation._basis = ParallelLayout.parse("dp=4"), (WORK, (1.0,))
    assert adaptation._decided_on(10, "") is None
    assert (
        "ZeroDivisionError" in adaptation.history.events[-1].reason and adaptation.history.events[-1].kind == "refused"
    )


def test_cost_of_a_change_is_the_exact_bytes_of_the_busiest_rank() -> None:
    native = describe(build)
    assert all(p.is_meta for p in native.parameters())
    costs = SwitchCosts(native, bytes_per_s=1e6, rest=2.0)
    one, two = ParallelLayout(dp=2), ParallelLayout(fsdp=2)
    assert costs.largest(one, two) == 0 and costs.seconds(one, two) == 2.0  # each keeps a part of what it has
    total = sum(p.numel() for p in native.parameters()) * 12
    assert costs.largest(two, one) == pytest.approx(total / 2, rel=0.02)
    assert costs.seconds(two, one) == pytest.approx(2 + total / 2 / 1e6, rel=0.02)


# ---- profiles ---------------------------------------------------------------------------------------------------


def test_layers_add_up_to_the_models_formulas() -> None:
    shape = get_config("llama", "micro", **SIZES).shape()
    profile = ModelProfiler(shape).profile(48)
    assert profile.flops == pytest.approx(shape.flops_per_token(48) * 48)
    assert profile.activation_bytes == shape.activation_bytes(1, 48)
    assert sum(layer.parameters for layer in profile.layers) == shape.parameters() == profile.parameters
    assert len(profile.layers) == 10 and json.dumps(profile.as_json())


def test_lengths_of_rows_are_counted_without_padding() -> None:
    class Padded(RandomRows):
        def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, labels = super().row(index)
            labels[index % 8 + 1 :] = IGNORE
            return inputs, labels

    found = DatasetProfiler(Padded(16, 61, 64)).profile()
    assert (found.shortest, found.longest, found.mean_length) == (1, 8, 4.5)
    assert found.padding == pytest.approx(1 - 4.5 / 16) and found.bytes == 64 * 2 * 16 * 8 and found.rows_per_s > 0
    assert json.dumps(found.as_json())


def test_pairs_are_all_timed_in_small_jobs_and_a_few_in_large_ones() -> None:
    assert distances(1) == [] and distances(4) == [1, 2, 3] and distances(64) == [1, 2, 4, 8, 16, 32]


# ---- monitor ----------------------------------------------------------------------------------------------------


def test_block_clock_counts_passes_and_leaves_gradients_alone() -> None:
    ids = torch.arange(26).view(2, 13) % 61
    plain, timed = build(ParallelLayout()), build(ParallelLayout())
    clock = BlockClock(timed, torch.device("cpu"))
    for model in (plain, timed):
        model(ids, labels=ids).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), timed.parameters(), strict=True))
    assert {way: len(passes) for way, passes in clock._passes.items()} == {"forward": 8, "backward": 8}
    once, busy = clock.take()
    assert 0 < once < busy and clock.take() == (0.0, 0.0)
    clock.detach()
    timed(ids, labels=ids).backward()
    assert clock.take() == (0.0, 0.0)


def rank_window(**values: float) -> RankWindow:
    given = dict.fromkeys(("scatter", "steps", "block", "busy", "loader", "memory", "room"), 1.0)
    return RankWindow(**{**given, "seconds": 1.0, "communication": float("nan"), "bad": 0.0, "asked": 0.0, **values})


def test_a_window_is_that_of_the_slowest_rank_and_knows_stages() -> None:
    ranks = [
        rank_window(block=block, busy=busy, seconds=s)
        for block, busy, s in ((1, 0.5, 2), (1, 0.5, 2), (3, 1, 3), (2, 1, 2))
    ]
    window = summarised(7, "pp=2,dp=2", 2, ranks)
    assert window.seconds == 3 and window.slowness == (1, 1, 3, 2) and window.stages == (1, 3)
    assert window.bubble == pytest.approx(0.25) and window.memory == 0.5 and window.measured
    assert window.imbalance == pytest.approx(3 / 1.75) and window.as_json()["communication"] is None
    assert not summarised(7, "", 1, [rank_window(bad=1.0)]).measured


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (None, "NoneType"),
        ({}, "no 'loss'"),
        ({"loss": float("nan")}, "is nan"),
        ({"loss": 1, "norm": float("inf")}, "inf"),
    ],
)
def test_metrics_that_do_not_count_are_told_in_words(metrics: Any, words: str) -> None:
    assert words in finite_metrics(metrics)
    assert finite_metrics({"loss": 1.0, "note": "fine"}) == ""


# ---- phases and history -----------------------------------------------------------------------------------------


def test_phases_say_what_a_step_works_on_and_when_it_ends() -> None:
    phases = Phases([Phase(10, seq_len=32), Phase(30, batch_size=64)], 8, 16)
    assert [phases.at(step) for step in (9, 10, 30)] == [Work(8, 16), Work(32, 16), Work(32, 64)]
    assert (phases.until(9, 50), phases.until(10, 50), phases.until(40, 50)) == (1, 20, 10)
    assert [step for step in range(50) if phases.begins(step)] == [10, 30] and phases.longest == 32
    with pytest.raises(ConfigError, match="given twice"):
        Phases([Phase(10), Phase(10)], 8, 16)


def test_history_is_read_back_and_drawn(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    for step in range(2, 20, 2):
        history.add("window", step=step, seconds=0.1, layout="fsdp=4" if step < 10 else "pp=4")
    history.add("switch", 10, "it pays", before="fsdp=4", after="pp=4")
    history.close()
    events = read_history(tmp_path / "h.jsonl")
    assert events == [event.as_json() for event in history]
    pytest.importorskip("matplotlib")
    assert draw_history(events, tmp_path / "h.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_history([], tmp_path / "none.png")
    resumed = History(tmp_path / "h.jsonl", append=True)
    resumed.add("start", 20, "goes on")
    resumed.close()
    assert read_history(tmp_path / "h.jsonl") == [*events, resumed.events[0].as_json()]
