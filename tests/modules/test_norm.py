from __future__ import annotations

from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fms_parallel.errors import ConfigError
from fms_parallel.modules.norm import LayerNorm, RMSNorm, rms_norm
from tests.gradient import grad

N = TypeVar("N", bound=nn.Module)


def filled(norm: N, dtype: torch.dtype = torch.float64) -> N:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm.to(dtype)


@pytest.mark.parametrize("width", [1, 7, 16])
def test_rms_norm_equals_torch(width: int) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    norm = filled(RMSNorm(width, eps=1e-3))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (width,), norm.weight, 1e-3), rtol=1e-13, atol=1e-13)


def test_rms_norm_equals_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(2, 3, 16)
    norm, theirs = filled(RMSNorm(16, eps=1e-5), torch.float32), llama.LlamaRMSNorm(16, eps=1e-5)
    theirs.weight = norm.weight
    torch.testing.assert_close(norm(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    """Of bf16 input only the result is rounded: mean(x^2) of equal elements is exact, whatever their number."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(2, 300, dtype=torch.bfloat16)
    norm, theirs = filled(RMSNorm(300), torch.bfloat16), llama.LlamaRMSNorm(300, eps=1e-5)
    theirs.weight = norm.weight
    assert torch.equal(norm(x), theirs(x))


def test_rms_norm_gradients_by_finite_differences() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    # As attention calls it: on heads, of a tensor that is not contiguous.
    torch.autograd.gradcheck(lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-3), (x, weight))


def test_rms_norm_of_zeros_is_zero_with_finite_gradients() -> None:
    x, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    y = rms_norm(x, weight, 1e-5)
    y.sum().backward()
    assert not y.any() and grad(x).isfinite().all() and not grad(weight).any()


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ConfigError, match="second derivatives"):
        torch.autograd.grad(rms_norm(x, torch.ones(4), 1e-5).sum(), x, create_graph=True)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_torch(bias: bool) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    norm, theirs = filled(LayerNorm(8, eps=1e-3, bias=bias)), nn.LayerNorm(8, eps=1e-3, bias=bias).double()
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))


def test_norms_follow_the_dtype_of_their_input() -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert filled(RMSNorm(8), torch.float32)(x).dtype == filled(LayerNorm(8), torch.float32)(x).dtype == torch.bfloat16
