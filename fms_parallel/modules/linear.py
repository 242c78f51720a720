"""Matrix products: several matrices that read the same input as one operation, and the modules that own them.

Query, key and value (or gate and up) each multiply the same tokens. Done apart, autograd adds their input gradients
in extra passes over `[T, E]`; done here the second and third product accumulate into the first. That is what a fused
weight is wanted for, without storing one: each matrix keeps its own name, its own shard and its own checkpoint key.

A module that multiplies says which of its children form a group (`Multiplies`). Everything that replaces a plain
product asks it for that group: a weight stored in another form (`modules/linear_types.py`), and a copy laid out for
decoding (`inference/weights.py`). This page knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms_parallel.distributed.collectives import TokenRun
from fms_parallel.modules.first_order import first_order
from fms_parallel.modules.low_rank import A, B

Bias = Tensor | None


class StoredWeight(Protocol):
    """A matrix `[N, E]` that is not stored as plain numbers."""

    @property
    def values(self) -> Tensor:
        """What is stored for each of its numbers, `[N, E]`."""
        ...

    def multiply(self, x: Tensor, bias: Bias) -> Tensor:
        """`x [..., E]` -> `[..., N]`; its gradient may be refused."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The plain numbers, `[N, E]`."""
        ...


Weight = Tensor | StoredWeight

Input = Tensor | TokenRun
"""What is multiplied: tokens, or under sequence parallelism a run of them, which is gathered first."""

Product = Callable[[Tensor], tuple[Tensor, ...]]
"""`x [..., E]` -> one `[..., N_i]` for each matrix of a group."""


class Matrices(NamedTuple):
    """A group of matrices that read one input, and their biases."""

    weights: tuple[Weight, ...]
    biases: tuple[Bias, ...]


