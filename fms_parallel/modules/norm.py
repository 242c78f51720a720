"""Norms over the model width, and their twins.

A norm's matrices are nobody's to cut: the twin exists because under sequence parallelism each rank normalises its own
tokens, so the weight's gradient is a partial sum over the axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate

from fms_parallel.modules.first_order import first_order
from fms_parallel.modules.initial import Fill, Init
from fms_parallel.modules.tp import TPModule


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), computed in fp32 for lower precisions."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        return {"weight": Fill(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` -> `[..., E]`."""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class TPRMSNorm(TPModule, RMSNorm):
    """Every rank holds the weight; with sp its gradient is summed over the axis."""

    def placements(self) -> dict[str, Placement]:
        return {"weight": Replicate()}

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.whole(self.weight, x), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def initial(self) -> dict[str, Init]:
        """How own parameters start."""
        return {"weight": Fill(1.0), "bias": Fill(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` -> `[..., E]`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (self.width,), self.weight.to(x.dtype), bias, self.eps)


class TPLayerNorm(TPModule, LayerNorm):
    """Every rank holds weight and bias; with sp their gradients are summed over the axis."""

    def placements(self) -> dict[str, Placement]:
        return {"weight": Replicate(), "bias": Replicate()}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.whole(self.bias, x)
        return F.layer_norm(x, (self.width,), self.whole(self.weight, x), bias, self.eps)


# ---- the computation --------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """Four passes over the activations in the backward pass, where autograd of the formula takes about twelve.

    With r = 1/sqrt(mean(x^2) + eps):  dx = r (g w) - x r^3 mean(g w x),  dw = sum over tokens of r g x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        g, wide, w = grad.to(scale.dtype), x.to(scale.dtype), weight.to(scale.dtype)
        both = (g * wide).flatten(0, -2)  # [T, E]
        d_weight = scale.flatten() @ both
        mean = (both @ w).view(scale.shape).mul_(scale.pow(3)).div_(x.shape[-1])
        d_x = (g * w).mul_(scale).addcmul_(wide, mean, value=-1)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and the factor `[..., 1]` of each token."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[..., E]` normalised over the last dimension. On a GPU torch's fused kernel does it."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    if not torch.is_grad_enabled():  # entering a Function costs a decoding step more than the norm itself
        return _normalised(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)
