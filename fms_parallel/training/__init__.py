"""The training loop, its optimizer, schedule and metrics.

from fms_parallel.training import train
train(model, data, steps=1000, batch_size=32, lr=3e-4, output_path="runs/a")
"""

from __future__ import annotations

from typing import Any

from fms_parallel.training.options import TrainOptions

_HOMES = {"train": "loop", "Trainer": "loop", "evaluate": "validation"}
_HOMES |= {"complete_gradients": "gradients", "make_optimizer": "optimizer"}
_HOMES |= dict.fromkeys(("compute_gradients", "count_tokens", "dropout_keys", "mean_loss", "train_step"), "step")

__all__ = ["TrainOptions", *_HOMES]


def __getattr__(name: str) -> Any:
    """Names that need torch come when they are asked for: a command line reads `TrainOptions` without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
