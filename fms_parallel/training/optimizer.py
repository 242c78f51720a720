"""AdamW over the local shards, and the learning rate of each step."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch
from torch import nn

from fms_parallel.errors import ConfigError
from fms_parallel.strategy.base import parallel_of
from fms_parallel.training import offload
from fms_parallel.training.options import TrainOptions


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: matrices and embeddings decay; biases, norms and other vectors do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A fused bias has two or three dimensions, so the number of dimensions alone does not tell.
            is_matrix = parameter.dim() >= 2 and not name.endswith("bias")
            (decayed if is_matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused: one pass over each local shard, where foreach over DTensors dispatches per
    tensor and costs four times as much. With `offload=optimizer_state` or `optimizer_step` its state lives on the host.

    Raises:
        ConfigError: nothing to train, or a bucket size for an offload that is not there.
    """
    groups = decay_groups(model, options.weight_decay)
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen. Set requires_grad on some, or add adapters.")
    numbers: dict[str, Any] = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": 1e-8}
    mode = parallel_of(model).layout.offload
    if mode in offload.MODES:
        return offload.AdamW(groups, mode=mode, bucket_bytes=options.offload_bucket_bytes, **numbers)
    if options.offload_bucket_bytes != TrainOptions.offload_bucket_bytes:
        words = " or ".join(f"offload={word}" for word in offload.MODES)
        raise ConfigError(
            f"offload_bucket_bytes={options.offload_bucket_bytes} with offload={mode}: nothing is moved in buckets; "
            f"add {words} to the layout, or leave it out."
        )
    return torch.optim.AdamW(groups, fused=True, **numbers)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    Linear warm-up over `warmup_steps`, then
    cosine: half a cosine from lr to min_lr * lr;  constant: lr;
    wsd: lr, and over the last `decay_steps` a straight line to min_lr * lr (arXiv 2404.06395).
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    return options.lr * (options.min_lr + (1 - options.min_lr) * _height(step, steps, options))


def _height(step: int, steps: int, options: TrainOptions) -> float:
    """1 at the top, 0 at the end."""
    if options.lr_schedule == "constant":
        return 1.0
    decay = steps - options.warmup_steps
    if options.lr_schedule == "wsd":
        decay = min(decay, options.decay_steps or max(steps // 5, 1))
    done = min(max((step - (steps - decay)) / max(decay - 1, 1), 0.0), 1.0)
    return 1.0 - done if options.lr_schedule == "wsd" else (1 + cos(pi * done)) / 2
