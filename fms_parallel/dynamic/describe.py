"""A factory's model without memory, and what a change between two of its layouts costs in bytes and seconds.

It knows factories, boxes and reports of earlier changes; it builds nothing that holds memory and starts no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fms_parallel import compat
from fms_parallel.dynamic.plan import Item, Table, plan_transfer
from fms_parallel.dynamic.predict import predict_tables
from fms_parallel.dynamic.relayout import ModelFactory, SwitchReport, leave_empty
from fms_parallel.errors import FmsError
from fms_parallel.layout import ParallelLayout

MOMENTS = 2
"""Tensors that AdamW keeps beside each parameter, alike in size."""


def describe(model_factory: ModelFactory, precision: str = "fp32") -> nn.Module:
    """The undistributed model that a factory builds, on the meta device."""

    def without_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.empty_like.default and args[0].is_meta:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)

    with compat.intercept(without_memory):
        return model_factory(ParallelLayout(precision=precision), mesh=None, fill=leave_empty)


@dataclass
class SwitchCosts:
    """Seconds of changes of layout: what is always the same, and the bytes of the busiest rank over a bandwidth.

    Bytes are exact (`plan_transfer` of predicted tables); bandwidth and the rest are those of the changes that the job
    has made, and before the first one `bytes_per_s` of the slowest link and `rest`, a second.

    Args:
        native: the model without memory; None: every rank is taken to receive its whole new share.
        bytes_per_s: between ranks.
    """

    native: nn.Module | None
    bytes_per_s: float
    rest: float = 1.0
    _tables: dict[ParallelLayout, list[Table]] = field(default_factory=dict)
    _largest: dict[tuple[ParallelLayout, ParallelLayout], int] = field(default_factory=dict)
    learned: int = 0
    """Changes that it was told of."""

    def seconds(self, before: ParallelLayout, after: ParallelLayout) -> float:
        """Of one change; 0 for none."""
        if before == after:
            return 0.0
        return self.rest + self.largest(before, after) / self.bytes_per_s

    def largest(self, before: ParallelLayout, after: ParallelLayout) -> int:
        """Bytes that the busiest rank sends or receives."""
        pair = (before, after)
        if pair not in self._largest:
            try:
                self._largest[pair] = self._planned(before, after)
            except FmsError:  # a model without twins has no table for tp, say
                self._largest[pair] = self._state_bytes() * 2 // min(before.world_size, after.world_size)
        return self._largest[pair]

    def learn(self, report: SwitchReport) -> None:
        """From a change that was made: the newest counts half."""
        seconds = report.seconds
        moving = seconds.get("move", 0.0)
        part = 1.0 if self.learned == 0 else 0.5
        self.rest += part * (seconds["all"] - moving - self.rest)
        if report.largest > 1 << 16 and moving > 0:
            self.bytes_per_s += part * (report.largest / moving - self.bytes_per_s)
        self.learned += 1

    def _planned(self, before: ParallelLayout, after: ParallelLayout) -> int:
        items = self._items()
        plan = plan_transfer(items, self._table(before), self._table(after))
        return max((*plan.sent, *plan.received), default=0)

    def _table(self, layout: ParallelLayout) -> list[Table]:
        if layout not in self._tables:
            assert self.native is not None
            self._tables[layout] = predict_tables(self.native, layout)
        return self._tables[layout]

    def _items(self) -> dict[str, Item]:
        if self.native is None:
            raise FmsError("there is no description of the model")
        trained = {name for name, _ in self.native.named_parameters()}
        state = self.native.state_dict()
        return {
            name: Item(tuple(t.shape), t.element_size() * (1 + MOMENTS * (name in trained)))
            for name, t in state.items()
            if name in self._table(ParallelLayout())[0]
        }

    def _state_bytes(self) -> int:
        if self.native is None:
            return 0
        return sum(p.numel() * p.element_size() * (1 + MOMENTS) for p in self.native.parameters())
