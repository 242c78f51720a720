"""How parameters start: a value per parameter, drawn so that one seed gives the same global weights in every layout.

A parameter is drawn from generators keyed by (seed, its full name, block of rows), so a rank draws only the rows that
its box touches and two ranks that hold the same rows draw the same bits. Nothing else has this: the usual way is a
"seed checkpoint" written by one process.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fms_parallel.distributed.boxes import Box

BLOCK_ELEMENTS = 1 << 20
"""Elements drawn from one generator: bounds memory, and lets a shard skip what it does not hold."""


class Init(Protocol):
    """How a parameter starts."""

    def fill(self, piece: Tensor, box: Box, shape: tuple[int, ...], key: str) -> None:
        """Write the values of `box` of a full tensor of `shape` into `piece` (shape `box.size`)."""
        ...


@dataclass(frozen=True)
class Fill:
    """Every element is `value`."""

    value: float

    def fill(self, piece: Tensor, box: Box, shape: tuple[int, ...], key: str) -> None:
        piece.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0 and standard deviation `std`."""

    std: float

    def fill(self, piece: Tensor, box: Box, shape: tuple[int, ...], key: str) -> None:
        _draw_rows(piece, box, shape, key, lambda block, generator: block.normal_(0.0, self.std, generator=generator))


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound."""

    bound: float

    def fill(self, piece: Tensor, box: Box, shape: tuple[int, ...], key: str) -> None:
        draw = lambda block, generator: block.uniform_(-self.bound, self.bound, generator=generator)  # noqa: E731
        _draw_rows(piece, box, shape, key, draw)


class _Draw(Protocol):
    def __call__(self, block: Tensor, generator: torch.Generator) -> object: ...


def _draw_rows(piece: Tensor, box: Box, shape: tuple[int, ...], key: str, draw: _Draw) -> None:
    """Draw, block of rows by block, what `box` needs.

        rows of the full tensor   |--block 0--|--block 1--|--block 2--|
        this rank's box                 [=========]                      draws blocks 0 and 1, keeps its rows

    Drawn on the CPU in fp32, whatever the device and dtype of `piece`: the same bits everywhere.
    """
    if box.numel == 0:
        return
    if not shape:  # a scalar is a row of one
        return _draw_rows(piece.view(1), Box.whole((1,)), (1,), key, draw)
    row_elements = max(1, torch.Size(shape[1:]).numel())
    rows = max(1, BLOCK_ELEMENTS // row_elements)
    first, last = box.offset[0], box.offset[0] + box.size[0]
    inner = box.slices[1:]
    for start in range(first // rows * rows, last, rows):
        stop = min(start + rows, shape[0])
        block = torch.empty(stop - start, *shape[1:], dtype=torch.float32)
        draw(block, torch.Generator().manual_seed(_seed(key, start)))
        low, high = max(start, first), min(stop, last)
        wanted = (slice(low - start, high - start), *inner)
        piece[low - first : high - first].copy_(block[wanted])


def _seed(key: str, start: int) -> int:
    digest = hashlib.blake2b(f"{key}/{start}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
