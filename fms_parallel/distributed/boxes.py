"""Boxes: which hyper-rectangle of a full tensor this rank holds.

Checkpoint loading, initialisation and live re-layout all speak boxes, so none of them needs to know strategies.

    weight [8, 4], tp=2 on dim 0, rank 1 ->  Box(offset=(4, 0), size=(4, 4))
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fms_parallel import compat


@dataclass(frozen=True)
class Box:
    """A hyper-rectangle: per dimension the first index and the number of indices, in elements."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a full tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing the full tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))

    @property
    def numel(self) -> int:
        """Elements inside."""
        return prod(self.size)

    def intersect(self, other: Box) -> Box | None:
        """The common box, in the same (global) coordinates, or None when they do not meet."""
        if self == other:
            return self if self.numel else None
        offset, size = [], []
        for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True):
            start = a if a > b else b
            count = (a + n if a + n < b + m else b + m) - start
            if count <= 0:
                return None
            offset.append(start)
            size.append(count)
        return Box(tuple(offset), tuple(size))

    def shifted(self, by: tuple[int, ...]) -> Box:
        """The same box in coordinates whose origin is at `by`."""
        return Box(tuple(o - b for o, b in zip(self.offset, by, strict=True)), self.size)


def local_box(tensor: Tensor) -> Box:
    """The box of the full tensor that this rank holds; a plain tensor is held whole.

    A shard that is empty on this rank gives a box with a zero in `size`.
    """
    if not isinstance(tensor, DTensor):
        return Box.whole(tuple(tensor.shape))
    size, offset = compat.local_shape_and_offset(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
    return Box(offset, size)


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory that this rank holds, detached from autograd: writing to it writes the parameter."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # a DTensor's own `detach` takes ten times as long
            tensor = tensor.to_local()
    return tensor.detach()
