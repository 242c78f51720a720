"""Pipeline parallelism: the schedules of `torch.distributed.pipelining` around stages of ours.

What torch leaves open is closed here: the loss is a sum over tokens scaled by the caller (so micro-batches of unequal
token counts weigh right), rows that do not divide are padded with rows without labels, another sequence length gets its
own schedule, tied weights sum their gradients over their two stages, and a failing stage says which one it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from fms_parallel import compat
from fms_parallel.errors import LayoutError, TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.loss import IGNORE
from fms_parallel.modules.sequences import DropoutKey
from fms_parallel.schedule_file import FileSchedule, cell_text
from fms_parallel.schedules import find_schedule
from fms_parallel.strategy.base import Strategy
from fms_parallel.strategy.context import context_of, more_of
from fms_parallel.strategy.record import Notes, RecordedStage
from fms_parallel.strategy.stages import Judge, Stage, cut, make_stages, split_blocks


class PipelineStrategy(Strategy):
    """Keep this rank's stages of a model; `pipeline` then runs them.

    Args:
        mesh: the pp dimension. layout: its schedule, micro-batches and stage split.
    """

    def __init__(self, mesh: DeviceMesh, layout: ParallelLayout) -> None:
        self.layout, self.group = layout, mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.order, self.homes = find_schedule(layout.schedule), layout.homes
        if isinstance(self.order, FileSchedule):
            _agree(self.order, layout)
        self.held = self.order.stages_of(self.rank, layout.pp, layout.stages)
        self.shared: tuple[str, ...] = ()
        self.sizes: tuple[int, ...] = ()

    def distribute(self, model: nn.Module) -> nn.Module:
        """Forget the modules of other ranks' stages, in place."""
        self.sizes = split_blocks(model, self.layout)
        self.shared = cut(model, self.layout, self.held)
        return model

    def stages(self, model: nn.Module) -> list[Stage]:
        """This rank's stages, over the modules that `model` has kept."""
        return make_stages(model, self.layout, self.held, self.sizes, self.shared)


