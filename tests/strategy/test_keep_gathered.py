"""Blocks that stay gathered between forward and backward: slower gathers, more memory, as predicted; the words' rules.

That losses and gradients are those of one process is `tests/distributed/test_layouts.py`'s.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.models.build import get_shape
from fms_parallel.planner import Cluster, Planner, Workload
from fms_parallel.planner.api import search_with
from fms_parallel.planner.catalog import Model
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.software import load_software
from fms_parallel.planner.space import Space
from fms_parallel.simulate import Simulation, simulate

SIZE: dict[str, Any] = {"vocab_size": 256, "width": 128, "layers": 4, "heads": 8, "kv_heads": 4, "ffn_width": 384}
B, S = 8, 64
BLOCK = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384 + 2 * 128


@cache
def simulated(words: str) -> Simulation:
    return simulate(get_model, ParallelLayout.parse(words), batch_size=B, seq_len=S, architecture="llama", **SIZE)


def planner(link: float = 0.01) -> Planner:
    """Over links of so many GB/s, by default too slow for gathers to hide behind computation."""
    native = load_software("native").with_precision("fp32")
    habits = replace(native, reserve_gb=0, stream_pools=False, logits_at_once=1 << 23)
    work = Workload(global_batch=B, sequence=S, precision="fp32")
    device = Cluster.parse("h100:2").device
    slow = replace(device, intra=replace(device.intra, gb_s=link), inter=replace(device.inter, gb_s=link))
    return Planner(Model("small", get_shape("llama", **SIZE)), Cluster(((slow, 2),)), work, habits)


@pytest.mark.parametrize("kept", [1, 3])
def test_each_kept_block_spares_one_gather_of_its_parameters(kept: int) -> None:
    plain, held = simulated("fsdp=2"), simulated(f"fsdp=2,keep_gathered={kept}")
    before, after = plain.sent("all_gather", "fsdp"), held.sent("all_gather", "fsdp")
    assert before.count - after.count == kept
    assert before.bytes - after.bytes == 4 * BLOCK * kept
    assert plain.sent("reduce_scatter", "fsdp") == held.sent("reduce_scatter", "fsdp")


@pytest.mark.parametrize("words", ["fsdp=2", "fsdp=2,keep_gathered=2", "fsdp=2,keep_gathered=4"])
def test_predicted_memory_is_that_of_the_simulation(words: str) -> None:
    assert planner().estimate(ParallelLayout.parse(words)).memory_gb * GIB == pytest.approx(
        simulated(words).peak, rel=0.05
    )


def test_the_planner_prices_one_gather_less_and_its_memory() -> None:
    estimates = [planner().estimate(ParallelLayout(fsdp=2, keep_gathered=kept)) for kept in range(5)]
    times, memory = [e.step_time_s for e in estimates], [e.memory_gb for e in estimates]
    assert times == sorted(times, reverse=True) and memory == sorted(memory)
    steps = [one - other for one, other in pairwise(times)]
    assert steps[0] > 0 and steps == pytest.approx([steps[0]] * 4)  # each block as much as the other
    assert (memory[3] - memory[2]) * GIB == pytest.approx(4 * BLOCK, rel=1e-6)
    fast = [planner(1e6).estimate(ParallelLayout(fsdp=2, keep_gathered=kept)).step_time_s for kept in (0, 4)]
    assert fast[0] == fast[1]  # behind computation there is nothing to win


def test_the_planner_keeps_as_many_as_fit() -> None:
    slow = planner()
    space = Space(keep_gathered=(0, 1, 2, 3, 4), pins=("fsdp=2",), recompute=("none",))
    free = search_with(slow, space, 1).results[0]
    assert free.layout.keep_gathered == 4
    two, three = (slow.estimate(ParallelLayout(fsdp=2, keep_gathered=kept)).memory_gb for kept in (2, 3))
    tight = Cluster(((replace(slow.cluster.device, memory_gb=(two + three) / 2), 2),))
    assert search_with(replace(slow, cluster=tight), space, 1).results[0].layout.keep_gathered == 2


def test_a_search_that_is_told_nothing_keeps_what_there_is_room_for() -> None:
    """Against trying every number; a twentieth of the memory stays free."""
    slow, space = planner(), Space(pins=("fsdp=2",), recompute=("none",))
    every = replace(space, keep_gathered=range(5))
    found, best = (search_with(slow, s, 1).results[0] for s in (space, every))
    assert found == best and found.layout.keep_gathered == 4
    three = slow.estimate(ParallelLayout(fsdp=2, keep_gathered=3)).memory_gb
    tight = Cluster(((replace(slow.cluster.device, memory_gb=three / 0.949), 2),))
    result = search_with(replace(slow, cluster=tight), space, 99)
    assert result.results[0].layout.keep_gathered == 3
    assert result.considered == result.feasible + sum(result.rejected.values())
    for pins, kept in ((("kept=1",), {1}), (("keep_gathered<=2",), {0, 1, 2}), (("keep_gathered=0",), {0})):
        results = search_with(slow, replace(space, pins=("fsdp=2", *pins)), 99).results
        assert {e.layout.keep_gathered for e in results if e.layout.fsdp == 2} == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dp=2,keep_gathered=1", "without fsdp nothing is gathered"),
        ("pp=2,fsdp=2,keep_gathered=1", "keeps all of its blocks"),
        ("fsdp=2,keep_gathered=0", "whole number >= 1"),
    ],
)
def test_a_word_that_would_do_nothing_is_refused(words: str, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        ParallelLayout.parse(words)


def test_more_than_there_are_is_refused_and_text_comes_back() -> None:
    layout = ParallelLayout.parse("fsdp=2,keep_gathered=5")
    assert ParallelLayout.parse(str(layout)) == layout == ParallelLayout.from_json(layout.to_json())
    with pytest.raises(LayoutError, match="keep_gathered=5: the model has 4 blocks"):
        layout.validate(get_shape("llama", **SIZE))
    assert ParallelLayout.parse("hsdp,keep_gathered=2").resolve(4).keep_gathered == 2
