"""Running stages: torch's schedules over `AutoStage`s, and the plain loop of a model that is not cut.

A schedule is made for one shape of micro-batch and kept; another shape is recorded again and gets its own. It knows
stages and shapes; scaling, counting and norms are the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from fms_parallel import compat
from fms_parallel.auto.blocks import Meta, Recording
from fms_parallel.auto.cut import Cut
from fms_parallel.auto.record import record
from fms_parallel.auto.stage import AutoStage, constant_inputs, shapes_of
from fms_parallel.auto.tasks import Task
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import LayoutError, TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.schedules import SCHEDULES

SPLIT_BACKWARD = ("zbv", "interleaved_zero_bubble", "dualpipev")
"""Schedules that split the backward pass in two, which some models' graphs do not survive."""


class Recordings:
    """Recordings of micro-batches by their shapes.

    Args:
        skeleton: the whole model on the meta device. dtype: what it computes in, when not its own.
    """

    def __init__(self, skeleton: nn.Module, task: Task, blocks: list[str], dtype: torch.dtype | None) -> None:
        self.skeleton, self.task, self.blocks, self.dtype = skeleton, task, blocks, dtype
        self.expected: tuple[Any, ...] | None = None
        self._found: dict[Any, Recording] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Recording:
        """The recording of inputs of these shapes.

        Raises:
            LayoutError: with these shapes other tensors cross the cuts than with the example's.
        """
        key = shapes_of(inputs)
        if key not in self._found:
            given = {**inputs, **constant_inputs(self.skeleton)}
            found = record(self.skeleton, given, self.blocks, dtype=self.dtype, wanted=self.task.wanted)
            seen = tuple((call.name, call.reads) for call in found.blocks)
            if self.expected not in (None, seen):
                raise LayoutError(
                    f"a batch of {key} makes other tensors cross the cuts than the example batch did: the forward "
                    "decides by shape. Pad batches to one shape, or use a layout without pp."
                )
            self.expected = seen
            self._found[key] = found
        return self._found[key]


