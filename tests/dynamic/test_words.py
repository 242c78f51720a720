"""Schedules of layouts as a person types them."""

from __future__ import annotations

import pytest

from fms_parallel.dynamic.words import parse_phases, parse_schedule
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.phases import Phase


def test_layouts_keep_their_own_commas() -> None:
    text = "10:tp=2,sp, 20:pp=2,stage_split=3,1,30:fsdp=2"
    assert parse_schedule(text) == {10: "tp=2,sp", 20: "pp=2,stage_split=3,1", 30: "fsdp=2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2", "write STEP:LAYOUT"),
        ("10:tp=2,10:fsdp=2", "step 10 is given twice"),
        ("10:warp=2", "unknown layout word 'warp'"),
        ("x:tp=2", "write STEP:LAYOUT"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        parse_schedule(text)


def test_sizes_belong_to_the_step_before_them() -> None:
    assert parse_phases("1000:seq_len=512, 3000:seq_len=64,batch_size=128") == [
        Phase(1000, seq_len=512),
        Phase(3000, 64, 128),
    ]
    with pytest.raises(ConfigError, match="step 3 has seq_len twice"):
        parse_phases("3:seq_len=8,seq_len=9")
