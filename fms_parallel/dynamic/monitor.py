"""What a running job does with its time and memory: measured on every rank, gathered every few steps.

One gather of a dozen numbers per window is all that it costs the job. It knows steps, clocks and ranks; it knows no
layouts to change to.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.checkpoint.agree import rank_and_world
from fms_parallel.dynamic.blocks import BlockClock
from fms_parallel.dynamic.memory import free_bytes
from fms_parallel.strategy.base import compute_device, parallel_of
from fms_parallel.training.metrics import peak_memory_bytes

STATM = Path("/proc/self/statm")

WARM = 2
"""Steps after a change that are not counted: allocations, shapes of a pipeline's messages, compilation."""


@dataclass(frozen=True)
class RankWindow:
    """One rank over a window of steps.

    Attributes:
        seconds: of a step, median. scatter: standard error of that, relative. steps: that were counted.
        block: seconds of one block's forward and backward, in the step where that was least. busy: part of the time
            inside blocks.
        communication: part of one step in which messages were on their way, measured once per layout; NaN before.
        loader: part of the time spent waiting for rows. memory: bytes in use. room: bytes that are left.
        bad: 1 when the metrics of a step were missing or not finite. asked: 1 when a layout was asked for.
    """

    seconds: float
    scatter: float
    steps: float
    block: float
    busy: float
    communication: float
    loader: float
    memory: float
    room: float
    bad: float
    asked: float


