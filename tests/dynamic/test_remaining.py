"""Layouts for other numbers of ranks: nearest to what was asked for, and only such that batch and model allow."""

from __future__ import annotations

import pytest

from fms_parallel.dynamic.remaining import remaining_layout
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config

SHAPE = get_config("llama", "micro", width=24, layers=4, heads=4, kv_heads=2, ffn_width=38).shape()


@pytest.mark.parametrize(
    ("asked", "world", "batch", "expected"),
    [
        ("dp=2,fsdp=2", 4, 12, "dp=2,fsdp=2"),
        ("dp=2,fsdp=2", 3, 12, "fsdp=3"),
        ("dp=2,fsdp=2", 2, 12, "fsdp=2"),
        ("dp=2,fsdp=2", 6, 12, "dp=3,fsdp=2"),
        ("fsdp=2,tp=2,sp", 6, 12, "fsdp=3,tp=2,sp"),
        ("fsdp=2,tp=2,sp", 3, 12, "fsdp=3"),
        ("pp=2,fsdp=2,schedule=gpipe", 3, 12, "fsdp=3"),
        ("pp=2,fsdp=2,schedule=gpipe", 2, 12, "pp=2,schedule=gpipe"),
        ("pp=2,tp=2,stage_split=3,1", 1, 12, ""),
        ("dp=2,fsdp=2", 3, 8, "pp=3"),
        ("fsdp", 3, 12, "fsdp=3"),
        ("cp=2,fsdp=2,cp_method=ulysses", 3, 12, "fsdp=3"),
        ("fsdp=4,precision=fp64,recompute=full", 2, 12, "fsdp=2,recompute=full,precision=fp64"),
    ],
)
def test_nearest_layout_that_fits(asked: str, world: int, batch: int, expected: str) -> None:
    found = remaining_layout(ParallelLayout.parse(asked), world, batch, shape=SHAPE)
    assert found.world_size == world
    assert found == ParallelLayout.parse(expected)


def test_no_layout_is_said_with_the_numbers() -> None:
    with pytest.raises(LayoutError, match=r"no layout of 5 ranks fits batch size 8 .*fsdp=5.* do not divide 8 rows"):
        remaining_layout(ParallelLayout.parse("fsdp=4"), 5, 8, shape=SHAPE)
