"""A model that hides nothing, compared in a layout with one process: for every architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.verify import TOLERANCE, Report, verify
from tests.poison import poisoned_memory


def shaken_model(architecture: str, **arguments: Any) -> nn.Module:
    """None of whose parameters is constant: zero biases and unit norms hide mistakes."""
    model = get_model(architecture, "micro", seed=5, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            ramp = torch.arange(parameter.numel(), dtype=parameter.dtype).remainder_(7).view(parameter.shape)
            local_tensor(parameter).add_(ramp.mul_(0.01)[local_box(parameter).slices])
    return _FOR_TOKEN_LABELS.get(architecture, lambda model: model)(model)


def _with_labels(model: nn.Module, pick: Any) -> nn.Module:
    """Made to take the labels that `verify` has, `[B, S]`, one per token."""
    leave: Any = model.leave

    def picked(x: Tensor, seq: Any, labels: Tensor | None = None) -> Tensor:
        return leave(x, seq, None if labels is None else pick(labels))  # type: ignore[no-any-return]

    model.leave = picked  # type: ignore[method-assign, assignment]
    return model


def _below(labels: Tensor, count: int) -> Tensor:
    """What is left out stays left out."""
    return labels.where(labels < 0, labels % count)


_FOR_TOKEN_LABELS: dict[str, Any] = {
    "roberta_classification": partial(_with_labels, pick=lambda labels: _below(labels[:, 1], 3)),
    "roberta_question_answering": partial(_with_labels, pick=lambda labels: _below(labels[:, 1:3], labels.shape[1])),
}


def ranks_of(layout: str) -> int:
    return ParallelLayout.parse(layout).world_size


def compare(architecture: str, layout: str, config: dict[str, Any], dtype: str, pieces: int) -> Report:
    """One rank of one case. Odd on purpose: 13 tokens divide by nothing."""
    with poisoned_memory():
        parsed, factory = ParallelLayout.parse(layout), partial(shaken_model, architecture)
        return verify(factory, parsed, dtype=dtype, seq_len=13, grad_accum_steps=pieces, **config)


def check(architecture: str, layout: str, config: dict[str, Any], dtype: str = "fp64") -> None:
    """Every rank finds the loss, gradients and updated weights of one process."""
    pieces = 2 if ranks_of(layout) == 2 else 1
    reports = run_ranks(compare, ranks_of(layout), architecture, layout, config, dtype, pieces)
    assert all(report.worst <= TOLERANCE[dtype] for report in reports), reports[0]
