"""Which rank of a tp group is slow, although all of them take equally long for every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.straggler import Work, working
from fms_parallel.distributed.collectives import Means
from fms_parallel.dynamic.monitor import Monitor, Window
from fms_parallel.dynamic.stragglers import Stragglers
from fms_parallel.models import get_model
from fms_parallel.modules.tp import TPModule
from tests.distributed.comparison import Together

SMALL = {"width": 16, "layers": 3, "heads": 4, "ffn_width": 24, "vocab_size": 64}
WORK, NOISE, SLOW = 0.008, 0.1, 3.0
"""Seconds of a block each way, and their scatter; what the slow rank takes times as long."""


class OwnTime:
    """A clock of this rank that only work moves, and where ranks meet the latest counts: whatever else the machine
    does, a run takes the same time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def spend(self, seconds: float) -> None:
        self.seconds += seconds

    def met(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The collective, whose last argument is its group; it ends when the last rank has come."""

        def meet(*given: Any) -> Any:
            result = call(*given)
            self._wait(given[-1])
            return result

        return meet

    def met_later(self, start: Callable[..., Any]) -> Callable[..., Any]:
        """The same where a collective is begun, and waited for later."""

        def begin(*given: Any) -> Any:
            arrived = start(*given)

            def wait() -> Any:
                arrived()
                self._wait(given[-1])

            return wait

        return begin

    def _wait(self, group: dist.ProcessGroup) -> None:
        latest = torch.tensor([self.seconds], dtype=torch.float64)
        dist.all_reduce(latest, dist.ReduceOp.MAX, group)
        self.seconds = latest.item()

    def means(self, real: Means) -> Means:
        """Collectives that take as long as their last rank."""
        assert real.summed is not None
        later = self.met_later(real.start_all_gather)
        return Means(
            *(self.met(call) for call in real[:2]), later, self.met(real.reduce_scatter), self.met(real.summed)
        )


def heard(layout: str, slow_rank: int | None) -> tuple[list[Window], list[str], bool]:
    """Windows of two steps on one rank, what is said of them, and whether the model is as it was afterwards."""
    model = get_model("llama", "micro", distributed_strategy=layout, **SMALL)
    time = OwnTime()
    work = Work(WORK, NOISE, spend=time.spend)
    work.factor = SLOW if dist.get_rank() == slow_rank else 1.0
    sharded = [module for module in working(model, work).modules() if isinstance(module, TPModule)]
    for module in sharded:
        module.axis = replace(module.axis, own_means=time.means(module.axis.means))
    axes = [module.axis for module in sharded]
    monitor, stragglers = Monitor(every=2, now=time.now), Stragglers(dist.get_world_size())
    monitor.watch(model)
    windows, told = [], []
    ids = torch.arange(26).view(2, 13)
    for step in range(1, 9):
        model(ids, labels=ids).backward()
        if monitor.step_done() and step > 2:
            windows.append(monitor.gather(step))
            told.append(stragglers.hear([rank.block for rank in windows[-1].ranks]))
    monitor.detach()
    return windows, told, all(a is module.axis for a, module in zip(axes, sharded, strict=True))


CASES = [("tp=2", 1), ("tp=2,sp", 0), ("tp=2,sp,tp_parts=attention", 1), ("tp=2,sp", None)]
HEARD = Together(heard, CASES, lambda layout, slow_rank: 2)


@pytest.mark.parametrize(("layout", "slow_rank"), CASES[:3])
def test_the_rank_that_waits_least_is_the_slow_one(layout: str, slow_rank: int) -> None:
    for windows, told, restored in HEARD(layout, slow_rank):
        assert restored
        assert told[0] == "" and told[1].startswith(f"rank {slow_rank} takes ") and told[2:] == [""] * (len(told) - 2)
        for window in windows:
            fast, slow = window.ranks[1 - slow_rank], window.ranks[slow_rank]
            assert slow.block == pytest.approx(SLOW * fast.block, rel=3 * NOISE)
            assert fast.block == pytest.approx(2 * WORK, rel=2 * NOISE)  # forward and backward
            assert slow.busy == pytest.approx(fast.busy, rel=0.2)  # by the wall they are alike


def test_of_ranks_that_are_alike_nothing_is_said() -> None:
    for _, told, _ in HEARD(*CASES[3]):
        assert told == [""] * len(told)
