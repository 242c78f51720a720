"""Compiled blocks over ranks: as exact as eager ones, in one graph each."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.verify import TOLERANCE, Report, verify
from tests.distributed.test_layouts import TINY

pytestmark = pytest.mark.slow


def compiled_llama(distributed_strategy: ParallelLayout, **arguments: Any) -> nn.Module:
    """Compiled where it is spread; the reference stays eager."""
    spread = set(distributed_strategy.degrees) != {1}
    return get_model("llama", "micro", distributed_strategy=distributed_strategy, compile_blocks=spread, **arguments)


def compare(layout: str) -> tuple[Report, dict[str, int], int]:
    from torch._dynamo.utils import counters

    report = verify(compiled_llama, ParallelLayout.parse(layout), seq_len=16, **TINY)
    return report, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "layout",
    [
        "tp=2",
        "tp=2,sp",
        "fsdp=2",
        "fsdp=2,recompute=full",
        "fsdp=2,recompute=budget=0.2",
        # Process groups are inputs of these graphs, which budgets once refused.
        "tp=2,sp,recompute=budget=0.2",
    ],
)
def test_compiled_matches_eager_in_one_process(layout: str) -> None:
    for report, breaks, graphs in run_ranks(compare, 2, layout, timeout=400.0):
        assert report.worst <= TOLERANCE["fp32"], report
        assert (breaks, graphs) == ({}, 1)
