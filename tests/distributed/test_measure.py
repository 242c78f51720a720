"""Calibration on several ranks: everyone's window ends with the slowest, and what is found describes a device."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.planner.measure import BETWEEN, COLLECTIVES, Windows, device_of, measure_rank

SLOW = 0.02


def both() -> tuple[float, dict[str, Any]]:
    """Seconds of work that is long on the second rank only; and everything that calibration measures."""
    seconds = SLOW if dist.get_rank() else 0.0
    return Windows(2, time.perf_counter)(lambda: time.sleep(seconds)), measure_rank(1)


def test_a_window_lasts_until_the_slowest_rank_is_done_and_all_is_measured() -> None:
    answers = run_ranks(both, 2, timeout=200.0)
    assert min(seconds for seconds, _ in answers) >= SLOW  # the quick rank repeated its work as often, and waited
    found = [measured for _, measured in answers]
    assert all(set(measured[name]) == set(COLLECTIVES) for measured in found for name in BETWEEN)
    device = device_of("cpu", found, 8.0, 2)
    link = device.intra
    assert min(device.peak("fp32"), device.memory_gb_s, link.gb_s, link.latency_us, link.tree_us) > 0
    assert 0 < device.constants["stream"] <= 1
    assert min(device.constants[name] for name in ("best", "update", "host_us", "copy_ns")) > 0