class Runner:
    """Runs this rank's stages over a batch of rows.

    Args:
        pieces: micro-batches. group: the ranks of the pipeline; None without a cut.
    Attributes:
        schedule: the order of the next run; another one with as many stages for each rank may be set.
        pieces_of_loss: the summed loss of each micro-batch of the last run, on ranks with the last stage.
    """

    def __init__(
        self,
        stages: list[AutoStage],
        layout: ParallelLayout,
        pieces: int,
        device: torch.device,
        recordings: Recordings,
        cut: Cut | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.stages, self.layout, self.pieces, self.device = stages, layout, pieces, device
        self.recordings, self.cut, self.group = recordings, cut, group
        self.is_last = any(stage.is_last for stage in stages)
        self._schedules: dict[Any, Any] = {}
        self._scale, self._sum = 1.0, torch.zeros(())
        self.schedule = layout.schedule
        self.pieces_of_loss: list[Tensor] = []

    def run(self, batch: dict[str, Tensor], scale: float, aux_scale: float, *, train: bool) -> Tensor:
        """Forward, and with `train` backward of `scale * loss`; rows must divide into the micro-batches.

        Returns:
            the summed loss on ranks with the last stage, zero elsewhere; detached.
        """
        self._scale, self._sum = scale, torch.zeros((), dtype=torch.float64, device=self.device)
        self.pieces_of_loss = []
        for stage in self.stages:
            stage.micro_batch, stage.aux_scale = 0, aux_scale
        if self.cut is None:
            self._loop(batch, train)
        else:
            self._pipeline(batch, train)
        if train and any(compat.has_unreduced_gradients(stage) for stage in self.stages):
            raise TrainingError(
                f"schedule={self.schedule} with dp or fsdp: FSDP2 did not sum all gradients of this model over the "
                "ranks. Use interleaved1f1b, looped_bfs, 1f1b or gpipe."
            )
        return self._sum

    def _loss(self, output: Tensor, target: Any = None) -> Tensor:
        self.pieces_of_loss.append(output.detach())
        self._sum += output.detach()
        return output * self._scale

    def _loop(self, batch: dict[str, Tensor], train: bool) -> None:
        (stage,) = self.stages
        rows = len(next(iter(batch.values()))) // self.pieces
        for piece in range(self.pieces):
            micro = {name: value[piece * rows : (piece + 1) * rows] for name, value in batch.items()}
            if isinstance(stage, FSDPModule):
                last = piece == self.pieces - 1
                stage.set_requires_gradient_sync(last)
                stage.set_is_last_backward(last)
            with nullcontext() if train else torch.no_grad():
                loss = self._loss(stage(**micro))
            if train:
                loss.backward()

    def _pipeline(self, batch: dict[str, Tensor], train: bool) -> None:
        rows = len(next(iter(batch.values())))
        schedule = self._schedule({name: value[: rows // self.pieces] for name, value in batch.items()})
        places = torch.arange(rows, device=self.device)
        arguments = (places,) if any(stage.index == 0 for stage in self.stages) else ()
        losses: list[Tensor] | None = [] if self.is_last else None
        run = schedule.step if train else schedule.eval
        try:
            with (
                nullcontext() if train else torch.no_grad(),
                nullcontext() if train else compat.forwards_only(schedule),
            ):
                run(*arguments, target=places if self.is_last else None, losses=losses, return_outputs=False, **batch)
        except RuntimeError as error:
            told = told_by_a_stage(error)
            if told is error and self.schedule in SPLIT_BACKWARD:
                raise TrainingError(
                    f"schedule={self.schedule}: torch cannot split this model's backward pass in two ({error}). Use "
                    "interleaved1f1b, looped_bfs, 1f1b or gpipe."
                ) from error
            raise told from error

    def _schedule(self, micro: dict[str, Tensor]) -> Any:
        key = (self.schedule, shapes_of(micro))
        if key not in self._schedules:
            recording = self.recordings(self.recordings.task.inputs(micro))
            rows = len(next(iter(micro.values())))
            stages = [self._torch_stage(stage, recording, rows) for stage in self.stages]
            make = get_schedule_class(SCHEDULES[self.schedule].torch_name)
            given: Any = stages[0] if issubclass(make, PipelineScheduleSingle) else stages
            self._schedules[key] = make(given, self.pieces, loss_fn=self._loss, scale_grads=False)  # type: ignore[call-arg]
        return self._schedules[key]

    def _torch_stage(self, stage: AutoStage, recording: Recording, rows: int) -> PipelineStage:
        """Shapes are said, not found out by a trial run, which would move FSDP's state on."""
        cut = self.cut
        assert cut is not None

        def like(meta: Meta) -> Tensor:
            return torch.empty(meta.shape, dtype=meta.dtype, device="meta", requires_grad=meta.requires_grad)

        arriving = tuple(like(recording.metas[item]) for item in cut.arriving[stage.index])
        leaving = tuple(like(recording.metas[item]) for item in cut.leaving(stage.index))
        wide = torch.promote_types(self._computes_in(recording), torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            stage.index,
            cut.stages,
            self.device,
            input_args=arriving if stage.index else (torch.empty(rows, dtype=torch.int64, device="meta"),),
            output_args=(loss,) if stage.is_last else leaving,
            group=self.group,
        )

    def _computes_in(self, recording: Recording) -> torch.dtype:
        return next((m.dtype for m in recording.metas.values() if m.dtype.is_floating_point), torch.float32)


def told_by_a_stage(error: BaseException) -> BaseException:
    """A stage's own word, which torch wraps in several errors of its own; else the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TrainingError):
        cause = cause.__cause__
    return cause or error


def sum_over_holders(
    gradients: dict[str, list[Tensor]], ranks: dict[str, list[int]], group: dist.ProcessGroup, me: int
) -> None:
    """Give every copy of a parameter that several stages hold the sum of all their gradients, in place.

    Args:
        gradients: name -> this rank's copies' gradients (local tensors). ranks: name -> pipeline ranks that hold it.
    """
    for name in sorted(ranks):
        holders = ranks[name]
        if me not in holders:
            continue
        copies = gradients[name]
        mine = torch.stack(copies).sum(0) if len(copies) > 1 else copies[0].clone()
        pieces = {me: mine}
        operations = []
        for peer in holders:
            if peer != me:
                pieces[peer] = torch.empty_like(mine)
                operations.append(dist.P2POp(dist.isend, mine, group=group, group_peer=peer))
                operations.append(dist.P2POp(dist.irecv, pieces[peer], group=group, group_peer=peer))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        # In the order of ranks, so that all copies get the same bits.
        total = torch.stack([pieces[rank] for rank in sorted(pieces)]).sum(0)
        for copy in copies:
            copy.copy_(total)


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a gradient; zeros when there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_tensor(parameter.grad)
