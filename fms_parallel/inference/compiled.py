"""Products of a few rows by kernels that torch's compiler makes for the very shapes: they read weights where they lie.

A library's kernel for one row follows one stretch of memory at a time, and waits for it. Here the rows of a matrix are
read from several places at once, each a sum of its own, and one pass over the weights serves all rows of the input:

    weight [N, E]     row 0   ->  y[0]          row N/2      ->  y[N/2]         in one loop
                      row 1   ->  y[1]          row N/2 + 1  ->  y[N/2 + 1]

So no copy is needed, and bf16 and int8 are made wide in registers. Making a kernel takes seconds and a C++ compiler
(`prepare_for_decode(compiled=True)`). It knows groups of matrices; it knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fms_parallel import compat
from fms_parallel.errors import ConfigError
from fms_parallel.modules.linear import Matrices
from fms_parallel.modules.linear_types import Int8, Quantised

STREAMS = {4: 6, 2: 4, 1: 4}
"""Bytes of a number -> places that a loop reads from at most; a processor's prefetcher follows no more of them."""

MOST_ROWS = 4
"""Of an input: each costs registers, and a kernel for many is what libraries are good at."""


class Compiled:
    """Kernels made so far for activations of one dtype: groups of the same shapes share one.

    Raises:
        ConfigError: no compiler.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if not compat.has_compiler():
            raise ConfigError(
                "compiled=True needs a C++ compiler (g++ or clang++ on PATH): install one, or leave it out."
            )
        self.dtype = dtype
        self._made: dict[Any, Callable[..., Any]] = {}

    def kernel(self, matrices: Matrices, rows: int) -> Callable[[Tensor], Tensor] | None:
        """`x [rows, E] -> [rows, N]` of a group, or None when it has no such kernel."""
        operands = Operands.of(matrices, rows)
        if operands is None:
            return None
        form, flat = operands.form, operands.tensors
        x = torch.ones(rows, flat[0].shape[1], dtype=self.dtype, device=flat[0].device)
        key = (form, rows, x.device, *((t.dtype, t.shape, t.stride()) for t in flat))
        if key not in self._made:
            self._made[key] = compat.compile_function(
                lambda x, *tensors: torch.cat(products(x, form, tensors), -1), (x, *flat)
            )
        made = self._made[key]
        return lambda x: made(x.contiguous(), *flat)


@dataclass(frozen=True)
class Operands:
    """A group's matrices as plain tensors.

    Attributes:
        tensors: of each matrix its values `[N, E]`, its scale `[N]` and its bias `[N]`, as far as there are any.
        form: of each matrix which of the three there are.
    """

    tensors: tuple[Tensor, ...]
    form: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, matrices: Matrices, rows: int) -> Operands | None:
        """None where so many rows, or a matrix stored like these, have no kernel."""
        if rows > MOST_ROWS or not all(_is_known(weight) for weight in matrices.weights):
            return None
        parts = [_parts(weight, bias) for weight, bias in zip(matrices.weights, matrices.biases, strict=True)]
        flat = tuple(tensor.detach() for part in parts for tensor in part if tensor is not None)
        return cls(flat, tuple(tuple(tensor is not None for tensor in part) for part in parts))


def _is_known(weight: Any) -> bool:
    if isinstance(weight, Quantised):
        return isinstance(weight.type, Int8)
    return isinstance(weight, Tensor) and weight.numel() > 0


def _parts(weight: Any, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values `[N, E]`, scale `[N]`, bias `[N]`."""
    return (weight, None, bias) if isinstance(weight, Tensor) else (weight.values, weight.scale, bias)


def products(x: Tensor, form: Sequence[tuple[bool, ...]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the compiler is given: `x [T, E]` -> `[T, N]` for each matrix of `Operands`, sums in fp32 at least."""
    given = iter(tensors)
    parts = [[next(given) if there else None for there in one] for one in form]
    lengths = [len(values) for values, *_ in parts if values is not None]
    wide = compat.stored(x.to(torch.promote_types(x.dtype, torch.float32)))
    out = []
    for values, scale, bias in parts:
        assert values is not None
        places = values.chunk(_places(values, lengths.count(len(values))))
        y = torch.stack([torch.cat([(place.to(wide.dtype) * row).sum(-1) for place in places]) for row in wide])
        y = y if scale is None else y * scale
        out.append((y if bias is None else y + bias).to(x.dtype))
    return out


def _places(values: Tensor, alike: int) -> int:
    """Parts of a matrix that are read side by side: the compiler makes one loop of all matrices with as many rows."""
    most = STREAMS.get(values.element_size(), 4) // alike
    return next((count for count in (4, 2) if count <= most and len(values) % count == 0), 1)
