"""How a model is cut: the even split against brute force, and what each stage keeps."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config
from fms_parallel.models.llama import LLaMA
from fms_parallel.schedules import SCHEDULES
from fms_parallel.strategy.stages import cut, even_split, refuse_unless_stageable, split_blocks


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=8), st.integers(1, 4), st.floats(0, 20))
def test_even_split_is_the_best_of_all(costs: list[float], parts: int, tail: float) -> None:
    if parts > len(costs):
        return
    sizes = even_split(costs, parts, tail)
    assert sum(sizes) == len(costs) and min(sizes) >= 1

    def worst(edges: tuple[int, ...]) -> float:
        ends = (0, *edges, len(costs))
        sums = [sum(costs[a:b]) for a, b in pairwise(ends)]
        return max(*sums[:-1], sums[-1] + tail) if len(sums) > 1 else sums[0] + tail

    best = min(worst(edges) for edges in combinations(range(1, len(costs)), parts - 1))
    edges = tuple(sum(sizes[: index + 1]) for index in range(parts - 1))
    assert worst(edges) == pytest.approx(best)


def small(layers: int = 6, **config: object) -> LLaMA:
    with torch.device("meta"):
        return LLaMA(get_config("llama", "micro", layers=layers, **config))


def test_the_head_counts_as_work() -> None:
    layout = ParallelLayout.parse("pp=2")
    assert split_blocks(small(vocab_size=256), layout) == (3, 3)
    first, last = split_blocks(small(vocab_size=8192), layout)
    assert first > last


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_parameter_is_kept_once_under_its_own_name(schedule: str, tied: bool) -> None:
    layout = ParallelLayout.parse(f"pp=2,schedule={schedule}")
    whole = {name for name, _ in small(tied=tied).named_parameters()}
    kept: list[set[str]] = []
    for rank in range(2):
        model = small(tied=tied)
        cut(model, layout, SCHEDULES[schedule].stages_of(rank, 2, layout.stages))
        kept.append({name for name, _ in model.named_parameters()})
    assert kept[0] | kept[1] == whole
    on_both = {"embedding.weight"} if tied and SCHEDULES[schedule].shape != "v" else set()
    assert kept[0] & kept[1] == on_both


def test_a_model_that_cannot_be_cut_is_told_what_it_lacks() -> None:
    with pytest.raises(LayoutError, match=r"Sequential cannot be cut .* no activation_width, sequences"):
        refuse_unless_stageable(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("pp=2,schedule=1f1b,virtual_stages=2", "exactly 1 stages per rank, not 2"),
        ("pp=2,schedule=zbv,virtual_stages=3", "exactly 2 stages per rank, not 3"),
        ("pp=3,microbatches=2", "2 micro-batches cannot fill 3 stages: use microbatches=3"),
        ("pp=2,schedule=interleaved1f1b,microbatches=5", "5 micro-batches do not divide into 2 rounds"),
        ("pp=4,schedule=zbv", "8 pipeline stages"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(layout: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        ParallelLayout.parse(layout).validate(get_config("llama", "micro", layers=6).shape())
