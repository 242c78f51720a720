"""Layouts, models and batches that nobody chose: each is exact, or refused with a sentence on every rank alike.

    pytest tests/distributed/test_drawn_layouts.py --drawn 200        as many as you have time for (default: 24)

Hypothesis draws them. A job takes many, one after another, each with process groups of its own, which must be gone
afterwards: no descriptor and no thread is left.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.start import leave
from fms_parallel.errors import FmsError, LayoutError
from fms_parallel.fit import check_fit
from fms_parallel.layout import CP_METHODS, TP_PARTS, ParallelLayout
from fms_parallel.models.llama import LLaMAConfig
from fms_parallel.schedules import SCHEDULES
from fms_parallel.verify import TOLERANCE, verify
from tests.distributed.comparison import shaken_model
from tests.poison import poisoned_memory

JOB = 4
"""Cases of one job: starting ranks costs as much as two of them."""

DRAWN = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[
        Phase.generate
    ],  # a job is a list of independent cases: the failing one is named, there is nothing to shrink
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Case:
    """A model, a layout and a batch."""

    layout: ParallelLayout
    model: dict[str, Any]
    rows: int
    length: int
    pieces: int

    def __str__(self) -> str:
        return f"{self.layout} of {self.model}, {self.rows} rows of {self.length} in {self.pieces}"


def powers(world: int) -> st.SearchStrategy[dict[str, int]]:
    """Degrees of the five axes whose product is `world`, a power of two."""
    axes = st.sampled_from(("pp", "dp", "fsdp", "cp", "tp"))

    def degrees(chosen: list[str]) -> dict[str, int]:
        return {axis: 2 ** chosen.count(axis) for axis in chosen}

    twos = world.bit_length() - 1
    return st.lists(axes, min_size=twos, max_size=twos).map(degrees)


@st.composite
def layouts(draw: st.DrawFn, world: int) -> ParallelLayout:
    degrees = draw(powers(world))
    words: dict[str, Any] = {"recompute": draw(st.sampled_from(("none", "full", "selective", "every=2")))}
    if "tp" in degrees:
        words["sp"] = draw(st.booleans())
        words["loss_parallel"] = draw(st.sampled_from((True, True, False)))
        words["tp_parts"] = draw(st.sampled_from(TP_PARTS)) if words["sp"] else "all"
    if "cp" in degrees:
        words["cp_method"] = draw(st.sampled_from(CP_METHODS))
    if "pp" in degrees:
        words["schedule"] = draw(st.sampled_from(sorted(SCHEDULES)))
        words["microbatches"] = degrees["pp"] * draw(st.integers(1, 3))
    return ParallelLayout(**degrees, **words)


MODELS = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(40, 100),
        "width": st.sampled_from((24, 32)),
        "layers": st.integers(2, 9),
        "heads": st.just(4),
        "kv_heads": st.sampled_from((1, 2, 4)),
        "ffn_width": st.integers(20, 70),
        "max_positions": st.just(64),
        "tied": st.booleans(),
        "fused": st.booleans(),
        "qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "ffn_bias": st.booleans(),
        "dropout": st.sampled_from((0.0, 0.0, 0.2)),
    }
)


@st.composite
def cases(draw: st.DrawFn, world: int) -> Case:
    layout, pieces = draw(layouts(world)), draw(st.integers(1, 2))
    rows = layout.data_parallel * pieces * draw(st.integers(1, 3))
    return Case(layout, draw(MODELS), rows, draw(st.integers(3, 19)), pieces)


# ---- on the ranks -----------------------------------------------------------------------------------------------


def outcome(case: Case) -> float | str:
    """The worst error, or the sentence it is refused with."""
    try:
        with poisoned_memory():
            numbers = {"batch_size": case.rows, "seq_len": case.length, "grad_accum_steps": case.pieces}
            return verify(llama, case.layout, dtype="fp64", **numbers, **case.model).worst
    except FmsError as error:
        return f"{type(error).__name__}: {error}"


def llama(**arguments: Any) -> Any:
    return shaken_model("llama", **arguments)


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def work_off(todo: list[Case], port: int) -> tuple[list[float | str], list[tuple[int, int]]]:
    """Every case in process groups of its own: what came out, and what this process held after each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    found: list[float | str] = []
    holds: list[tuple[int, int]] = []
    for number, case in enumerate(todo):
        leave()
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=world)
        found.append(outcome(case))
        leave()
        holds.append(held())
    dist.init_process_group("gloo", store=dist.PrefixStore("end", store), rank=rank, world_size=world)
    return found, holds


# ---- the test ---------------------------------------------------------------------------------------------------


def check(todo: list[Case], world: int) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = run_ranks(work_off, world, todo, store.port, timeout=60.0 * len(todo))
    wrong: list[str] = []
    for case, *outcomes in zip(todo, *(found for found, _ in answers), strict=True):
        refused = [isinstance(found, str) for found in outcomes]
        if any(refused):
            if not (all(refused) and all(found.startswith(REFUSALS) for found in outcomes)):
                wrong.append(f"{case}: {outcomes}")
        elif not all(found <= TOLERANCE["fp64"] for found in outcomes):
            wrong.append(f"{case}: {outcomes}")
    assert not wrong, "\n".join(wrong)
    for _, holds in answers:
        grown = [f"{now} after {case}" for case, now in zip(todo, holds, strict=True)]
        assert holds[-1] <= max(holds[:3]), "descriptors and threads grow:\n" + "\n".join(grown)


REFUSALS = (LayoutError.__name__,)


def sensible(case: Case) -> bool:
    """Whether the model says before anything starts that the layout can be."""
    try:
        check_fit(case.layout, LLaMAConfig(**case.model).shape())
    except FmsError:
        return False
    return True


@pytest.mark.parametrize("world", [2, 4, 8])
def test_drawn_layouts_match_one_process(world: int, request: pytest.FixtureRequest) -> None:
    jobs = -(-request.config.getoption("--drawn") // (3 * JOB))

    @settings(DRAWN, max_examples=jobs + 1)  # the first is always the plainest there is
    @given(st.lists(cases(world).filter(sensible), min_size=JOB, max_size=JOB, unique_by=str))
    def run(todo: list[Case]) -> None:
        check(todo, world)

    run()


# ---- what draws have found --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 42, "width": 24, "layers": 2, "heads": 4, "kv_heads": 4, "ffn_width": 52, "max_positions": 64}
FOUND = [
    # The sum over ranks was made in the result of a matrix product that selective recomputation keeps: summed twice.
    Case(ParallelLayout.parse("tp=2,recompute=selective"), {**SMALL, "fused": True, "ffn_bias": True}, 2, 11, 1),
]


def test_what_was_found_once_is_exact() -> None:
    check(FOUND, 2)
