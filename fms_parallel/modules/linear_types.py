"""Linear types: other forms in which a model's matrices are stored and multiplied, by name.

    weight [..., N, E]  ->  weight (same shape, the type's dtype)  and  weight_scale [..., N], one number per output

The scale of an output is cut as the outputs are; a matrix cut along its input has the scale of its whole rows on every
rank. That rule is all that tensor-parallel twins, checkpoints and `quantise` need to know of a type, so a new one is a
class and a call of `register_linear_type`. Such weights are for reading only: they take no gradient.

A module that multiplies says so by being a `Multiplies`; one whose own parameters are stacks of matrices, `[X, N, E]`,
names them in `stacks`, and finds in `stack_types` how each is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fms_parallel import compat
from fms_parallel.errors import ConfigError, TrainingError, unknown
from fms_parallel.modules.linear import Bias, Multiplies

SCALE = "_scale"
"""What the name of a scale adds to that of its weight."""


class LinearType(ABC):
    """One way of storing a matrix. `name` is the word that users write."""

    name: str

    @abstractmethod
    def scale(self, largest: Tensor) -> Tensor:
        """Scale of each output from the largest absolute value of its row, both `[..., N]`; fp32."""

    @abstractmethod
    def values(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What is stored of `weight [..., N, E]`, in the type's dtype and the same shape."""

    @abstractmethod
    def dense(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix that the stored numbers stand for."""

    @abstractmethod
    def multiply(self, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """`x [T, E]` times `values [N, E]` -> `[T, N]`, without recording gradients."""

    def weight(self, values: Tensor, scale: Tensor) -> Quantised:
        """A matrix in this form; dimensions before the last are one."""
        return Quantised(self, values.flatten(0, -2), scale.flatten())


@dataclass(frozen=True)
class Quantised:
    """A matrix `[N, E]` as stored values and scales (a `modules.linear.StoredWeight`)."""

    type: LinearType
    values: Tensor
    scale: Tensor

    def multiply(self, x: Tensor, bias: Bias) -> Tensor:
        """`x [..., E]` -> `[..., N]`. Raises TrainingError in the backward pass."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _ReadOnly.apply(x, self)
        else:
            y = self.product(x)
        return y if bias is None else y + bias

    def product(self, x: Tensor) -> Tensor:
        """`x [..., E]` -> `[..., N]`, for an x that needs no gradient."""
        y = self.type.multiply(x.reshape(-1, x.shape[-1]), self.values, self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The plain matrix, `[N, E]`."""
        return self.type.dense(self.values, self.scale, dtype)


class _ReadOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised) -> Tensor:
        ctx.name = weight.type.name
        return weight.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise TrainingError(_refusal(ctx.name))


def _refusal(name: str) -> str:
    return f"{name} weights are rounded and take no gradient: train without linear_type, quantise afterwards."


# ---- int8 -------------------------------------------------------------------------------------------------------


class Int8(LinearType):
    """Weight-only int8, symmetric: w ~ scale * q, q in -127 .. 127, scale = largest |w| of the row / 127.

    A scale is rounded up to a bf16 number before the values are, so that a model may be cast to bf16 and back without
    moving any weight. The error of a weight is at most scale / 2.
    """

    name = "int8"
    FEW_ROWS = 8
    """Up to so many rows in bf16 torch's own kernel is the fastest; with more, or in fp32, rounding back in pieces."""
    PIECE = 1 << 19
    """Weights made plain at a time: they stay in the processor's cache."""

    def scale(self, largest: Tensor) -> Tensor:
        exact = largest.float().div(127.0)
        near = exact.to(torch.bfloat16)
        above = (near.view(torch.int16) + 1).view(torch.bfloat16)  # the next number up
        up = torch.where(near.float() < exact, above, near).float()
        return up.where(up > 0, 1.0)  # a row of zeros: any scale gives zeros

    def values(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.float().div(scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)

    def dense(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return values.to(wide).mul_(scale.to(wide).unsqueeze(-1)).to(dtype)

    def multiply(self, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        if x.shape[0] <= self.FEW_ROWS and compat.has_int8_linear(x, values):
            return compat.int8_linear(x, values, scale.to(x.dtype))  # exact: see `scale`
        return multiply_in_pieces(x, values, self.PIECE).mul_(scale.to(x.dtype))


def multiply_in_pieces(x: Tensor, values: Tensor, elements: int) -> Tensor:
    """`x [T, E] @ values.T` in the dtype of `x`, casting so many elements of `values [N, E]` at a time."""
    rows = max(1, elements // max(1, values.shape[1]))
    if rows >= values.shape[0] or x.device.type != "cpu":
        return F.linear(x, values.to(x.dtype))
    out = x.new_empty(x.shape[0], values.shape[0])
    for start in range(0, values.shape[0], rows):
        torch.mm(x, values[start : start + rows].to(x.dtype).t(), out=out[:, start : start + rows])
    return out


# ---- the register -----------------------------------------------------------------------------------------------

_TYPES: dict[str, LinearType] = {}


def register_linear_type(kind: LinearType) -> None:
    """Make a linear type known under its name; a second registration of a name is an error."""
    if kind.name in _TYPES:
        raise ConfigError(f"linear type {kind.name!r} is registered already.")
    _TYPES[kind.name] = kind


def get_linear_type(name: str) -> LinearType:
    """The linear type of this name. Raises ConfigError on an unknown one, with those that are known."""
    if name not in _TYPES:
        raise ConfigError(unknown("linear type", name, _TYPES))
    return _TYPES[name]


def list_linear_types() -> list[str]:
    """Names of the registered linear types, sorted."""
    return sorted(_TYPES)


register_linear_type(Int8())


# ---- models -----------------------------------------------------------------------------------------------------


def quantise(model: nn.Module, linear_type: str, skip: tuple[str, ...] = ()) -> nn.Module:
    """Store the matrices of a model's attentions, feed-forwards, experts and head as `linear_type`; in place, one at a
    time.

    Works on native modules and twins, in memory or on the meta device. A head that is the embedding gets a matrix of
    its own; embeddings, norms, biases and the routers of experts stay as they are.

    Args:
        skip: names of modules, or of experts' stacks, whose matrices stay too: a whole name or a part between dots
            (`head`, `down`, `layers.0`).
    Raises:
        ConfigError: an unknown type, a name in `skip` that fits nothing, fp16 weights (whose range is too small for
            the scales), a model that is quantised already, or one without such matrices.
    """
    kind, owners = get_linear_type(linear_type), {name: (owner, stored) for name, owner, stored in _owners(model)}
    if not owners:
        raise ConfigError(f"{type(model).__name__} has no matrices that can be stored as {linear_type}.")
    for word in skip:
        if not any(_names(word, name) for name in owners):
            raise ConfigError(unknown("module in skip", word, {part for name in owners for part in name.split(".")}))
    chosen = {name: m for name, m in owners.items() if not any(_names(word, name) for word in skip)}
    for name, (owner, stored) in chosen.items():
        if hasattr(owner, stored + SCALE):
            raise ConfigError(f"{name} is stored in another form already: quantise a model once.")
        if owner.get_parameter(stored).dtype == torch.float16:
            raise ConfigError(f"{name} is fp16, whose range is too small for scales: load the model in fp32 or bf16.")
    with torch.no_grad():
        for owner, stored in chosen.values():
            _store(owner, stored, kind)
    return model


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, LinearType]]:
    """(name, type) of every parameter of `model` that is stored in another form; its scale is `name + SCALE`."""
    for name, module in model.named_modules():
        kinds = {"weight": getattr(module, "linear_type", None), **getattr(module, "stack_types", {})}
        yield from ((f"{name}.{stored}".lstrip("."), kind) for stored, kind in kinds.items() if kind is not None)


def refuse_quantised(model: nn.Module) -> None:
    """Raise TrainingError when a weight of the model takes no gradient because of its linear type."""
    for _, kind in stored_parameters(model):
        raise TrainingError(_refusal(kind.name))


def scale_placement(placement: Placement, dims: int) -> Placement:
    """Where the scale of a weight of so many dimensions is cut: as its outputs; whole when its input is cut."""
    return Replicate() if isinstance(placement, Shard) and placement.dim == dims - 1 else placement


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, owner, owner's parameter) of every matrix of a `Multiplies`, and of every stack of matrices, once each."""
    for prefix, module in model.named_modules():
        if isinstance(module, Multiplies):
            for names in module.groups().values():
                for name in names:
                    full = f"{prefix}.{name}" if prefix and name else prefix or name
                    yield full, module.get_submodule(name), "weight"
        for name in getattr(module, "stacks", ()):
            yield f"{prefix}.{name}".lstrip("."), module, name


def _names(word: str, full: str) -> bool:
    return f".{word}." in f".{full}."


def _store(owner: nn.Module, name: str, kind: LinearType) -> None:
    """Replace the parameter `name` of `owner`."""
    weight = owner.get_parameter(name)
    plain = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    largest = plain.abs().amax(-1) if plain.shape[-1] else plain.new_zeros(plain.shape[:-1])
    if isinstance(weight, DTensor):
        for dim, placement in enumerate(weight.placements):
            if isinstance(placement, Shard) and placement.dim == weight.ndim - 1 and not largest.is_meta:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=weight.device_mesh.get_group(dim))
    scale = kind.scale(largest)
    setattr(owner, name, nn.Parameter(_like(weight, kind.values(plain, scale), weight.ndim), requires_grad=False))
    owner.register_parameter(name + SCALE, nn.Parameter(_like(weight, scale, weight.ndim - 1), requires_grad=False))
    if name == "weight":
        owner.linear_type = kind  # type: ignore[assignment]
    else:
        owner.stack_types = {**getattr(owner, "stack_types", {}), name: kind}  # type: ignore[assignment]


def _like(weight: Tensor, local: Tensor, dims: int) -> Tensor:
    """`local` as a DTensor cut like `weight`, of its first `dims` dimensions; itself for a plain weight."""
    if not isinstance(weight, DTensor):
        return local
    cuts = weight.placements if dims == weight.ndim else [scale_placement(p, weight.ndim) for p in weight.placements]
    shape = weight.shape[:dims]
    stride = tuple(torch.empty(shape, device="meta").stride())
    return DTensor.from_local(local, weight.device_mesh, cuts, run_check=False, shape=shape, stride=stride)
