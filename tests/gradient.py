"""The gradient of a tensor, for tests: there, or the test fails."""

from __future__ import annotations

from torch import Tensor


def grad(tensor: Tensor | None) -> Tensor:
    """`.grad` that is not None."""
    assert tensor is not None and tensor.grad is not None
    return tensor.grad
