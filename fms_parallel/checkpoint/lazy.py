"""Lazy tensors: shape and dtype now, bytes when asked for, and only those inside a box.

A view changes what a tensor looks like (joined, stacked, grouped, permuted) by translating the box that it is asked for
into boxes of its inner tensors, so that a rank reads its own bytes through any chain of views. This page knows boxes;
it knows no key names, no models and no ranks.

    Concatenated([q, k], dim=0).read(rows 6..10 of 12)  ->  q.read(rows 6..8 of 8), k.read(rows 0..2 of 4)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError

PIECE_BYTES = 1 << 26
"""What is read at a time of a tensor that goes somewhere else piece by piece."""


class LazyTensor(ABC):
    """A tensor that can be read box by box."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    def read(self, box: Box) -> Tensor:
        """The elements inside `box`, shape `box.size`. May share memory with its source: copy from it, never write.

        Raises:
            CheckpointError: the box lies outside the tensor, or the file behind it can no longer be read.
        """
        ends = [start + count for start, count in zip(box.offset, box.size, strict=True)]
        outside = len(ends) != len(self.shape) or any(end > n for end, n in zip(ends, self.shape, strict=True))
        if outside or min((*box.offset, *box.size), default=0) < 0:
            raise CheckpointError(
                f"box at {box.offset} of size {box.size} lies outside a tensor of shape {self.shape}."
            )
        if box.numel == 0:
            return torch.empty(box.size, dtype=self.dtype)
        return self._read(box)

    def read_all(self) -> Tensor:
        """Every element."""
        return self.read(Box.whole(self.shape))

    def read_rows(self) -> Iterator[Tensor]:
        """Every element, some rows at a time, as `row_pieces` cuts them."""
        return (self.read(piece) for piece in row_pieces(Box.whole(self.shape), self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def _read(self, box: Box) -> Tensor:
        """`read` of a box that is inside and not empty."""


# ---- sources ----------------------------------------------------------------------------------------------------


class FileTensor(LazyTensor):
    """A tensor in a safetensors file.

    The file is opened for each read and closed after it: 0.1 to 0.3 ms, and the pages that a read has touched leave
    this process's memory with the mapping. A cached handle would keep them, a whole file's worth in the end.
    """

    def __init__(self, path: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.path = path
        self.name = name

    def _read(self, box: Box) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_slice(self.name)[box.slices].clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {self.name} can no longer be read: {error}.") from error


class MemoryTensor(LazyTensor):
    """A tensor that is in memory (or mapped) already."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor = tensor.detach()

    def _read(self, box: Box) -> Tensor:
        return self.tensor[box.slices]


# ---- views ------------------------------------------------------------------------------------------------------


class Concatenated(LazyTensor):
    """`parts` joined along the existing dimension `dim`."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int) -> None:
        _check_alike(parts, dim)
        first = parts[0].shape
        super().__init__((*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :]), parts[0].dtype)
        self.parts = tuple(parts)
        self.dim = dim

    def _read(self, box: Box) -> Tensor:
        pieces = []
        start = 0
        for part in self.parts:
            origin = tuple(start if d == self.dim else 0 for d in range(len(self.shape)))
            common = box.intersect(Box(origin, part.shape))
            if common is not None:
                pieces.append(part.read(common.shifted(origin)))
            start += part.shape[self.dim]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


class Stacked(LazyTensor):
    """`parts` of one shape, stacked along a new dimension `dim`: gate `[F, E]` and up `[F, E]` -> `[2, F, E]`."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int) -> None:
        _check_alike(parts, None)
        first = parts[0].shape
        super().__init__((*first[:dim], len(parts), *first[dim:]), parts[0].dtype)
        self.parts = tuple(parts)
        self.dim = dim

    def _read(self, box: Box) -> Tensor:
        inner = Box(_without(box.offset, self.dim), _without(box.size, self.dim))
        first = box.offset[self.dim]
        parts = self.parts[first : first + box.size[self.dim]]
        return torch.stack([part.read(inner) for part in parts], self.dim)


class Unstacked(LazyTensor):
    """Entry `index` along `dim`, that dimension dropped: one part of what `Stacked` made."""

    def __init__(self, inner: LazyTensor, dim: int, index: int) -> None:
        super().__init__(_without(inner.shape, dim), inner.dtype)
        self.inner = inner
        self.dim = dim
        self.index = index

    def _read(self, box: Box) -> Tensor:
        offset = (*box.offset[: self.dim], self.index, *box.offset[self.dim :])
        size = (*box.size[: self.dim], 1, *box.size[self.dim :])
        return self.inner.read(Box(offset, size)).squeeze(self.dim)


class Section(LazyTensor):
    """The part of `inner` inside `box`: one part of what `Concatenated` made."""

    def __init__(self, inner: LazyTensor, box: Box) -> None:
        super().__init__(box.size, inner.dtype)
        self.inner = inner
        self.origin = tuple(-start for start in box.offset)

    @classmethod
    def along(cls, inner: LazyTensor, dim: int, start: int, size: int) -> Section:
        """Entries `[start, start + size)` of dimension `dim`."""
        whole = Box.whole(inner.shape)
        offset = (*whole.offset[:dim], start, *whole.offset[dim + 1 :])
        return cls(inner, Box(offset, (*whole.size[:dim], size, *whole.size[dim + 1 :])))

    def _read(self, box: Box) -> Tensor:
        return self.inner.read(box.shifted(self.origin))


class Unflattened(LazyTensor):
    """Dimension 0 of `inner` seen as a grid: `[K * G * D, E]` -> `[K, G, D, E]`."""

    def __init__(self, inner: LazyTensor, sizes: Sequence[int]) -> None:
        if not inner.shape or inner.shape[0] != prod(sizes):
            grid = " * ".join(map(str, sizes))
            raise CheckpointError(f"a tensor of shape {inner.shape} has not {grid} = {prod(sizes)} rows.")
        super().__init__((*sizes, *inner.shape[1:]), inner.dtype)
        self.inner = inner
        self.sizes = tuple(sizes)

    def _read(self, box: Box) -> Tensor:
        n = len(self.sizes)
        grid = Box(box.offset[:n], box.size[:n])
        pieces = [
            self.inner.read(Box((start, *box.offset[n:]), (count, *box.size[n:])))
            for start, count in _runs(grid, self.sizes)
        ]
        return torch.cat(pieces).reshape(box.size)


class Flattened(LazyTensor):
    """The first `count` dimensions of `inner` as one: `[K, G, D, E]` -> `[K * G * D, E]`."""

    def __init__(self, inner: LazyTensor, count: int) -> None:
        super().__init__((prod(inner.shape[:count]), *inner.shape[count:]), inner.dtype)
        self.inner = inner
        self.count = count

    def _read(self, box: Box) -> Tensor:
        start, rest = box.offset[0], Box(box.offset[1:], box.size[1:])
        pieces = [
            self.inner.read(Box((*grid.offset, *rest.offset), (*grid.size, *rest.size))).reshape(-1, *rest.size)
            for grid in _rectangles(start, start + box.size[0], self.inner.shape[: self.count])
        ]
        return torch.cat(pieces)


class RotaryPermuted(LazyTensor):
    """Rows of q or k re-ordered inside each head between the two ways of writing rotary positions.

        interleaved (Meta)     row 2i and row 2i + 1 turn together
        halves (HF and ours)   row i and row i + D/2 turn together

    Reads only the whole heads that cover a box. Works for weights `[H * D, E]` and biases `[H * D]`.
    """

    def __init__(self, inner: LazyTensor, heads: int, head_width: int, *, to_halves: bool) -> None:
        if not inner.shape or inner.shape[0] != heads * head_width or head_width % 2:
            raise CheckpointError(
                f"a tensor of shape {inner.shape} has not {heads} heads of an even width {head_width} as its rows."
            )
        super().__init__(inner.shape, inner.dtype)
        self.inner = inner
        self.width = head_width
        self.grid = (-1, head_width // 2, 2) if to_halves else (-1, 2, head_width // 2)

    def _read(self, box: Box) -> Tensor:
        first, count = box.offset[0], box.size[0]
        start = first // self.width * self.width
        stop = -(-(first + count) // self.width) * self.width
        rows = self.inner.read(Box((start, *box.offset[1:]), (stop - start, *box.size[1:])))
        permuted = rows.unflatten(0, self.grid).transpose(1, 2).flatten(0, 2)
        return permuted[first - start : first - start + count]


class Cast(LazyTensor):
    """The same values in another dtype, rounded where it is narrower."""

    def __init__(self, inner: LazyTensor, dtype: torch.dtype) -> None:
        super().__init__(inner.shape, dtype)
        self.inner = inner

    def _read(self, box: Box) -> Tensor:
        return self.inner.read(box).to(self.dtype)


class Agreeing(LazyTensor):
    """Copies of one tensor, as a file that writes tied weights under each of their names has them.

    Reading raises CheckpointError when the copies differ inside the box; `what` says how there came to be several.
    """

    def __init__(self, copies: Sequence[LazyTensor], what: str = "tied weights are in the file twice") -> None:
        _check_alike(copies, None)
        super().__init__(copies[0].shape, copies[0].dtype)
        self.copies = tuple(copies)
        self.what = what

    def _read(self, box: Box) -> Tensor:
        first, *others = (copy.read(box) for copy in self.copies)
        for other in others:
            # Compared as bytes: a NaN equals itself here.
            if not torch.equal(as_bytes(first), as_bytes(other)):
                raise CheckpointError(f"{self.what}, with different contents.")
        return first


# ---- piece by piece ---------------------------------------------------------------------------------------------


def copy_box(tensor: LazyTensor, box: Box, target: Tensor) -> None:
    """Copy what lies in `box` into `target` (shape `box.size`), some rows at a time."""
    for piece in row_pieces(box, tensor.dtype):
        target[piece.shifted(box.offset).slices].copy_(tensor.read(piece))


def row_pieces(box: Box, dtype: torch.dtype) -> list[Box]:
    """A box cut along its first dimension into boxes of at most `PIECE_BYTES`, one row at least, in order."""
    if not box.size or box.numel == 0:
        return [box]
    rows = max(1, PIECE_BYTES // (prod(box.size[1:]) * dtype.itemsize))
    first, stop = box.offset[0], box.offset[0] + box.size[0]
    return [
        Box((start, *box.offset[1:]), (min(rows, stop - start), *box.size[1:])) for start in range(first, stop, rows)
    ]


# ---- helpers of this page ---------------------------------------------------------------------------------------


def _without(values: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*values[:index], *values[index + 1 :])


def _check_alike(parts: Sequence[LazyTensor], free: int | None) -> None:
    """Parts agree in dtype and in every dimension but `free`."""
    kinds = {(part.dtype, part.shape if free is None else _without(part.shape, free)) for part in parts}
    if len(kinds) > 1:
        found = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise CheckpointError(f"parts of shape {found} do not fit together.")


def _runs(box: Box, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, count) of the runs of flat indices that `box` covers in a grid of `sizes`, in order and joined."""
    run: tuple[int, int] | None = None
    for lead in product(*(range(o, o + n) for o, n in zip(box.offset[:-1], box.size[:-1], strict=True))):
        start = 0
        for index, size in zip((*lead, box.offset[-1]), sizes, strict=True):
            start = start * size + index
        if run is not None and sum(run) == start:
            run = (run[0], run[1] + box.size[-1])
            continue
        if run is not None:
            yield run
        run = (start, box.size[-1])
    if run is not None:
        yield run


def _rectangles(start: int, stop: int, sizes: tuple[int, ...]) -> list[Box]:
    """Boxes that cover the flat indices `[start, stop)` of a grid of `sizes`, in order."""
    if len(sizes) == 1:
        return [Box((start,), (stop - start,))]
    row = prod(sizes[1:])
    boxes: list[Box] = []
    while start < stop:
        index, within = divmod(start, row)
        whole = 0 if within else (stop - start) // row
        if whole:
            boxes.append(Box((index, *(0 for _ in sizes[1:])), (whole, *sizes[1:])))
            start += whole * row
        else:
            end = min(stop, (index + 1) * row)
            inside = _rectangles(within, end - index * row, sizes[1:])
            boxes += [Box((index, *box.offset), (1, *box.size)) for box in inside]
            start = end
    return boxes


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements in order as bytes; of a contiguous tensor its own memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
