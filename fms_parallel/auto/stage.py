"""`AutoStage`: one stage of a cut model as torch's schedules run it, tensors in and tensors out.

It knows how a micro-batch goes through; which modules are real is `cut.py`'s, when it runs is the schedule's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel.auto.blocks import Recording
from fms_parallel.auto.cut import EndOfStage, Run
from fms_parallel.auto.tasks import Task
from fms_parallel.errors import TrainingError

Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""Name, shape and dtype of what a micro-batch has, sorted."""


def shapes_of(batch: Mapping[str, Tensor]) -> Shapes:
    """What a recording is found by."""
    return tuple(sorted((name, tuple(value.shape), value.dtype) for name, value in batch.items()))


class AutoStage(nn.Module):
    """A stage.

    Args:
        model: the whole model (without a cut), or what `stage_model` kept. blocks: names of those it runs.
        run: None without a cut.
        recordings: gives the recording of a micro-batch of these inputs.
    Attributes:
        aux_scale: what a loss beside the task's (of a mixture's router) is multiplied with, so that it is averaged
            over the micro-batches of all ranks while the task's is summed.
        look: takes the model's output in the place of the loss, which is zero then. note: takes it beside the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        blocks: Sequence[str],
        run: Run | None,
        recordings: Callable[[Mapping[str, Tensor]], Recording],
    ) -> None:
        super().__init__()
        self.model = model
        self._blocks = tuple(blocks)
        self._task, self._run, self._recordings = task, run, recordings
        self._constants = constant_inputs(model)
        self.aux_scale, self.micro_batch = 0.0, 0
        self.look: Callable[[Any], Any] | None = None
        self.note: Callable[[Any], Any] | None = None

    @property
    def index(self) -> int:
        """Which stage."""
        return self._run.stage if self._run is not None else 0

    @property
    def cut_run(self) -> Run | None:
        """What its modules share while it runs; None without a cut."""
        return self._run

    @property
    def is_last(self) -> bool:
        """Whether it finds out the loss."""
        return self._run is None or self.index == self._run.cut.stages - 1

    def parameter_groups(self) -> list[list[nn.Module]]:
        """What FSDP gathers together: each block of this stage. The rest is gathered with the stage itself."""
        blocks = [self.model.get_submodule(name) for name in self._blocks]
        return [[block] for block in blocks if any(True for _ in block.parameters())]

    def forward(self, *carried: Tensor, **batch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """One micro-batch.

        Args:
            carried: what the stage before sent (the first stage: a tensor that is not read). batch: `[b, ...]` each.
        Returns:
            what the next stage needs; in the last stage the summed loss.
        Raises:
            TrainingError: naming stage, blocks and micro-batch, when a module fails.
        """
        try:
            return self._forward(carried, batch)
        except Exception as error:
            raise TrainingError(f"{self.described()}: {type(error).__name__}: {error}") from error
        finally:
            self.micro_batch += 1

    def described(self) -> str:
        """Where it happened."""
        if self._run is None:
            return f"micro-batch {self.micro_batch}"
        first, end = self._run.cut.range_of(self.index)
        names = self._run.cut.blocks
        return f"pipeline stage {self.index} ({names[first]} to {names[end - 1]}), micro-batch {self.micro_batch}"

    def _forward(self, carried: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        inputs = self._task.inputs(batch)
        if self._run is None:
            return self._loss(self.model(**inputs, **self._constants), batch)
        device = next(iter(batch.values())).device
        self._run.begin(self._recordings(inputs), carried if self.index else (), device)
        try:
            out = self.model(**inputs, **self._constants)
            return self._loss(out, batch)
        except EndOfStage:
            return self._run.leaving()
        finally:
            self._run.values = {}

    def _loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor:
        if self.look is not None:
            self.look(out)
            return torch.zeros((), device=next(iter(batch.values())).device)
        if self.note is not None:
            self.note(out)
        loss = self._task.loss_sum(out, batch)
        aux = getattr(out, "aux_loss", None)
        if isinstance(aux, Tensor):
            loss = loss + aux.to(loss.dtype) * (aux_weight(self.model) * self.aux_scale)
        return loss


def constant_inputs(model: nn.Module) -> dict[str, Any]:
    """What every forward is told beside the batch: no cache of keys and values."""
    known = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def aux_weight(model: nn.Module) -> float:
    """How much a model's own auxiliary loss counts (transformers: `router_aux_loss_coef`)."""
    found = getattr(model, "router_aux_loss_coef", None)
    if found is None:
        found = getattr(getattr(model, "config", None), "router_aux_loss_coef", 1.0)
    return 1.0 if found is None else float(found)
