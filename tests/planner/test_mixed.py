"""Pipelines over several kinds of devices: against one kind, against every other cut, and against the simulator."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import Cluster, Workload
from fms_parallel.planner.api import Planner, search_with
from fms_parallel.planner.hardware import load_devices
from fms_parallel.planner.mixed import balance
from fms_parallel.planner.simulate import makespan, simulate
from fms_parallel.planner.space import Space

A100 = load_devices()["a100"]
SLOW = replace(A100, name="slow", tflops={"bf16": 104.0}, memory_gb_s=680.0)


def planner(*groups: tuple[object, int]) -> Planner:
    return Planner.of("llama:3.1-8b", Cluster(groups), Workload(64, 2048))  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [(1.0, 1.0, 3.0), (2.0, 5.0, 1.0), (1.0, 1.5, 1.0)])
def test_no_other_cut_has_a_faster_slowest_stage(seconds: tuple[float, ...]) -> None:
    extra, most = (0.5, 0.0, 2.0), (9, 6, 9)

    def slowest(blocks: tuple[int, ...]) -> float:
        return max(n * s + e for n, s, e in zip(blocks, seconds, extra, strict=True))

    every = [cut for cut in product(*(range(1, m + 1) for m in most)) if sum(cut) == 13]
    found = balance(seconds, extra, most, 13)
    assert found is not None and sum(found) == 13
    assert slowest(tuple(found)) == pytest.approx(min(map(slowest, every)))


@pytest.mark.parametrize(("most", "layers"), [((2, 2), 5), ((0, 9), 5), ((3, 3), 1)])
def test_blocks_without_room_are_refused(most: tuple[int, ...], layers: int) -> None:
    assert balance((1.0, 1.0), (0.0, 0.0), most, layers) is None


def test_two_groups_of_one_kind_are_one_group() -> None:
    """The same pipeline priced stage by stage and in closed form, which divides idle time evenly."""
    together = planner((A100, 16)).estimate(ParallelLayout.parse("pp=4,fsdp=4,microbatches=8,precision=bf16"))
    apart = planner((A100, 8), (A100, 8)).estimate(together.layout)
    assert together.layout.stage_split is not None and apart.layout == together.layout
    assert apart.step_time_s == pytest.approx(together.step_time_s, rel=0.03)
    assert apart.memory_gb == pytest.approx(together.memory_gb, rel=1e-9)
    assert apart.mfu == pytest.approx(together.mfu * together.step_time_s / apart.step_time_s)


@pytest.mark.parametrize("split", [(14, 6, 6, 6), (6, 14, 6, 6), (4, 6, 6, 16), (2, 10, 10, 10)])
def test_a_given_cut_is_priced_as_it_is(split: tuple[int, ...]) -> None:
    layout = ParallelLayout.parse("pp=4,fsdp=4,microbatches=8,precision=bf16")
    one = planner((A100, 16))
    best, worse = one.estimate(layout), one.estimate(replace(layout, stage_split=split))
    assert worse.step_time_s > 1.08 * best.step_time_s
    events = simulate("1f1b", 4, 8, one.stages(worse.layout))
    pipeline = sum(worse.breakdown[name] for name in ("compute", "recompute", "tp", "cp", "bubble", "pp"))
    assert makespan(events) == pytest.approx(pipeline, rel=0.05)


def test_slower_stages_hold_fewer_blocks_and_the_whole_is_faster_than_waiting() -> None:
    mixed = planner((A100, 8), (SLOW, 8))
    best = search_with(mixed, Space(), 5).results[0]
    split = best.layout.stage_split
    assert split is not None and sum(split) == 32
    half = len(split) // 2
    assert sum(split[:half]) > 2 * sum(split[half:])
    as_slow = search_with(planner((SLOW, 16)), Space(), 1).results[0]
    assert best.step_time_s < 0.8 * as_slow.step_time_s


def test_a_device_with_little_memory_holds_what_fits() -> None:
    small = replace(A100, name="small", memory_gb=16.0)
    layout = ParallelLayout.parse("pp=2,dp=2,tp=4,microbatches=8,recompute=full,precision=bf16")
    even = planner((A100, 8), (A100, 8)).estimate(layout)
    found = planner((A100, 8), (small, 8)).estimate(layout)
    assert even.memory_gb > 16 and found.margin > 0
    assert even.layout.stage_split is not None and found.layout.stage_split is not None
    assert found.layout.stage_split[1] < even.layout.stage_split[1] - 2


@pytest.mark.parametrize("pp", [2, 4])
def test_step_equals_the_simulated_pipeline(pp: int) -> None:
    mixed = planner((A100, 8), (SLOW, 8))
    layout = ParallelLayout.parse(f"pp={pp},fsdp={16 // pp},microbatches=8,precision=bf16")
    best = mixed.estimate(layout)
    assert best.layout.stage_split is not None
    events = simulate("1f1b", pp, 8, mixed.stages(best.layout))
    pipeline = sum(best.breakdown[name] for name in ("compute", "recompute", "tp", "cp", "bubble", "pp"))
    assert makespan(events) == pytest.approx(pipeline, rel=0.05)
    assert mixed.estimate(best.layout) == best
