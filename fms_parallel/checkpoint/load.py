"""Weights into a model: each rank reads the boxes that it holds, and nothing else.

It knows modules and lazy tensors; it knows no formats (an adapter has renamed the keys before) and talks to no rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from fms_parallel.checkpoint.lazy import Agreeing, LazyTensor, copy_box
from fms_parallel.checkpoint.slots import Slot, slots_of
from fms_parallel.checkpoint.words import refuse_misfits
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import CheckpointError
from fms_parallel.strategy.base import parallel_of


def load_weights(model: nn.Module, tensors: Mapping[str, LazyTensor], *, source: str) -> None:
    """Fill every parameter and persistent buffer of `model`, in any layout, from tensors under its own names.

    Values are cast to the model's dtype. Of tied names one suffices; when both are there they must be equal.

    Args:
        model: materialised; plain tensors or DTensors of any placements.
        tensors: as `open_weights` gives them, through an adapter's `to_native` unless they are native already.
        source: where they come from, for messages.
    Raises:
        CheckpointError: keys that are missing, extra or of the wrong shape, all of them, before a byte is read; a
            model on the meta device; tied weights that differ; a file that can no longer be read.
    """
    slots = slots_of(model)
    matched = _match(slots, tensors, source, parallel_of(model).elsewhere)
    with torch.no_grad():
        for slot, tensor in zip(slots, matched, strict=True):
            try:
                copy_box(tensor, slot.box(), local_tensor(slot.tensor))
            except CheckpointError as error:
                raise CheckpointError(f"{source}: {' = '.join(slot.names)}: {error}") from error


def _match(
    slots: Sequence[Slot], tensors: Mapping[str, LazyTensor], source: str, elsewhere: Collection[str]
) -> list[LazyTensor]:
    """The tensor of each slot, or one error with everything that does not fit; `elsewhere` are other stages' names."""
    names = {name for slot in slots for name in slot.names}
    missing: list[str] = []
    unfit: list[str] = []
    matched: list[LazyTensor] = []
    for slot in slots:
        found = {name: tensors[name] for name in slot.names if name in tensors}
        if not found:
            missing.append(" = ".join(slot.names))
        for name, tensor in found.items():
            if tensor.shape != slot.shape:
                unfit.append(f"{name} ({list(tensor.shape)}, the model has {list(slot.shape)})")
            elif tensor.dtype.is_floating_point != slot.tensor.dtype.is_floating_point:
                unfit.append(f"{name} ({tensor.dtype}, the model has {slot.tensor.dtype})")
        copies = list({id(tensor): tensor for tensor in found.values()}.values())
        if len(copies) == 1:
            matched += copies
        elif not unfit and copies:
            matched.append(Agreeing(copies))
    extra = [name for name in tensors if name not in names and name not in elsewhere]
    refuse_misfits(source, {"missing": missing, "extra": extra, "of the wrong shape or type": unfit})
    return matched
