"""Which blocks a policy wraps, and a budget that nobody would keep."""

from __future__ import annotations

import pytest
import torch

from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.strategy.base import repeated_blocks
from tests.training.runs import tiny


@pytest.mark.parametrize(
    ("policy", "again"), [("none", 0), ("full", 4), ("selective", 4), ("every=1", 4), ("every=2", 2), ("every=3", 2)]
)
def test_the_blocks_that_a_policy_names_run_again(policy: str, again: int) -> None:
    model = tiny(ParallelLayout(recompute=policy), layers=4)  # type: ignore[arg-type]
    calls = []
    for _, block in repeated_blocks(model):
        block.attention_norm.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, operator]
    ids = torch.arange(6).view(1, 6)
    model(ids, labels=ids).backward()
    assert len(calls) == 4 + again


def test_a_budget_without_compile_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"recompute=budget=0.5: the compiler keeps the budget; add --compile"):
        tiny(ParallelLayout(recompute="budget=0.5"))  # type: ignore[arg-type]


def test_a_budget_compiles_every_block() -> None:
    model = tiny(ParallelLayout(recompute="budget=0.5"), compile_blocks=True)  # type: ignore[arg-type]
    assert all(block._compiled_call_impl is not None for _, block in repeated_blocks(model))
