"""Ordinary tensors as a quantised model stores them, rounded while they are read, some rows at a time.

    weight [N, E]  ->  weight, weight_scale      a box of either reads whole rows of the source and nothing else

So a model of int8 weights is filled from any checkpoint, or from a seed, in the memory of the model and one piece. It
knows lazy tensors and linear types; it knows no formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError
from fms_parallel.modules.initial import Init
from fms_parallel.modules.linear_types import SCALE, LinearType, quantised


class Scales(LazyTensor):
    """The scale of each row of a weight."""

    def __init__(self, weight: LazyTensor, kind: LinearType) -> None:
        super().__init__(weight.shape[:-1], torch.float32)
        self._weight, self._kind = weight, kind

    def _read(self, box: Box) -> Tensor:
        return self._kind.scale(_rows(self._weight, box).abs().amax(-1))


class Values(LazyTensor):
    """What is stored of a weight."""

    def __init__(self, weight: LazyTensor, kind: LinearType, dtype: torch.dtype) -> None:
        super().__init__(weight.shape, dtype)
        self._weight, self._kind = weight, kind

    def _read(self, box: Box) -> Tensor:
        rows = _rows(self._weight, Box(box.offset[:-1], box.size[:-1]))
        scale = self._kind.scale(rows.abs().amax(-1))
        columns = slice(box.offset[-1], box.offset[-1] + box.size[-1])
        return self._kind.values(rows[..., columns], scale)


def _rows(weight: LazyTensor, box: Box) -> Tensor:
    """Whole rows: the box has no last dimension."""
    return weight.read(Box((*box.offset, 0), (*box.size, weight.shape[-1])))


class Drawn(LazyTensor):
    """Initial values, drawn when they are read: the same as a parameter of this name starts with."""

    def __init__(self, init: Init, shape: Sequence[int], dtype: torch.dtype, key: str) -> None:
        super().__init__(shape, dtype)
        self._init, self._key = init, key

    def _read(self, box: Box) -> Tensor:
        piece = torch.empty(box.size, dtype=self.dtype)
        self._init.fill(piece, box, self.shape, self._key)
        return piece


def rounded(
    model: nn.Module, tensors: Mapping[str, LazyTensor], ties: Iterable[Sequence[str]]
) -> dict[str, LazyTensor]:
    """Native tensors as `model` stores them.

    Args:
        ties: names that shared one parameter before the model was quantised: any of them stands for the others.
    """
    same = {name: list(group) for group in ties for name in group}
    stored = dict(tensors)
    for owner, module, kind in quantised(model):
        name = f"{owner}.weight"
        source = next((tensors[other] for other in (name, *same.get(name, ())) if other in tensors), None)
        if source is not None:
            dtype = module.get_parameter("weight").dtype
            stored[name], stored[f"{owner}.{SCALE}"] = Values(source, kind, dtype), Scales(source, kind)
    for group in ties:
        found = next((tensors[name] for name in group if name in tensors), None)
        if found is not None:
            stored |= {name: found for name in group if name not in stored}
    return stored


def refuse_to_save(model: nn.Module) -> None:
    """Raise CheckpointError when the model's weights are rounded: they are not the ones that a checkpoint means."""
    for name, _, kind in quantised(model):
        raise CheckpointError(
            f"{name} is stored as {kind.name}, which is rounded: keep the checkpoint that it came from, or save the "
            "model before it is quantised."
        )