@dataclass(frozen=True)
class Window:
    """What all ranks measured, the same on every rank; one entry per rank where it is a tuple.

    Attributes:
        step: the last one of the window. seconds: of a step on the slowest rank. scatter: relative error of that.
        slowness: seconds of a block over those of the fastest rank; 1.0 where blocks are not timed.
        stages: seconds of a block by pipeline stage. imbalance: largest over mean slowness. bubble: part of the time
            that a pipeline's ranks are not inside a block. memory: largest part of a rank's memory that was in use.
        measured: False when a step of it had no metrics that count, or none was left after warming up.
    """

    step: int
    layout: str
    seconds: float
    scatter: float
    steps: int
    ranks: tuple[RankWindow, ...]
    slowness: tuple[float, ...]
    stages: tuple[float, ...]
    imbalance: float
    bubble: float
    communication: float
    loader: float
    memory: float
    measured: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not known is None."""
        return dict(_plain(asdict(self)))


class Monitor:
    """Measures the steps of one model. `watch` it again after every change of layout.

    Args:
        every: steps of a window. profile: measure communication in one step per layout, with torch's profiler.
        now: the clock, seconds.
    """

    def __init__(self, every: int = 3, profile: bool = False, now: Callable[[], float] = time.perf_counter) -> None:
        self.every, self.profile, self._now = every, profile, now
        self._clock: BlockClock | None = None
        self._loader = 0.0
        self._lasted: float | None = None
        self._profiler: Any = None

    def watch(self, model: nn.Module) -> None:
        """Measure this model from its next step on."""
        self.detach()
        parallel = parallel_of(model)
        self.layout, self.pp = str(parallel.layout), parallel.layout.pp
        self.device = compute_device(next(model.parameters()))
        self._clock = BlockClock(model, self.device, self._now)
        self._seconds: list[float] = []
        self._loads: list[float] = []
        self._blocks: list[tuple[float, float]] = []
        self._count, self._bad, self._asked = 0, False, False
        self._talk = math.nan
        self._mark = self._now()

    def detach(self) -> None:
        """Stop measuring."""
        if self._clock is not None:
            self._clock.detach()
        self._stop_profiling()
        self._clock = None

    def waited(self, seconds: float) -> None:
        """This rank waited for rows; part of the step that they are for."""
        self._loader += seconds

    def lasted(self, seconds: float) -> None:
        """The step took so long, whatever came after it: a checkpoint is no part of a step."""
        self._lasted = seconds

    def restart(self) -> None:
        """A step begins now: what came since the last one belongs to none."""
        self._mark = self._now()

    def step_done(self, bad: bool = False, asked: bool = False) -> bool:
        """A step has ended; whether a window has. Warming steps are not counted."""
        now = self._now()
        self._count += 1
        profiled = self._stop_profiling()
        assert self._clock is not None
        block, busy = self._clock.take()
        if self._count > WARM and not profiled:
            self._seconds.append(now - self._mark if self._lasted is None else self._lasted)
            self._loads.append(self._loader)
            self._blocks.append((block, busy))
        self._bad, self._asked = self._bad or bad, asked
        self._loader, self._lasted = 0.0, None
        if self.profile and self._count == WARM:
            self._profiler = torch.profiler.profile(activities=_activities(self.device))
            self._profiler.start()
        self._mark = self._now()
        return self._count % self.every == 0

    def gather(self, step: int) -> Window:
        """The window that has ended. Collective; the same value on every rank."""
        mine = self._window()
        self._seconds, self._loads, self._blocks, self._bad = [], [], [], False
        ranks = [RankWindow(*numbers) for numbers in _from_all([getattr(mine, f.name) for f in fields(mine)], self)]
        self._mark = self._now()
        return summarised(step, self.layout, self.pp, ranks)

    def _window(self) -> RankWindow:
        seconds, room = self._seconds, float(free_bytes(self.device))
        middle = median(seconds) if seconds else math.nan
        spread = median(abs(s / middle - 1) for s in seconds) * 1.48 if seconds else math.nan
        return RankWindow(
            seconds=middle,
            # Of a median: a quarter more than of a mean. A few steps tell little about their own scatter.
            scatter=1.25 * max(spread, 0.02) / math.sqrt(len(seconds)) if seconds else math.nan,
            steps=len(seconds),
            # The least of the steps: chance makes one step slow, a slow rank makes all of them.
            block=min((block for block, _ in self._blocks), default=0.0),
            busy=sum(busy for _, busy in self._blocks) / sum(seconds) if seconds else math.nan,
            communication=self._talk,
            loader=sum(self._loads) / sum(seconds) if seconds else math.nan,
            memory=float(used_bytes(self.device)),
            room=room,
            bad=float(self._bad),
            asked=float(self._asked),
        )

    def _stop_profiling(self) -> bool:
        """End the profiled step, if there is one, and note its communication."""
        if self._profiler is None:
            return False
        spent = max(self._now() - self._mark, 1e-9)
        self._profiler.stop()
        messages = [(e.time_range.start, e.time_range.end) for e in self._profiler.events() if _is_message(e.name)]
        self._talk, self._profiler = min(_covered(messages) / 1e6 / spent, 1.0), None
        return True


def used_bytes(device: torch.device) -> int:
    """Bytes that this rank holds: the most since the last look on its GPU, or resident on the host now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(peak)
    if not STATM.exists():
        return peak_memory_bytes(device)
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def summarised(step: int, layout: str, pp: int, ranks: list[RankWindow]) -> Window:
    """What the numbers of all ranks say together. Pure."""
    fastest = min((r.block for r in ranks if r.block > 0), default=0.0)
    slowness = tuple(r.block / fastest if fastest and r.block > 0 else 1.0 for r in ranks)
    per_stage = len(ranks) // pp
    stages = tuple(max(r.block for r in ranks[i : i + per_stage]) for i in range(0, len(ranks), per_stage))
    slowest = max(ranks, key=lambda r: r.seconds)
    known = [r.communication for r in ranks if not math.isnan(r.communication)]
    return Window(
        step=step,
        layout=layout,
        seconds=slowest.seconds,
        scatter=slowest.scatter,
        steps=int(min(r.steps for r in ranks)),
        ranks=tuple(ranks),
        slowness=slowness,
        stages=stages,
        imbalance=max(slowness) / fmean(slowness),
        bubble=max(1 - fmean(r.busy for r in ranks), 0.0) if pp > 1 else 0.0,
        communication=max(known, default=math.nan),
        loader=max(r.loader for r in ranks),
        memory=max(r.memory / max(r.memory + r.room, 1.0) for r in ranks),
        measured=all(r.steps > 0 and not r.bad for r in ranks),
    )


def finite_metrics(metrics: Any) -> str:
    """Why the metrics of a step do not count, or nothing."""
    if not isinstance(metrics, Mapping):
        return f"step() was given {type(metrics).__name__} instead of a mapping of metrics with a 'loss'"
    if "loss" not in metrics:
        return f"the metrics {sorted(map(str, metrics))} have no 'loss'"
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and not math.isfinite(value):
            return f"the metric {name!r} is {value}"
    return ""


# ---- parts ------------------------------------------------------------------------------------------------------


def _from_all(numbers: list[float], monitor: Monitor) -> list[list[float]]:
    """Every rank's numbers, in rank order: one collective of a few bytes."""
    _, world = rank_and_world()
    if world == 1:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.float64, device=monitor.device)
    every = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every, mine)
    return [list(map(float, one)) for one in torch.stack(every).cpu()]


def _activities(device: torch.device) -> list[Any]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]


def _is_message(name: str) -> bool:
    return name.startswith("gloo:") or "ncclDevKernel" in name or name.startswith("ncclKernel")


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def _plain(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
