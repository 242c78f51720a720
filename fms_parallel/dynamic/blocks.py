"""`BlockClock`: how long this rank works on a block, forward and backward: the same work on every rank of a job.

So ranks can be compared in any layout, whatever else they wait for. It knows modules and clocks; it knows no layouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.strategy.base import repeated_blocks

Mark = Any
"""A moment: a number of seconds, or a CUDA event."""


class BlockClock:
    """Times every pass through the repeated blocks of a model, until it is detached.

    Blocks that torch.compile has are left alone: a clock inside would cut their graphs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: dict[str, list[tuple[Mark, Mark]]] = {"forward": [], "backward": []}
        self._handles: list[Any] = []
        for _, block in repeated_blocks(model):
            if getattr(block, "_compiled_call_impl", None) is None:
                self._watch(block)

    def _watch(self, block: nn.Module) -> None:
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

        pending: list[Callable[[Mark], None]] = []
        self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(block.register_forward_hook(after, with_kwargs=True))

    def _end_of_backward(self) -> Callable[[Mark], None]:
        """Called with the moment when a backward pass begins, then with None when it has ended."""
        began: list[Mark] = []

        def note(mark: Mark) -> None:
            if mark is not None:
                began.append(mark)
            elif began:
                self._passes["backward"].append((began.pop(), self._now()))

        return note

    def _now(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[float, float]:
        """Seconds of one pass through one block, forward and backward (medians), and of all; then it begins anew."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = {way: [self._between(*marks) for marks in passes] for way, passes in self._passes.items()}
        for passes in self._passes.values():
            passes.clear()
        once = sum(median(found) for found in seconds.values() if found)
        return once, sum(map(sum, seconds.values()))

    def _between(self, start: Mark, end: Mark) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._on_gpu else float(end - start)

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _first(values: Any) -> Tensor | None:
    """The first tensor that takes a gradient."""
    return next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)
