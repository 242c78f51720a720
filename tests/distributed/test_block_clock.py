"""Which rank of a tp group is slow, although all of them take equally long for every block."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.straggler import Work, working
from fms_parallel.dynamic.monitor import Monitor, Window
from fms_parallel.dynamic.stragglers import Stragglers
from fms_parallel.models import get_model
from fms_parallel.modules.tp import TPModule
from tests.distributed.comparison import Together

SMALL = {"width": 16, "layers": 3, "heads": 4, "ffn_width": 24, "vocab_size": 64}
WORK, NOISE, SLOW = 0.008, 0.1, 3.0
"""Seconds that a block sleeps each way, and their scatter; what the slow rank takes times as long."""


def heard(layout: str, slow_rank: int | None) -> tuple[list[Window], list[str], bool]:
    """Windows of two steps on one rank, what is said of them, and whether the model is as it was afterwards."""
    model = get_model("llama", "micro", distributed_strategy=layout, **SMALL)
    work = Work(WORK, NOISE)
    work.factor = SLOW if dist.get_rank() == slow_rank else 1.0
    axes = [module.axis for module in working(model, work).modules() if isinstance(module, TPModule)]
    monitor, stragglers = Monitor(every=2), Stragglers(dist.get_world_size())
    monitor.watch(model)
    windows, told = [], []
    ids = torch.arange(26).view(2, 13)
    for step in range(1, 9):
        model(ids, labels=ids).backward()
        if monitor.step_done() and step > 2:
            windows.append(monitor.gather(step))
            told.append(stragglers.hear([rank.block for rank in windows[-1].ranks]))
    monitor.detach()
    after = [module.axis for module in model.modules() if isinstance(module, TPModule)]
    return windows, told, all(a is b for a, b in zip(axes, after, strict=True))


CASES = [("tp=2", 1), ("tp=2,sp", 0), ("tp=2,sp,tp_parts=attention", 1), ("tp=2,sp", None)]
HEARD = Together(heard, CASES, lambda layout, slow_rank: 2)


@pytest.mark.parametrize(("layout", "slow_rank"), CASES[:3])
def test_the_rank_that_waits_least_is_the_slow_one(layout: str, slow_rank: int) -> None:
    for windows, told, restored in HEARD(layout, slow_rank):
        assert restored
        assert told[0] == "" and told[1].startswith(f"rank {slow_rank} takes ") and told[2:] == [""] * (len(told) - 2)
        for window in windows:
            fast, slow = window.ranks[1 - slow_rank], window.ranks[slow_rank]
            assert slow.block > 1.7 * fast.block and slow.block >= SLOW * WORK
            assert slow.busy == pytest.approx(fast.busy, rel=0.3)  # by the wall they are alike


def test_of_ranks_that_are_alike_nothing_is_said() -> None:
    for _, told, _ in HEARD(*CASES[3]):
        assert told == [""] * len(told)
