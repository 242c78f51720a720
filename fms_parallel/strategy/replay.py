"""Recomputation for a backward pass that comes in several: a block's forward is run again once, however many there are.

A zero-bubble schedule first asks a stage for the gradients of its inputs, later for those of its weights, a group at a
time. torch's checkpoint runs the forward again for each of them (seven times a block in `interleaved_zero_bubble`).
Here what the forward keeps is made again when it is first asked for, and goes when the graph lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fms_parallel.errors import TrainingError


class _Slot:
    """Where a tensor that was not kept stands in the graph; `value` once it has been made again."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor."""
        if self.value is None:
            self.call.replay()
        assert self.value is not None
        return self.value


class _Done(Exception):
    """All that was asked for has been made again."""


class _Call:
    """One call of a block, as it can be repeated."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        # Weak, because the graph owns the slots: one that it has let go of is not filled again.
        self._slots: list[ref[_Slot]] = []

    def first(self) -> Any:
        """Run it without keeping anything."""
        with saved_tensors_hooks(self._reserve, _Slot.take):
            return self._run()

    def _reserve(self, _: Tensor) -> _Slot:
        slot = _Slot(self)
        self._slots.append(ref(slot))
        return slot

    def replay(self) -> None:
        """Run it again up to the last tensor that is wanted, and fill the slots."""
        waiting = iter(self._slots)
        left = len(self._slots)

        def fill(tensor: Tensor) -> None:
            nonlocal left
            slot = next(waiting)()
            if slot is not None:
                slot.value = tensor.detach()
            left -= 1
            if left == 0:
                raise _Done

        try:
            with torch.enable_grad(), saved_tensors_hooks(fill, _never):
                self._run()
        except _Done:
            return
        count = len(self._slots)
        raise TrainingError(
            f"recompute: a block kept {count} tensors in its forward pass and {count - left} when it was run again: "
            "its forward must do the same both times."
        )


def _never(_: Any) -> Tensor:
    raise AssertionError("a replayed forward has no backward pass")


def replayed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, keeping nothing for its backward pass."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return _Call(lambda: forward(*args, **kwargs)).first()

    return run
