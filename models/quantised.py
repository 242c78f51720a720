"""How `get_model` fills a model whose matrices are stored in another form than its checkpoint's.

It knows linear types and lazy tensors; it knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fms_parallel.checkpoint.lazy import LazyTensor
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.checkpoint.quantised import Drawn, rounded
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.linear_types import get_linear_type, quantise
from fms_parallel.strategy.materialise import initial_values
from fms_parallel.strategy.ties import tied_names


def check_linear_type(name: str | None, skip: tuple[str, ...], layout: ParallelLayout, own_fill: bool) -> None:
    """Raise ConfigError or LayoutError when weights cannot be stored so."""
    if name is None:
        if skip:
            raise ConfigError(f"linear_skip={skip} without linear_type has nothing to skip.")
        return
    get_linear_type(name)
    if layout.gradient_ranks > 1:
        raise LayoutError(
            f"layout {str(layout)!r}: {name} weights take no gradients, which dp, fsdp and cp are there for; use tp, "
            "pp, or a copy of the model for each replica."
        )
    if own_fill:
        raise ConfigError(
            f"linear_type={name!r} with fill: what fill writes would not be rounded. Build the model without "
            "linear_type, then quantise(model, ...)."
        )


def quantised_filler(
    model: nn.Module, name: str, skip: tuple[str, ...], tensors: Mapping[str, LazyTensor], source: str
) -> Callable[[nn.Module], None]:
    """Quantise a model on the meta device, and return what fills it from plain tensors under its own names."""
    ties = tied_names(model)
    quantise(model, name, skip)
    return lambda filled: load_weights(filled, rounded(filled, tensors, ties), source=source)


def drawn_tensors(model: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The initial weights of `seed`, not yet drawn."""
    return {
        name: Drawn(init, parameter.shape, dtype, f"{seed}/{name}") for name, parameter, init in initial_values(model)
    }
