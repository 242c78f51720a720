"""Blocks kept gathered and feed-forwards left whole, together: against a search that is told to price every pair."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import Workload
from fms_parallel.planner.api import Estimate, Planner, search_with
from fms_parallel.planner.space import Space
from fms_parallel.planner.variants import SPARE

JOBS = (
    # Few long rows on slow links: both words together are best of all.
    (("llama:micro", "cpu:8", Workload(2, 8192, "fp32")), True),
    # Both help one layout, and another one is faster.
    (("llama:3.2-1b", "a10:8", Workload(4, 32768)), False),
    # Memory has room for some blocks only.
    (("llama:3.1-8b", "a40:8/4", Workload(8, 8192)), False),
)


def both(estimate: Estimate) -> bool:
    return estimate.layout.keep_gathered > 0 and estimate.layout.tp_parts == "attention"


def every_pair(planner: Planner, exclude: tuple[str, ...]) -> list[Estimate]:
    """Every number of kept blocks with every part that tp cuts, as far as memory is left over."""
    space = Space(exclude=exclude, keep_gathered=range(planner.model.shape.layers + 1))
    found = [
        e
        for pins in ((), ("tp_parts=attention",))
        for e in search_with(planner, replace(space, pins=pins), 10**6).results
    ]
    return [e for e in found if e.layout.keep_gathered <= 2 or e.margin >= SPARE]


@pytest.mark.parametrize(("job", "wins"), JOBS)
def test_search_finds_the_best_of_all_pairs(job: tuple[str, str, Workload], wins: bool) -> None:
    planner = Planner.of(*job)
    exclude = ("pp", "cp", "dp")
    found, told = search_with(planner, Space(exclude=exclude), 50).results, every_pair(planner, exclude)
    assert found[0].step_time_s == pytest.approx(min(e.step_time_s for e in told), rel=1e-12)
    assert both(found[0]) == wins
    # What is slow without a word is not passed over where only one layout is asked for.
    assert search_with(planner, Space(exclude=exclude), 1).results[0].step_time_s == found[0].step_time_s
    # Of every layout the best pair of words, where that is a pair: all of those fast enough to be shown.
    families: dict[tuple[ParallelLayout, int], Estimate] = {}
    for estimate in sorted(told, key=lambda e: (round(e.step_time_s, 12), e.layout.keep_gathered)):
        plain = replace(estimate.layout, keep_gathered=0, tp_parts="all")
        families.setdefault((plain, estimate.micro_batch), estimate)
    expected = [e.step_time_s for e in families.values() if both(e) and e.step_time_s <= found[-1].step_time_s]
    assert [e.step_time_s for e in found if both(e)] == pytest.approx(sorted(expected), rel=1e-12)


def test_each_is_priced_as_alone_and_beats_what_it_comes_from() -> None:
    seen = 0
    for job, _ in JOBS:
        planner = Planner.of(*job)
        for estimate in filter(both, search_with(planner, Space(exclude=("pp",)), 50).results):
            alone = planner.estimate(estimate.layout, estimate.micro_batch)
            assert alone.step_time_s == pytest.approx(estimate.step_time_s, rel=1e-12)
            assert alone.memory_breakdown == pytest.approx(dict(estimate.memory_breakdown), rel=1e-12)
            for words in ({"tp_parts": "all"}, {"keep_gathered": 0}, {"tp_parts": "all", "keep_gathered": 0}):
                other = planner.estimate(replace(estimate.layout, **words), estimate.micro_batch)
                assert estimate.step_time_s < other.step_time_s
            seen += 1
    assert seen > 5


def test_blocks_are_kept_as_far_as_memory_reaches_and_a_part_stays_free() -> None:
    planner = Planner.of("llama:3.1-70b", "h100:64", Workload(1024, 8192))
    found = [e for e in search_with(planner, Space(), 50).results if e.layout.keep_gathered > 2]
    assert found
    for estimate in found:
        more = replace(estimate.layout, keep_gathered=estimate.layout.keep_gathered + 1)
        assert planner.estimate(more, estimate.micro_batch).margin < SPARE <= estimate.margin


def test_what_is_named_is_no_variant() -> None:
    planner = Planner.of(*JOBS[0][0])
    for space, word in (
        (Space(exclude=("attention",)), "tp_parts"),
        (Space(keep_gathered=(0,)), "keep_gathered"),
        (Space(pins=("keep_gathered=0",)), "keep_gathered"),
    ):
        default = "all" if word == "tp_parts" else 0
        assert all(getattr(e.layout, word) == default for e in search_with(planner, space, 200).results)
