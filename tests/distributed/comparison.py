"""A model that hides nothing, compared in a layout with one process: for every architecture, many cases in one job."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import RankFailed
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


Case = tuple[str, str, dict[str, Any]]
"""Architecture, layout, fields of its config."""


def compare(architecture: str, layout: str, config: dict[str, Any]) -> Report:
    """One rank of one case. Odd on purpose: 13 tokens divide by nothing."""
    with poisoned_memory():
        parsed, factory = ParallelLayout.parse(layout), partial(shaken_model, architecture)
        pieces = 2 if parsed.world_size == 2 else 1
        return verify(factory, parsed, dtype="fp64", seq_len=13, grad_accum_steps=pieces, **config)


class Together:
    """Runs all cases of equally many ranks in one job, when the first of them is asked for.

    Starting ranks and warming them up costs more than most cases. What a case raises is its own failure; ranks that
    die or hang fail all cases of their job.

    Args:
        function: runs on every rank with a case as its arguments; importable by name. ranks: how many a case needs.
    """

    def __init__(
        self, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]], ranks: Callable[..., int]
    ) -> None:
        self.function, self.cases = function, list(cases)
        self.ranks = [ranks(*case) for case in cases]
        self.found: dict[int, list[list[Any]] | Exception] = {}

    def __call__(self, *case: Any) -> list[Any]:
        """What the function gave for a case, in rank order."""
        index = self.cases.index(case)
        world = self.ranks[index]
        alike = [other for other, ranks in enumerate(self.ranks) if ranks == world]
        if world not in self.found:
            self.found[world] = self._run(world, [self.cases[other] for other in alike])
        found = self.found[world]
        if isinstance(found, Exception):
            raise found
        results = [of_rank[alike.index(index)] for of_rank in found]
        assert not any(isinstance(result, str) for result in results), results
        return results

    def _run(self, world: int, cases: list[tuple[Any, ...]]) -> list[list[Any]] | Exception:
        try:
            return run_ranks(each_of, world, self.function, cases, timeout=120.0 + 15.0 * len(cases))
        except RankFailed as error:
            return error


def each_of(function: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[Any]:
    """One rank: what each case gave, or a text that says how it failed."""
    found: list[Any] = []
    for case in cases:
        torch.manual_seed(0)
        try:
            found.append(function(*case))
        except Exception:
            found.append(traceback.format_exc())
    return found


def together(cases: Sequence[Case]) -> Together:
    """`compare` for every case."""
    return Together(compare, cases, lambda architecture, layout, config: ranks_of(layout))


def check(reports: list[Report], dtype: str = "fp64") -> None:
    """Every rank finds the loss, gradients and updated weights of one process."""
    assert all(report.worst <= TOLERANCE[dtype] for report in reports), reports[0]
