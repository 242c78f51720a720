"""Low-rank adapters (LoRA, arXiv 2106.09685) of matrices that a module multiplies by itself (`modules/linear.py`).

    y = W x + s B (A x)        W [..., E] frozen, A [r, E], B [..., r]; s = alpha / r

A is one more matrix of W's group: it reads the same input, in the same operation. B has the shape of W but for its
last dimension, so whatever a twin does with W's rows (cut them, copy a kv head) it does with B's. Where tp cuts one
factor as it cuts W the other is whole, and its gradient is a partial sum:

    W cut along rows   B cut along rows, A whole        W cut along E   A cut along E, B whole, y a partial sum

It knows names, shapes and placements; it knows no ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from fms_parallel.distributed.boxes import Box
from fms_parallel.modules.initial import Fill, Init, Uniform

A, B = "_lora_a", "_lora_b"
"""What the names of the factors add to that of their matrix's owner, whose neighbours they are."""

_FACTOR = re.compile(rf"(.+)({A}|{B})\.weight")


@dataclass(frozen=True)
class LowRank:
    """Which matrices get adapters, and of what rank.

    Attributes:
        targets: last words of module names (`("query", "value")`), or one regular expression for whole names.
        rank: r. alpha: adapters count alpha / r.
    """

    targets: str | Sequence[str]
    rank: int = 8
    alpha: float = 16.0


class Factor(nn.Module):
    """A or B: one parameter, and how it starts."""

    def __init__(self, shape: Sequence[int], init: Init, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))
        self.init = init

    def initial(self) -> dict[str, Init]:
        """As the modules of this room."""
        return {"weight": self.init}


def give_factors(parent: nn.Module, word: str, rank: int, scale: float, key: str) -> None:
    """Give the matrix of `parent.word` an adapter that adds nothing yet: B is zero.

    Args:
        key: what A is drawn from when the matrix is in memory; on the meta device whoever fills the model draws it.
    """
    weight: Tensor = getattr(parent, word).weight
    a = Factor((rank, weight.shape[-1]), Uniform(weight.shape[-1] ** -0.5), weight)
    b = Factor((*weight.shape[:-1], rank), Fill(0.0), weight)
    for suffix, factor in ((A, a), (B, b)):
        if not weight.is_meta:
            shape = tuple(factor.weight.shape)
            with torch.no_grad():
                factor.init.fill(factor.weight, Box.whole(shape), shape, f"{key}{suffix}.weight")
        parent.add_module(word + suffix, factor)
    parent.adapted = {**getattr(parent, "adapted", {}), word: scale}  # type: ignore[assignment]


def matrix_of(name: str) -> str | None:
    """Of a factor's parameter name: that of its matrix; None for other parameters."""
    found = _FACTOR.fullmatch(name)
    return None if found is None else f"{found[1]}.weight"


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return _FACTOR.fullmatch(name) is not None


def factor_placement(name: str, placement: Placement, dimensions: int) -> Placement:
    """Where a factor is cut, from where its matrix of so many dimensions is."""
    along_input = isinstance(placement, Shard) and placement.dim == dimensions - 1
    if name.endswith(f"{A}.weight"):
        return Shard(1) if along_input else Replicate()
    return Replicate() if along_input else placement


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, `model` has the parameters and names that it had before adapters: for readers and writers of those."""
    taken: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
    for module in list(model.modules()):
        if any(isinstance(child, Factor) for child in module._modules.values()):
            taken.append((module, dict(module._modules)))
            for name in [name for name, child in module._modules.items() if isinstance(child, Factor)]:
                del module._modules[name]
    try:
        yield
    finally:
        for module, children in taken:
            module._modules.clear()
            module._modules.update(children)
