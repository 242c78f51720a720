from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.modules.feedforward import ACTIVATIONS, FeedForward, gate

E = 8


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


ORACLES = {
    "silu": lambda x: x * torch.sigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu": exact_gelu,
    "gelu_python": exact_gelu,
    "gelu_10": lambda x: exact_gelu(x).clamp(-10, 10),
    "gelu_tanh": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_python_tanh": tanh_gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_accurate": tanh_gelu,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "laplace": lambda x: 0.5 * torch.erfc((0.707107 - x) / (2**0.5 * 0.282095)),
    "linear": lambda x: x,
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "sqrtsoftplus": lambda x: torch.log1p(torch.exp(x)).sqrt(),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
}


def build(**options: object) -> FeedForward:
    block = FeedForward(E, 7, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block.double()


def naive(block: FeedForward, x: Tensor) -> Tensor:
    hidden = (
        ORACLES[block.activation](block.gate(x)) * block.up(x)
        if block.gated
        else ORACLES[block.activation](block.up(x))
    )
    return block.down(hidden)


def test_every_activation_has_an_oracle() -> None:
    assert ORACLES.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_block_and_gradients_equal_formula(activation: str, gated: bool, bias: bool) -> None:
    block = build(activation=activation, gated=gated, bias=bias)
    x = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    got, want = block(x), naive(block, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    for g, w in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_fused_equals_separate(bias: bool, activation: str) -> None:
    separate = build(activation=activation, bias=bias)
    fused = build(activation=activation, bias=bias, fused=True)
    with torch.no_grad():
        fused.gate_up.weight.copy_(torch.stack([separate.gate.weight, separate.up.weight]))
        fused.down.load_state_dict(separate.down.state_dict())
        if bias:
            fused.gate_up.bias.copy_(  # type: ignore[union-attr]
                torch.stack([separate.gate.bias, separate.up.bias])
            )
    x = torch.randn(2, 3, E, dtype=torch.float64)
    torch.testing.assert_close(fused(x), separate(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gate_derivatives_by_finite_differences(activation: str) -> None:
    g, u = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda g, u: gate(g, u, activation), (g, u))


def test_gate_keeps_two_tensors_for_the_backward_pass() -> None:
    """Autograd of the formula keeps three."""
    g, u = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gate(g, u, "silu")
    assert len(kept) == 2


def test_gate_leaves_its_inputs_as_they_are() -> None:
    g, u = torch.randn(3, 5), torch.randn(3, 5)
    before = g.clone(), u.clone()
    torch.testing.assert_close(gate(g, u, "silu"), F.silu(g) * u)
    assert torch.equal(g, before[0]) and torch.equal(u, before[1])


def test_an_impossible_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown activation 'sillu'\. Did you mean 'silu'\?"):
        FeedForward(E, 7, "sillu")
    with pytest.raises(ConfigError, match="need a gate"):
        FeedForward(E, 7, gated=False, fused=True)
