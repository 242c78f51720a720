"""Rotary positions: frequencies of every published scaling, tables for given positions, and the rotation itself.

Convention: *half-split* pairs (i, i + R/2), as in Hugging Face checkpoints; Meta checkpoints interleave and are
permuted by their adapter. Nothing is stored in buffers: tables are computed from the config for the positions at
hand, so a model built on the meta device has nothing to forget. RoFormer: arXiv 2104.09864.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.modules.first_order import first_order

Frequencies = tuple[Tensor, float]
"""Inverse frequencies `[R/2]` in radians per position, and the factor that cos and sin are multiplied by."""


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of one model.

    Attributes:
        head_width: D. base: theta. partial: fraction of D that is rotated.
        original_length: positions the unscaled model was made for.
        kind: one of `SCALINGS`. options: the numbers that kind needs, named as in a Hugging Face config.
    """

    head_width: int
    base: float = 10000.0
    partial: float = 1.0
    original_length: int = 4096
    kind: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ConfigError(unknown("rope scaling", self.kind, SCALINGS))
        if self.width % 2:
            raise ConfigError(f"rotary positions need an even number of rotated features, got {self.width}.")
        if self.kind in ("ntk", "dynamic") and self.width <= 2:
            raise ConfigError(f"rope scaling {self.kind!r} needs more than 2 rotated features, got {self.width}.")
        required, optional = _OPTIONS[self.kind]
        if missing := sorted(set(required) - set(self.options)):
            raise ConfigError(f"rope scaling {self.kind!r} needs {', '.join(missing)}.")
        for name in self.options:
            if name not in (*required, *optional):
                raise ConfigError(unknown(f"option of rope scaling {self.kind!r}", name, (*required, *optional)))

    @property
    def width(self) -> int:
        """R: features that are rotated, the first of the D."""
        return int(self.head_width * self.partial)

    def tables(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for these positions.

        Args:
            positions: `[S]` or `[B, S]`, integers.
            length: the largest position plus one (the scalings that depend on it must not wait for the device).
        Returns:
            two tensors `[..., S, R/2]`, fp32.
        """
        inverse, factor = SCALINGS[self.kind](self, length)
        angles = positions.to(torch.float32).unsqueeze(-1) * inverse.to(positions.device)
        if factor == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * factor, angles.sin() * factor


# ---- frequencies of each scaling --------------------------------------------------------------------------------


def _inverse(base: float, width: int) -> Tensor:
    """base ** (-2i / R) for i in 0..R/2, in fp32 as every published checkpoint was trained with."""
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width))


def _default(rope: Rotary, length: int) -> Frequencies:
    return _inverse(rope.base, rope.width), 1.0


def _linear(rope: Rotary, length: int) -> Frequencies:
    """Position interpolation (arXiv 2306.15595)."""
    return _inverse(rope.base, rope.width) / rope.options["factor"], 1.0


def _raised_base(rope: Rotary, alpha: float) -> Tensor:
    return _inverse(rope.base * alpha ** (rope.width / (rope.width - 2)), rope.width)


def _ntk(rope: Rotary, length: int) -> Frequencies:
    """NTK-aware: alpha is the next power of two of length / original length, so few tables exist."""
    ratio = length / rope.original_length
    return _raised_base(rope, 2.0 ** math.ceil(math.log2(ratio)) if ratio > 1 else 1.0), 1.0


def _dynamic(rope: Rotary, length: int) -> Frequencies:
    """Dynamic NTK as in transformers: alpha grows with the length beyond the original."""
    factor = rope.options["factor"]
    length = max(length, rope.original_length)
    return _raised_base(rope, factor * length / rope.original_length - (factor - 1)), 1.0


def _llama3(rope: Rotary, length: int) -> Frequencies:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    options = rope.options
    original = options["original_max_position_embeddings"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    inverse = _inverse(rope.base, rope.width)
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / options["factor"] + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / options["factor"], inverse)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled), 1.0


def _yarn(rope: Rotary, length: int) -> Frequencies:
    """YaRN (arXiv 2309.00071): interpolate below a frequency ramp, extrapolate above it, sharpen attention."""
    options, width = rope.options, rope.width
    original = options.get("original_max_position_embeddings") or rope.original_length
    factor = options["factor"]

    def feature(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = feature(options.get("beta_fast") or 32), feature(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    inverse = _inverse(rope.base, width)
    return inverse / factor * (1 - keep) + inverse * keep, _yarn_factor(options, factor)


def _yarn_factor(options: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    if options.get("mscale") and options.get("mscale_all_dim"):
        return scale(options["mscale"]) / scale(options["mscale_all_dim"])
    return scale(1.0)


SCALINGS: dict[str, Callable[[Rotary, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}

_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # kind -> (required, optional)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "ntk": ((), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
    ),
}


# ---- the rotation -----------------------------------------------------------------------------------------------


class _Rotate(torch.autograd.Function):
    """A rotation's adjoint is the rotation back: nothing but the tables is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if rest.shape[-1]:
        out[..., 2 * half :] = rest
    return out


def _rotated_whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for R = D, in few operations and one more copy of x: for few tokens."""
    half = cos.shape[-1]
    return (x * torch.cat((cos, cos), -1)).addcmul_(x.roll(half, -1), torch.cat((-sin, sin), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features of every head.

    Args:
        x: `[B, S, H, D]`. cos, sin: `[S, R/2]` or `[B, S, R/2]`.
    """
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in (cos, sin))
    if torch.compiler.is_compiling():  # in-place writes to slices would cost the compiler its fusion
        half = cos.shape[-1]
        first, second = x[..., :half], x[..., half : 2 * half]
        pieces = [first * cos - second * sin, second * cos + first * sin]
        if x.shape[-1] > 2 * half:  # an empty slice would cost nothing to keep, and keep all of x
            pieces.append(x[..., 2 * half :])
        return torch.cat(pieces, dim=-1)
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)
    if x.shape[1] == 1 and x.shape[-1] == 2 * cos.shape[-1]:
        return _rotated_whole(x, cos, sin)
    return _rotated(x, cos, sin)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of queries `[B, S, H, D]` and keys `[B, S, K, D]`."""
    if q.shape[1] > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return rotate(q, cos, sin), rotate(k, cos, sin)
    # One token: there is nothing to compute, so the number of operations is what it costs.
    both = rotate(torch.cat((q, k), 2), cos, sin)
    return both[:, :, : q.shape[2]], both[:, :, q.shape[2] :]
