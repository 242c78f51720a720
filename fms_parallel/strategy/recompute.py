"""Activation recomputation: run a block's forward again in the backward pass instead of keeping what it made.

Policies (`layout.recompute`): `full` every block, `every=N` each N-th, `selective` every block but keeping the results
of matrix products and attention, which cost most to make again (arXiv 2205.05198). The block's `forward` is wrapped on
the instance, so no name changes and FSDP's hooks stay outside: parameters are there before the block runs again.

`budget=0.5` wraps nothing: `_compile` in compose hands it to the compiler, which chooses what a block keeps between all
that it would keep anyway (1) and what enters the block (0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.schedules import find_schedule
from fms_parallel.strategy.base import Strategy, repeated_blocks
from fms_parallel.strategy.replay import replayed

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Operators whose results the selective policy keeps."""


class RecomputeStrategy(Strategy):
    """Wrap the repeated blocks that the layout's policy names."""

    def __init__(self, layout: ParallelLayout) -> None:
        self.interval, self.selective = layout.recompute_interval, layout.recompute == "selective"
        self.in_parts = layout.pp > 1 and find_schedule(layout.schedule).splits_backward

    def distribute(self, model: nn.Module) -> nn.Module:
        """Wrap in place."""
        if self.interval:
            for name, block in repeated_blocks(model):
                if int(name.rpartition(".")[2]) % self.interval == 0:
                    wrapped = replayed(block.forward) if self.in_parts else _recomputed(block.forward, self.selective)
                    block.forward = wrapped  # type: ignore[method-assign]
        return model


def refuse_budget_without_compile(layout: ParallelLayout, compile_blocks: bool) -> None:
    """Raises LayoutError for a budget that nobody would keep; call it before a process group starts."""
    if layout.recompute_budget is not None and not compile_blocks:
        raise LayoutError(
            f"recompute={layout.recompute}: the compiler keeps the budget; add --compile (compile_blocks=True), or use "
            "recompute=selective."
        )


def _recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # No random state is kept: dropout is a function of the token, not of a generator.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return run


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
