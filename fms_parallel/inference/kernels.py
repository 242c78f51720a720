"""How the matrices of a group can lie for the few rows of a decoding step, and the kernel that reads each.

    stored        as the parameter lies: [N, E], one product for each matrix
    joined        a group (query, key, value) as one stored matrix
    transposed    joined, as [E, N]
    prepacked     joined, in oneDNN's own blocks
    split         transposed in one part for each thread
    compiled      as the parameters lie, by a kernel made for their shapes (`inference/compiled.py`)

Which is the fastest is found by timing (`inference/weights.py`). It knows matrices; it knows no module and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel import compat
from fms_parallel.inference.compiled import Compiled
from fms_parallel.modules.linear import Bias, Matrices
from fms_parallel.modules.linear_types import Quantised

STORED = "stored"
COMPILED = "compiled"

Kernel = Callable[[Tensor], Tensor]
"""`x [T, E]` -> `[T, N]`."""


@dataclass(frozen=True)
class Joined:
    """A group as one matrix `[N, E]`."""

    weight: Tensor
    bias: Bias

    @classmethod
    def of(cls, matrices: Matrices) -> Joined:
        weights = [w for w in matrices.weights if isinstance(w, Tensor)]
        given = [b for b in matrices.biases if b is not None]
        if not given:
            bias = None
        else:
            pairs = zip(weights, matrices.biases, strict=True)
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])
        return cls(torch.cat(weights) if len(weights) > 1 else weights[0], bias)


def _plain(joined: Joined, rows: int) -> Kernel:
    weight, bias = joined.weight, joined.bias
    return lambda x: F.linear(x, weight, bias)


def _transposed(joined: Joined, rows: int) -> Kernel:
    weight, bias = joined.weight.t().contiguous(), joined.bias
    if bias is None:
        return lambda x: torch.mm(x, weight)
    return lambda x: torch.addmm(bias, x, weight)


def _prepacked(joined: Joined, rows: int) -> Kernel | None:
    if not compat.has_prepacked_linear(joined.weight):
        return None
    # Blocks made for 16 rows serve any number from 2 on; one row has its own.
    packed, bias = compat.prepack_linear(joined.weight.contiguous(), 1 if rows == 1 else max(16, rows)), joined.bias
    return lambda x: compat.prepacked_linear(x.contiguous(), packed, bias)


def _split(joined: Joined, rows: int) -> Kernel | None:
    threads, (outputs, width) = torch.get_num_threads(), joined.weight.shape
    if threads == 1 or outputs % threads or joined.weight.device.type != "cpu":
        return None
    parts, bias = joined.weight.view(threads, -1, width).transpose(1, 2).contiguous(), joined.bias

    def kernel(x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(threads, *x.shape), parts).transpose(0, 1).reshape(x.shape[0], outputs)
        return y if bias is None else y + bias

    return kernel


LAYOUTS: dict[str, Callable[[Joined, int], Kernel | None]] = {
    "joined": _plain,
    "transposed": _transposed,
    "prepacked": _prepacked,
    "split": _split,
}
"""Name -> kernel of a joined group for so many rows; None where this machine or shape has none."""

NAMES = (*LAYOUTS, COMPILED)


def candidate(name: str, matrices: Matrices, rows: int, compiled: Compiled | None = None) -> Kernel | None:
    """The kernel of one layout for so many rows, or None when it is not there or gains nothing over what is stored."""
    weights = matrices.weights
    if name == COMPILED:
        return None if compiled is None else compiled.kernel(matrices, rows)
    if all(isinstance(w, Tensor) for w in weights):
        return None if name == "joined" and len(weights) == 1 else LAYOUTS[name](Joined.of(matrices), rows)
    return _joined_quantised(matrices) if name == "joined" else None


def _joined_quantised(matrices: Matrices) -> Kernel | None:
    """Quantised matrices of one type as one; they are rounded row by row, so this changes no number."""
    weights = [w for w in matrices.weights if isinstance(w, Quantised)]
    kinds = {w.type.name for w in weights}
    if len(weights) < len(matrices.weights) or len(kinds) > 1 or any(b is not None for b in matrices.biases):
        return None
    if len(weights) == 1:  # nothing to join, but its parts need not be looked up each time
        return weights[0].product
    scale, values = torch.cat([w.scale for w in weights]), torch.cat([w.values for w in weights])
    return Quantised(weights[0].type, values, scale).product