class Pipeline:
    """Runs a cut model: one call per batch, the same on every rank of the pipeline.

    Attributes:
        shared: parameters that the first and the last stage hold both, and are on two ranks.
        notes: where stages note when they work, while somebody records it (strategy/record.py).
    """

    def __init__(
        self,
        model: nn.Module,
        stages: list[Stage],
        strategy: PipelineStrategy,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layout, self.group, self.device, self.dtype = strategy.layout, strategy.group, device, dtype
        self.order, self.homes = strategy.order, strategy.homes
        self.stages = stages
        self.is_first = any(stage.is_first for stage in stages)
        self.is_last = any(stage.is_last for stage in stages)
        self.model = model
        # With a v-shaped schedule first and last stage are one rank, and the tied weight is one tensor.
        self.shared = strategy.shared if self.is_first != self.is_last else ()
        self.notes: Notes | None = None
        self._schedules: dict[tuple[int, int], tuple[Any, list[RecordedStage]]] = {}
        self._scale, self._sums = 1.0, torch.zeros(())

    def backward(self, batch: Any, scale: float, key: DropoutKey | None = None) -> Tensor:
        """Forward and backward over the schedule; gradients of `scale * loss` accumulate into `.grad`.

        Args:
            batch: `input_ids` and `labels`, the same on every rank of the pipeline; with cp this rank's part.
            key: names the random bits of this batch.
        Returns:
            the loss summed over this batch's tokens on ranks with the last stage, zero elsewhere; detached.
        """
        return self._run(batch, scale, key, train=True)

    @torch.no_grad()
    def evaluate(self, batch: Any, judge: Judge | None = None) -> Tensor:
        """The summed loss without a backward pass, or what `judge` makes of logits and labels; else as `backward`."""
        for stage in self.stages:
            stage.judge = judge
        try:
            return self._run(batch, 1.0, None, train=False)
        finally:
            for stage in self.stages:
                stage.judge = None

    def sum_shared_gradients(self) -> None:
        """Add what the two stages of a tied weight found, on both; the sum of two is the same in either order."""
        for name in self.shared:
            gradient = self.model.get_parameter(name).grad
            if gradient is None:
                continue
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            peer = self.homes[-1] if self.is_first else self.homes[0]
            theirs = torch.empty_like(local)
            sends = dist.P2POp(dist.isend, local.contiguous(), group=self.group, group_peer=peer)
            receives = dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer)
            for work in dist.batch_isend_irecv([sends, receives]):
                work.wait()
            local.add_(theirs)

    # ---- one run ------------------------------------------------------------------------------------------------

    def _run(self, batch: Any, scale: float, key: DropoutKey | None, *, train: bool) -> Tensor:
        context, pieces = context_of(batch), self.layout.pieces
        ids, labels = _padded(batch.input_ids, pieces, 0), _padded(batch.labels, pieces, IGNORE)
        more = {name: _padded(tensor, pieces, 0) for name, tensor in more_of(batch).items()}
        find = getattr(self.model, "facts", None)
        named = {"labels": labels, **(more if find is None else find(ids, context, **more))}
        if key is not None:
            # Tensors, because torch cuts those into micro-batches as it cuts the rows.
            whole = ids.shape[1] if context is None else context.length
            named["first_token"] = torch.arange(len(ids)).mul_(whole).add_(key.first_token)
            named["seed"] = torch.full((len(ids),), key.seed)
        self._scale, self._sums = scale, torch.zeros((), dtype=torch.float64, device=self.device)
        for stage in self.stages:
            stage.micro_batch, stage.length, stage.context = 0, ids.shape[1], context
        schedule = self._schedule(len(ids) // self.layout.pieces, ids.shape[1])
        arguments = (ids,) if self.is_first else ()
        target = labels if self.is_last else None
        losses: list[Tensor] | None = [] if self.is_last else None
        try:
            with nullcontext() if train else compat.forwards_only(schedule):
                run = schedule.step if train else schedule.eval
                run(*arguments, target=target, losses=losses, return_outputs=False, **named)
        except RuntimeError as error:
            raise _told_by_a_stage(error) from error
        return self._sums

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        self._sums += output.detach()
        return output * self._scale

    def _schedule(self, rows: int, length: int) -> Any:
        """The schedule for micro-batches of this shape: torch's stages cannot change theirs."""
        if (rows, length) not in self._schedules:
            stages = [self._torch_stage(stage, rows, length) for stage in self.stages]
            self._schedules[rows, length] = self._torch_schedule(stages), stages
        schedule, stages = self._schedules[rows, length]
        for stage in stages:
            stage.notes = self.notes
        return schedule

    def _torch_schedule(self, stages: list[RecordedStage]) -> Any:
        if isinstance(self.order, FileSchedule):
            cells = [[cell_text(cell) for cell in row if cell] for row in self.order.rows]
            return compat.schedule_of_cells(stages, self.layout.pieces, self._loss, cells)
        make = get_schedule_class(self.order.torch_name)
        given: Any = stages[0] if issubclass(make, PipelineScheduleSingle) else stages
        return make(given, self.layout.pieces, loss_fn=self._loss, scale_grads=False)  # type: ignore[call-arg]

    def _torch_stage(self, stage: Stage, rows: int, length: int) -> RecordedStage:
        """Shapes are said, not found out by a trial run, which would move FSDP's state on."""
        tokens = rows * length
        width: Any = self.model.activation_width
        handed_on = (-(-tokens // self.layout.tp), width) if self.layout.sp else (rows, length, width)
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
        x = torch.empty(handed_on, dtype=self.dtype, device="meta", requires_grad=True)
        wide = torch.promote_types(self.dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        return RecordedStage(
            stage,
            stage.index,
            self.layout.stages,
            self.device,
            input_args=(ids if stage.is_first else x,),
            output_args=(loss if stage.is_last else x,),
            group=self.group,
        )


def _agree(order: FileSchedule, layout: ParallelLayout) -> None:
    """Raises LayoutError on every rank when a rank has read another file: they would wait for each other for ever."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, order.rows)
    if others := [rank for rank, other in enumerate(rows) if other != rows[0]]:
        raise LayoutError(
            f"schedule={layout.schedule}: rank {others[0]} has read another schedule than rank 0; give every rank the "
            "same file."
        )


def _told_by_a_stage(error: BaseException) -> BaseException:
    """A stage's own word, which torch wraps in several errors of its own; else the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TrainingError):
        cause = cause.__cause__
    return cause or error


def _padded(tokens: Tensor, pieces: int, fill: int) -> Tensor:
    """Rows appended until they divide into `pieces`."""
    missing = -len(tokens) % pieces
    return tokens if missing == 0 else torch.cat([tokens, tokens.new_full((missing, *tokens.shape[1:]), fill)])


def refuse_forward(model: nn.Module) -> None:
    """A cut model has no forward of its own: say so instead of failing inside."""

    def forward(*_: Any, **__: Any) -> Any:
        raise LayoutError(
            "this model is cut into pipeline stages and cannot be called by itself: compute_gradients, train_step, "
            "train and evaluate run it, and generate and InferenceEngine."
        )

    model.forward = forward  # type: ignore[method-assign]
