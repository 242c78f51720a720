"""Feed-forward blocks, plain and gated, and their tensor-parallel twins.

    plain   down(act(up(x)))              gated   down(act(gate(x)) * up(x))   (GLU variants: arXiv 2002.05202)

The twin cuts F: gate and up along their output, down along its input. F need not divide by tp. Where the layout says
`tp_parts=attention`, another twin leaves it whole: each rank puts its own tokens through all of it, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.modules.first_order import first_order
from fms_parallel.modules.initial import Fill, Init, Normal
from fms_parallel.modules.linear import Input, Multiplies
from fms_parallel.modules.tp import TPModule

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _clipped_gelu(x: Tensor) -> Tensor:
    """Bounded for quantisation (arXiv 2004.09602)."""
    return F.gelu(x).clamp(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    """Distribution function of a normal with mean sqrt(1/2) and variance 1 / 4 pi (arXiv 2209.10655)."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * sqrt(2))))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _root_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_tanh": _gelu_tanh,
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), _gelu_tanh),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "linear": _linear,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _root_softplus,
    "tanh": torch.tanh,
}
"""By name, as Hugging Face configs spell them. Several spell one function: `gelu_new` and five others are the tanh
approximation (arXiv 1606.08415)."""


class FeedForward(Multiplies):
    """Two or three matrices around an activation.

    Args:
        width: E. hidden: F. activation: one of `ACTIVATIONS`. gated: with a gate matrix.
        bias: on every matrix. fused: gate and up stored as one parameter `[2, F, E]`.
        std, out_std: of the initial weights.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
        fused: bool = False,
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(unknown("activation", activation, ACTIVATIONS))
        if fused and not gated:
            raise ConfigError("fused feed-forward weights need a gate: there is only one input matrix without it.")
        self.hidden, self.activation, self.gated, self.fused = hidden, activation, gated, fused
        self.std, self.out_std = std, out_std
        if fused:
            self.gate_up = FusedGateUp(width, hidden, bias)
        else:
            if gated:
                self.gate = nn.Linear(width, hidden, bias=bias)
            self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the matrices that read x."""
        return ("gate_up",) if self.fused else ("gate", "up") if self.gated else ("up",)

    def initial(self) -> dict[str, Init]:
        """How the parameters below start."""
        weights: dict[str, Init] = {f"{name}.weight": Normal(self.std) for name in self.inputs}
        biases: dict[str, Init] = {f"{name}.bias": Fill(0.0) for name in (*self.inputs, "down")}
        return weights | biases | {"down.weight": Normal(self.out_std)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` -> `[..., E]`."""
        return self.multiply("output", self.hidden_states(x))[0]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """What reads x, and what reads the hidden features."""
        return {"input": self.inputs, "output": ("down",)}

    def hidden_states(self, x: Input) -> Tensor:
        """`[..., E]` -> what the down matrix reads, `[..., (this rank's part of) F]`."""
        projected = self.multiply("input", x)
        if self.fused:
            projected = projected[0].chunk(2, dim=-1)
        if not self.gated:
            return ACTIVATIONS[self.activation](projected[0])
        return gate(projected[0], projected[1], self.activation)


class FusedGateUp(nn.Module):
    """Gate and up in one parameter `[2, F, E]`: cutting dim 1 cuts both alike."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden, width))
        self.bias = nn.Parameter(torch.empty(2, hidden)) if bias else None


class TPFeedForward(TPModule, FeedForward):
    """Each rank holds F/tp of the hidden features."""

    bias_after = frozenset(("output",))

    def placements(self) -> dict[str, Placement]:
        cut = Shard(1) if self.fused else Shard(0)
        inputs: dict[str, Placement] = {f"{name}.{kind}": cut for name in self.inputs for kind in ("weight", "bias")}
        return inputs | {"down.weight": Shard(1), "down.bias": Replicate()}

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, E]`, or `[T/tp, E]` with sp, in the same form back."""
        hidden = self.hidden_states(self.read(x))
        return self.leave(self.multiply("output", hidden)[0], self.down.bias)

    def piece(self, owner: str, parameter: Tensor, like: Tensor) -> Tensor:
        return self.shard(parameter, like)


class WholeFeedForward(TPFeedForward):
    """Each rank holds all of it, for its own run of tokens: a token-wise region, as a norm is. Needs sp.

    Nothing is gathered and nothing scattered; instead the gradients of its parameters, partial sums over the axis, are
    summed once a step.
    """

    bias_after = frozenset()

    def placements(self) -> dict[str, Placement]:
        return dict.fromkeys(super().placements(), Replicate())

    def forward(self, x: Tensor) -> Tensor:
        """`[T/tp, E]` -> `[T/tp, E]`."""
        return FeedForward.forward(self, x)

    def piece(self, owner: str, parameter: Tensor, like: Tensor) -> Tensor:
        return self.whole(parameter, like)


TPFeedForward.uncut = WholeFeedForward


# ---- the gate ---------------------------------------------------------------------------------------------------


class _SiluGate(torch.autograd.Function):
    """silu(g) * u that keeps g and u only: autograd of the formula also keeps silu(g), F more numbers a token."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        d_g = torch.ops.aten.silu_backward(grad * u, g)
        return d_g, F.silu(g).mul_(grad)


def gate(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """act(g) * u."""
    if ACTIVATIONS[activation] is F.silu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SiluGate.apply(g, u)
    return ACTIVATIONS[activation](g) * u