class Multiplies(nn.Module):
    """A module that multiplies by groups of matrices.

    Attributes:
        fast: group -> what multiplies in its place while no gradient is recorded; never part of the module's state.
        bias_after: groups whose bias is not theirs to add: the module adds it after a sum over ranks.
        adapted: owners whose matrices have adapters (`modules/low_rank.py`) -> what those are scaled by.
    """

    fast: Mapping[str, Product] = MappingProxyType({})
    adapted: Mapping[str, float] = MappingProxyType({})
    bias_after: frozenset[str] = frozenset()

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> names of the children that own its matrices (`""`: this module itself), in the order of results."""
        raise NotImplementedError(f"{type(self).__name__} must name its groups of matrices")

    def piece(self, owner: str, parameter: Tensor, like: Tensor) -> Tensor:
        """The part of a parameter of `owner` that is used here, in the dtype of `like`."""
        return parameter.to(like.dtype)

    def factor(self, parameter: Tensor, like: Tensor) -> Tensor:
        """An adapter's factor that no piece of its matrix's rows is taken of, in the dtype of `like`."""
        return parameter.to(like.dtype)

    def matrices(self, group: str, like: Tensor) -> Matrices:
        """The matrices of a group as held here, in the dtype of `like`."""
        biased = group not in self.bias_after
        held = [self._held(name, like, biased) for name in self.groups()[group]]
        return Matrices(tuple(weight for weight, _ in held), tuple(bias for _, bias in held))

    def _held(self, name: str, like: Tensor, biased: bool) -> tuple[Weight, Bias]:
        owner: Any = getattr(self, name) if name else self
        take = partial(self.piece, name)
        bias = take(owner.bias, like).flatten() if biased and owner.bias is not None else None
        kind = getattr(owner, "linear_type", None)
        if kind is None:
            return take(owner.weight, like).flatten(0, -2), bias
        # Pieces of what is stored, in its own dtype: like itself.
        return kind.weight(take(owner.weight, owner.weight), take(owner.weight_scale, owner.weight_scale)), bias

    def multiply(self, group: str, x: Input) -> tuple[Tensor, ...]:
        """`x [..., E]` times each matrix of a group -> one `[..., N_i]` each."""
        if self.adapted:
            return self._multiply_adapted(group, x)
        fast = self.fast.get(group)
        if fast is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return fast(x)  # type: ignore[arg-type]  # runs are only read while gradients are recorded
        return shared_linear(x, *self.matrices(group, x.run if isinstance(x, TokenRun) else x))

    def _multiply_adapted(self, group: str, x: Input) -> tuple[Tensor, ...]:
        """The first factors multiply what the matrices do; the second ones add to what those gave."""
        like = x.run if isinstance(x, TokenRun) else x
        owners, held = self.groups()[group], self.matrices(group, like)
        adapted = [owner for owner in owners if owner in self.adapted]
        firsts = [self.factor(getattr(self, owner + A).weight, like) for owner in adapted]
        given = shared_linear(x, (*held.weights, *firsts), (*held.biases, *[None] * len(firsts)))
        found, inner = list(given[: len(owners)]), dict(zip(adapted, given[len(owners) :], strict=True))
        for place, owner in enumerate(owners):
            if owner in inner:
                # Where the group's results are partial sums, B is whole and each rank uses it on its part of the sum.
                take = self.factor if group in self.bias_after else partial(self.piece, owner)
                second = take(getattr(self, owner + B).weight, like).flatten(0, -2)
                found[place] = found[place] + F.linear(inner[owner], second) * self.adapted[owner]
        return tuple(found)


def shared_linear(x: Input, weights: Sequence[Weight], biases: Sequence[Bias]) -> tuple[Tensor, ...]:
    """`x [..., E]` times each `weight [N_i, E]` (plus `bias [N_i]`) -> one `[..., N_i]` each."""
    plain = [w for w in weights if isinstance(w, Tensor)]
    if isinstance(x, TokenRun):
        if len(plain) == len(weights):
            given = tuple(b is not None for b in biases)
            return _GatheredInput.apply(x.run, x, given, *plain, *(b for b in biases if b is not None))
        x = x.whole()
    if len(plain) < len(weights):
        return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    if len(plain) == 1:  # nothing to share
        return (F.linear(x, plain[0], biases[0]),)
    if not torch.is_grad_enabled():  # nothing to accumulate; and torch.compile loses the thread of a Function here
        return tuple(F.linear(x, w, b) for w, b in zip(plain, biases, strict=True))
    given = tuple(b is not None for b in biases)
    return _SharedInput.apply(x, given, *plain, *(b for b in biases if b is not None))


def linear(x: Tensor, weight: Weight, bias: Bias = None) -> Tensor:
    """`x [..., E]` times one `weight [N, E]`, however it is stored."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.multiply(x, bias)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, biases: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *tensors[: len(biases)])
        ctx.biases = biases
        out = _products(x.flatten(0, -2), biases, tensors)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat = x.flatten(0, -2)
        rows = [g.reshape(flat.shape[0], g.shape[-1]) for g in grads]
        d_x = _input_gradient(rows, weights).view(x.shape) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[2:]
        d_weights = [g.t() @ flat if need else None for g, need in zip(rows, wanted, strict=False)]
        d_biases = [g.sum(0) for g, biased in zip(rows, ctx.biases, strict=True) if biased]
        return (d_x, None, *d_weights, *d_biases)


class _GatheredInput(torch.autograd.Function):
    """The same of a run of tokens: gathered here, kept as a run, and gathered again while its gradient is made."""

    @staticmethod
    def forward(
        ctx: Any, run: Tensor, source: TokenRun, biases: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(run, *tensors[: len(biases)])
        ctx.biases, ctx.axis, ctx.tokens = biases, source.axis, source.tokens
        return tuple(_products(source._replace(run=run).gathered(), biases, tensors))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run, *weights = ctx.saved_tensors
        source, wanted = TokenRun(run, ctx.axis, ctx.tokens), ctx.needs_input_grad[3:]
        arriving = source.start_gather() if any(wanted[: len(weights)]) else None
        d_x = source.scattered(_input_gradient(grads, weights)) if ctx.needs_input_grad[0] else None
        x = arriving() if arriving is not None else run
        d_weights = [g.t() @ x if need else None for g, need in zip(grads, wanted, strict=False)]
        d_biases = [g.sum(0) for g, biased in zip(grads, ctx.biases, strict=True) if biased]
        return (d_x, None, None, *d_weights, *d_biases)


def _products(x: Tensor, biases: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`x [T, E]` times each of the first tensors; the others are the biases of those that have one."""
    weights, given = tensors[: len(biases)], iter(tensors[len(biases) :])
    return [
        torch.addmm(next(given), x, w.t()) if biased else torch.mm(x, w.t())
        for w, biased in zip(weights, biases, strict=True)
    ]


def _input_gradient(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = rows[0] @ weights[0]
    for g, w in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(g, w)
    return total
