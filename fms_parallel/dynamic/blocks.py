"""`BlockClock`: how long this rank works on a block, forward and backward: the same work on every rank of a job.

So ranks can be compared in any layout, whatever else they wait for: within a block the ranks of tp wait for each other,
the slow one least, and the time in their collectives is no work. It knows modules and clocks; it knows no layouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fms_parallel.distributed.collectives import Axis, Means
from fms_parallel.modules.tp import TPModule
from fms_parallel.strategy.base import repeated_blocks


class Mark(NamedTuple):
    """A moment, a number of seconds or a CUDA event; and how many waits within tp there had been."""

    moment: Any
    waits: int


class BlockClock:
    """Times every pass through the repeated blocks of a model, until it is detached.

    Blocks that torch.compile has are left alone: a clock inside would cut their graphs.

    Args:
        now: the clock on a CPU, seconds. On a GPU its events are asked.
    """

    def __init__(self, model: nn.Module, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu, self._seconds = device.type == "cuda", now
        self._passes: dict[str, list[tuple[Mark, Mark]]] = {"forward": [], "backward": []}
        self._waits: list[tuple[Mark, Mark]] = []
        self._axes: list[tuple[TPModule, Axis]] = []
        self._handles: list[Any] = []
        for _, block in repeated_blocks(model):
            if getattr(block, "_compiled_call_impl", None) is None:
                self._watch(block)

    def _watch(self, block: nn.Module) -> None:
        for module in block.modules():
            if isinstance(module, TPModule) and module.axis.size > 1:
                self._axes.append((module, module.axis))
                module.axis = replace(module.axis, own_means=self._watched(module.axis.means))
        self._hook(block)

    def _watched(self, means: Means) -> Means:
        """The same collectives; how long each is waited for is noted."""

        def noted(call: Callable[..., Any]) -> Callable[..., Any]:
            def waited(*given: Any) -> Any:
                began = self._now()
                result = call(*given)
                self._waits.append((began, self._now()))
                return result

            return waited

        return means._replace(
            all_reduce=noted(means.all_reduce),
            all_gather=noted(means.all_gather),
            start_all_gather=lambda *given: noted(means.start_all_gather(*given)),
            reduce_scatter=noted(means.reduce_scatter),
            summed=None if means.summed is None else noted(means.summed),
        )

    def _hook(self, block: nn.Module) -> None:
        entered: list[Mark] = []

        def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            entered.append(self._now())
            tensor = _first(given) if torch.is_grad_enabled() else None
            if tensor is not None:
                end = self._end_of_backward()
                tensor.register_hook(lambda gradient: end(None))
                pending.append(end)

        def after(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            if entered:
                self._passes["forward"].append((entered.pop(), self._now()))
            tensor = _first(made if isinstance(made, tuple) else (made,))
            if pending and tensor is not None:
                end = pending.pop()
                tensor.register_hook(lambda gradient: end(self._now()))

        pending: list[Callable[[Mark | None], None]] = []
        self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(block.register_forward_hook(after, with_kwargs=True))

    def _end_of_backward(self) -> Callable[[Mark | None], None]:
        """Called with the moment when a backward pass begins, then with None when it has ended."""
        began: list[Mark] = []

        def note(mark: Mark | None) -> None:
            if mark is not None:
                began.append(mark)
            elif began:
                self._passes["backward"].append((began.pop(), self._now()))

        return note

    def _now(self) -> Mark:
        if not self._on_gpu:
            return Mark(self._seconds(), len(self._waits))
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Mark(event, len(self._waits))

    def take(self) -> tuple[float, float]:
        """Seconds of work of one pass through one block, forward and backward (medians), and of all passes with their
        waits; then it begins anew."""
        if self._on_gpu:
            torch.cuda.synchronize()
        worked = {way: [self._worked(*marks) for marks in passes] for way, passes in self._passes.items()}
        inside = sum(self._between(*marks) for passes in self._passes.values() for marks in passes)
        for noted in (*self._passes.values(), self._waits):
            noted.clear()
        return sum(median(found) for found in worked.values() if found), inside

    def _worked(self, start: Mark, end: Mark) -> float:
        waited = sum(self._between(*marks) for marks in self._waits[start.waits : end.waits])
        return self._between(start, end) - waited

    def _between(self, start: Mark, end: Mark) -> float:
        if self._on_gpu:
            return float(start.moment.elapsed_time(end.moment)) / 1e3
        return float(end.moment - start.moment)

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for module, axis in self._axes:
            module.axis = axis
        self._handles.clear()
        self._axes.clear()


def _first(values: Any) -> Tensor | None:
    """The first tensor that takes a gradient."""
    return next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)
