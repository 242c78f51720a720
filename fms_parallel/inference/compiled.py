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
from typing import Any

import torch
from torch import Tensor

from fms_parallel import compat
from fms_parallel.errors import ConfigError
from fms_parallel.modules.linear import Matrices
from fms_parallel.modules.linear_types import Int8, Quantised

PLACES = 2
"""Rows of a matrix that are read side by side; more made no shape faster on the processors that were measured."""

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
        if rows > MOST_ROWS or not all(_is_known(weight) for weight in matrices.weights):
            return None
        parts = [_parts(weight, bias) for weight, bias in zip(matrices.weights, matrices.biases, strict=True)]
        flat = [tensor.detach() for part in parts for tensor in part if tensor is not None]
        form = tuple(tuple(tensor is not None for tensor in part) for part in parts)
        x = torch.ones(rows, flat[0].shape[1], dtype=self.dtype, device=flat[0].device)
        key = (form, rows, x.device, *((t.dtype, t.shape, t.stride()) for t in flat))
        if key not in self._made:
            self._made[key] = compat.compile_function(lambda x, *tensors: _products(x, form, tensors), (x, *flat))
        made = self._made[key]
        return lambda x: made(x.contiguous(), *flat)


def _is_known(weight: Any) -> bool:
    if isinstance(weight, Quantised):
        return isinstance(weight.type, Int8)
    return isinstance(weight, Tensor) and weight.numel() > 0


def _parts(weight: Any, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values `[N, E]`, scale `[N]`, bias `[N]`."""
    return (weight, None, bias) if isinstance(weight, Tensor) else (weight.values, weight.scale, bias)


def _products(x: Tensor, form: Sequence[tuple[bool, ...]], tensors: Sequence[Tensor]) -> Tensor:
    """What the compiler is given: `x [T, E]` -> `[T, N]`, sums in fp32 at least."""
    given = iter(tensors)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = []
    for one in form:
        values, scale, bias = (next(given) if there else None for there in one)
        assert values is not None
        places = values.chunk(PLACES if values.shape[0] % PLACES == 0 else 1)
        y = torch.stack([torch.cat([(place.to(wide.dtype) * row).sum(-1) for place in places]) for row in wide])
        y = y if scale is None else y * scale
        out.append(y if bias is None else y + bias)
    return torch.cat(out, -1).to(x.dtype)
