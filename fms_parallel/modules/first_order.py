"""For hand-written backward passes that can be differentiated once only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from fms_parallel.errors import ConfigError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse `create_graph=True`.

    torch's own `once_differentiable` lets it pass when the incoming gradient is a constant, and second derivatives then
    lose this function's part without a word.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise ConfigError("second derivatives (create_graph=True) are not implemented by fms_parallel's modules.")
        return backward(ctx, *grads)

    return checked
