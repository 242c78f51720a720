"""Any model in any layout against one process: loss, every gradient, the norm, and five optimizer steps.

The comparison is `fms_parallel.auto.table`'s; the slow test makes all of it and writes the table of docs/any_model.md.
On four ranks the others take two steps: after one, all gradients are compared, and after two the first update.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.auto.families import FAMILIES
from fms_parallel.auto.table import BEGIN, END, LAYOUTS, STEPS, as_markdown, compare, run_table, write_into
from tests.distributed.comparison import Together, ranks_of
from tests.poison import poisoned_memory

pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "any_model.md"

SPLIT = "pp=2,schedule=zbv,microbatches=4"
TWO = {name: ("pp=2", "pp=2,schedule=interleaved1f1b", "dp=2", "fsdp=2", "tp=2") for name in FAMILIES}
TWO |= {name: (*TWO[name], SPLIT) for name in ("gpt2", "vit")}
FOUR = {
    "gpt2": (
        *("pp=2,fsdp=2", "pp=4", "pp=2,tp=2", "fsdp=2,tp=2", "pp=2,fsdp=2,schedule=zbv,microbatches=4"),
        "pp=2,dp=2,schedule=dualpipev,microbatches=4",
    ),
    "whisper": ("pp=2,fsdp=2", "pp=4", "fsdp=2,tp=2"),
    "qwen2": ("pp=2,fsdp=2", "pp=2,tp=2"),
    "vit": ("pp=2,fsdp=2", "pp=2,fsdp=2,schedule=interleaved_zero_bubble,microbatches=4"),
    "t5": ("pp=2,fsdp=2", "pp=2,tp=2"),
    "mixtral": ("pp=2,fsdp=2",),
    "opt": ("pp=2,tp=2",),
}
"""Architecture -> layouts."""

Case = tuple[str, tuple[str, ...], int]
CASES: list[Case] = [(name, layouts, STEPS) for name, layouts in TWO.items()]
CASES += [(name, layouts, 2) for name, layouts in FOUR.items()]


def compare_poisoned(name: str, layouts: tuple[str, ...], steps: int) -> Any:
    with poisoned_memory():
        return compare([name], layouts, steps)


COMPARED = Together(compare_poisoned, CASES, lambda name, layouts, steps: ranks_of(layouts[0]))


def tolerance(name: str) -> float:
    """fp64's, unless the model casts to fp32 inside."""
    return 1e-12 if FAMILIES[name].exact else 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{ranks_of(case[1][0])}")
def test_every_layout_equals_one_process(case: Case) -> None:
    for answer in COMPARED(*case):
        assert len(answer) == len(case[1])
        for (name, layout), result in answer.items():
            assert not result.refused, (layout, result.refused)
            assert result.worst <= tolerance(name), (layout, result)


@pytest.mark.slow
def test_the_whole_table_is_exact_and_written_into_the_page() -> None:
    found = run_table()
    assert len(found) == len(FAMILIES) * len(LAYOUTS)
    assert {key: result for key, result in found.items() if not result.worst <= tolerance(key[0])} == {}
    assert not any(result.refused for result in found.values())
    write_into(PAGE, as_markdown(found))


def test_the_page_has_the_whole_table_and_nothing_in_it_is_wrong() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()
    head, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table)
    assert head == ["architecture", *LAYOUTS] and [row[0] for row in rows] == list(FAMILIES)
    for name, *cells in rows:
        assert len(cells) == len(LAYOUTS)
        assert all(re.fullmatch(r"\d+e-\d\d", cell) and float(cell) <= tolerance(name) for cell in cells), name
