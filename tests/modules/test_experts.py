"""Experts against the formula written out token by token, and the two ways of computing them against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.modules.experts import Experts


def experts(count: int = 5, top: int = 2, activation: str = "silu") -> Experts:
    module = Experts(6, 7, count, top, activation).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def by_hand(module: Experts, x: Tensor) -> Tensor:
    """One token after the other."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        chances = (module.router @ token).softmax(0)
        best = chances.argsort(descending=True)[: module.top]
        total = chances[best].sum()
        rows.append(
            sum(
                chances[e] / total * (module.down[e] @ (F.silu(module.gate[e] @ token) * (module.up[e] @ token)))
                for e in best
            )
        )
    return torch.stack(rows).view(x.shape)  # type: ignore[arg-type]


def gradients(module: Experts, y: Tensor, x: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad((y * weight).sum(), [x, *module.parameters()]))


@pytest.mark.parametrize(("count", "top"), [(5, 2), (4, 1), (3, 3), (40, 2)])
def test_values_and_gradients_are_those_of_the_formula(count: int, top: int) -> None:
    module = experts(count, top)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    found, expected = module(x), by_hand(module, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(module, found, x), gradients(module, expected, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_every_expert_on_every_token_gives_the_same(activation: str) -> None:
    module = experts(activation=activation)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    one, other = (mix(x, *module.route(x)) for mix in (module.mix_sorted, module.mix_dense))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(module, one, x), gradients(module, other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_an_expert_nobody_chose_has_a_gradient_of_zero() -> None:
    module = experts(count=3, top=1)
    with torch.no_grad():
        module.router.zero_()
        module.router[1] = 1.0
    x = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    grads = dict(zip(["x", *dict(module.named_parameters())], gradients(module, module(x), x), strict=True))
    assert not grads["gate"][0].any() and not grads["down"][2].any()
    assert grads["up"][1].any()


def test_bf16_input_gives_bf16_and_fp32_routing() -> None:
    module, x = experts().float(), torch.randn(3, 6)
    low = module(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), rtol=0.1, atol=0.5)


def test_compiled_forward_has_no_graph_break() -> None:
    module, x = experts().float(), torch.randn(3, 6)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot visit 3 of 2"):
        Experts(4, 4, 2, 3)
    with pytest.raises(ConfigError, match="'wiggle'"):
        Experts(4, 4, 2, 1, "wiggle")
