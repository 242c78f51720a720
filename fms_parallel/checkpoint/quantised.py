"""Ordinary tensors as a quantised model stores them, rounded while they are read, some rows at a time.

    weight [N, E]  ->  weight, weight_scale      a box of either reads whole rows of the source and nothing else

So a model of int8 weights is filled from any checkpoint, or from a seed, in the memory of the model and one piece. It
knows lazy tensors and linear types; it knows no formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError
from fms_parallel.modules.initial import Init
from fms_parallel.modules.linear_types import SCALE, LinearType, stored_parameters

PIECE_BYTES = 1 << 24
"""What is read at a time: rounding takes three times as much beside what it makes."""


class Scales(LazyTensor):
    """The scale of each row of a weight."""

    def __init__(self, weight: LazyTensor, kind: LinearType) -> None:
        super().__init__(weight.shape[:-1], torch.float32)
        self._weight, self._kind = weight, kind

    def _read(self, box: Box) -> Tensor:
        out = torch.empty(box.size, dtype=self.dtype)
        for part, rows in _rows(self._weight, box):
            out[part] = self._kind.scale(rows.abs().amax(-1))
        return out


class Values(LazyTensor):
    """What is stored of a weight."""

    def __init__(self, weight: LazyTensor, kind: LinearType, dtype: torch.dtype) -> None:
        super().__init__(weight.shape, dtype)
        self._weight, self._kind = weight, kind

    def _read(self, box: Box) -> Tensor:
        out = torch.empty(box.size, dtype=self.dtype)
        columns = slice(box.offset[-1], box.offset[-1] + box.size[-1])
        for part, rows in _rows(self._weight, Box(box.offset[:-1], box.size[:-1])):
            scale = self._kind.scale(rows.abs().amax(-1))
            out[part] = self._kind.values(rows[..., columns], scale)
        return out


def _rows(weight: LazyTensor, box: Box) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Whole rows, some at a time, and where in `box` they are, which has no last dimension."""
    width = weight.shape[-1]
    for part in _parts(box, width * weight.dtype.itemsize):
        yield part.shifted(box.offset).slices, weight.read(Box((*part.offset, 0), (*part.size, width)))


def _parts(box: Box, row_bytes: int) -> Iterator[Box]:
    """A box of rows, cut into boxes of at most `PIECE_BYTES`, one row at least."""
    first, stop, inner = box.offset[0], box.offset[0] + box.size[0], prod(box.size[1:]) * row_bytes
    if inner > PIECE_BYTES and len(box.size) > 1:  # a stack of matrices, each too large
        rest = Box(box.offset[1:], box.size[1:])
        for place in range(first, stop):
            yield from (Box((place, *part.offset), (1, *part.size)) for part in _parts(rest, row_bytes))
        return
    count = max(1, PIECE_BYTES // max(inner, 1))
    for start in range(first, stop, count):
        yield Box((start, *box.offset[1:]), (min(count, stop - start), *box.size[1:]))


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
    for name, kind in stored_parameters(model):
        source = next((tensors[other] for other in (name, *same.get(name, ())) if other in tensors), None)
        if source is not None:
            dtype = model.get_parameter(name).dtype
            stored[name], stored[name + SCALE] = Values(source, kind, dtype), Scales(source, kind)
    for group in ties:
        found = next((tensors[name] for name in group if name in tensors), None)
        if found is not None:
            stored |= {name: found for name in group if name not in stored}
    return stored


def refuse_to_save(model: nn.Module) -> None:
    """Raise CheckpointError when the model's weights are rounded: they are not the ones that a checkpoint means."""
    for name, kind in stored_parameters(model):
        raise CheckpointError(
            f"{name.removesuffix('.weight')} is stored as {kind.name}, which is rounded: keep the checkpoint that it "
            "came from, or save the model before it is quantised."
        )
