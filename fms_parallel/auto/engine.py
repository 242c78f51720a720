"""`parallelize`: a model that knows nothing of parallelism -> an `Engine` that trains it in a layout.

    engine = parallelize(model, "pp=2,fsdp=2,tp=2", example_batch, microbatches=8)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-4)
    loss = engine.train_step(batch)          # forward and backward of this rank's rows
    engine.clip_grad_norm_(1.0)
    optimizer.step()

The order is that of `strategy/compose.py`: stages, tensor plan, recomputation, sharding, memory, weights. Nothing of
the model is changed: each rank works on its own copy, which has memory for its own parameters only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fms_parallel.auto.blocks import Recording, canonical_names
from fms_parallel.auto.build import Build, blocks_of, build_stages, fill
from fms_parallel.auto.fits import read_layout
from fms_parallel.auto.save import as_module, save_pretrained
from fms_parallel.auto.schedule import Recordings, Runner, local_gradient, sum_over_holders
from fms_parallel.auto.source import build_skeleton
from fms_parallel.auto.stage import AutoStage
from fms_parallel.auto.tasks import Task, UserLoss, get_task, repeat_last
from fms_parallel.checkpoint.training_state import load_training_state, save_training_state
from fms_parallel.distributed.mesh import build_mesh, data_shard
from fms_parallel.distributed.start import require_group
from fms_parallel.errors import ConfigError, TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training import offload
from fms_parallel.training.gradients import clip_gradients_, complete_gradients, copies, local_gradients

Batch = Mapping[str, Tensor]


def parallelize(
    model: Any,
    layout: str | ParallelLayout | None,
    example_batch: Batch,
    *,
    task: str | Task | None = None,
    loss: Callable[[Any, Batch], Tensor] | None = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    split: str | Sequence[int] | Sequence[str] = "cost",
    tensor_plan: Mapping[str, Any] | None = None,
    self_check: bool = True,
    weights: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Engine:
    """Spread `model` as `layout` says.

    Args:
        model: a module in memory (its values are kept), on the meta device, a transformers config, a folder that
            `save_pretrained` wrote, or a function that builds the module (its parameters then never have memory).
        layout: `"pp=2,fsdp=2,tp=2"`; over the running process group, or one process.
        example_batch: one batch, a dict of tensors `[B, ...]`, this rank's rows. Shapes count, values do not.
        task: word of `TASKS`; None finds it in the class's name. loss: (output, batch) -> loss summed over rows.
        microbatches: pieces that a step's rows are cut into. schedule: of the pipeline; both may be in the layout.
        split: `cost`, `even`, blocks of each stage, or the names of the blocks that later stages begin with.
        tensor_plan: expression -> word as `generate_layer_plan` takes it; None takes transformers' plan, or infers one.
        self_check: with tp, compare a short copy of the model, cut and whole, on two rows before anything is built.
        weights: safetensors file or folder to start from. Without it and without values they are drawn from `seed`.
        device: where this rank computes. dtype: of parameters, when not the model's own.
    Raises:
        LayoutError: the layout cannot be had with this model: no repeated blocks, more stages than blocks, a forward
            that decides by values, heads that tp does not divide. ConfigError: no task, batch or values; torchrun
            started ranks and no process group is running.
    """
    if layout is not None:
        require_group()
    world = dist.get_world_size() if dist.is_initialized() else 1
    skeleton, values, folder = build_skeleton(model, task if isinstance(task, str) else None)
    wanted, pieces = read_layout(layout, microbatches, schedule, world, skeleton, split, tensor_plan)
    where = torch.device(device) if device is not None else torch.device("cpu")
    mesh = build_mesh(wanted, where.type) if world > 1 else None
    job = UserLoss(loss) if loss is not None else get_task(skeleton, task)
    dtype = dtype or (torch.float64 if wanted.precision == "fp64" else None)
    if dtype is not None:
        skeleton = skeleton.to(dtype)
    blocks = blocks_of(skeleton, wanted)
    compute = torch.bfloat16 if wanted.precision == "bf16" else None
    recordings = Recordings(skeleton, job, blocks, compute)
    build = Build(skeleton, wanted, mesh, where, job, blocks, recordings, split, tensor_plan, self_check)
    engine = Engine(build, pieces)
    micro = engine.micro_batch_of(example_batch)
    engine.take(build_stages(build, micro))
    fill(build, engine.stages, values, weights or folder, seed)
    return engine


class Engine:
    """A model in a layout. `parallelize` makes it; the same calls on every rank.

    Attributes:
        layout: resolved. mesh: or None in one process. data_shard: (index, count) of this rank among those that read
            different rows. stages: this rank's. first_names: any name of a parameter -> the one it is known under.
    """

    def __init__(self, build: Build, pieces: int) -> None:
        self.layout, self.mesh, self.device, self.task = build.layout, build.mesh, build.device, build.task
        self.skeleton: nn.Module = build.skeleton
        self.pieces = pieces
        self.data_shard = data_shard(build.mesh)
        self.stages: list[AutoStage] = []
        self._build, self.first_names = build, canonical_names(build.skeleton)

    def take(self, stages: list[AutoStage]) -> None:
        """This rank's stages are built."""
        self.stages = stages
        group = self.mesh["pp"].get_group() if self.mesh is not None and self.layout.pp > 1 else None
        build = self._build
        self.runner = Runner(stages, self.layout, self.pieces, self.device, build.recordings, build.cut, group)

    # ---- training -------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss over the global batch; those of the step before are dropped.

        Args:
            batch: this rank's rows, the same on all ranks that share them (pp and tp). Rows that do not divide into
                the micro-batches are filled up with rows that do not count.
        Returns:
            the mean loss over all that counts in the rows of all ranks, fp64 scalar, the same everywhere.
        Raises:
            TrainingError: nothing counts, or a stage failed (named).
        """
        self.zero_grad()
        self.train()
        return self._step(batch, train=True)

    def eval_step(self, batch: Batch) -> Tensor:
        """The mean loss in evaluation mode; no gradient is touched."""
        with self._evaluating():
            return self._step(batch, train=False)

    def predict(self, batch: Batch, pick: Callable[[Any], Tensor] | None = None) -> Tensor:
        """What the model gives for this rank's rows in evaluation mode, on every rank of their pipeline.

        Args:
            batch: with or without labels, any number of rows. pick: (model output) -> tensor `[b, ...]`; None is the
                logits. With pp the engine must have been made with `loss=`, which carries the model's whole output.
        Returns:
            `[B, ...]`, one row for each of the batch.
        Raises:
            ConfigError: `pick` where the stages may not carry what it reads.
        """
        from fms_parallel.auto.predict import predict

        return predict(self, batch, pick)

    def forward_only(self, batch: Batch) -> None:
        """Run this rank's rows through all stages in evaluation mode, for what `AutoStage.look` sees."""
        rows = dict(batch)
        if self.task.labels in rows:
            rows = self.task.prepare(rows, getattr(self.skeleton, "config", None))
        missing = -_rows(rows) % self.pieces
        rows = {name: repeat_last(self._placed(value), missing) for name, value in rows.items()}
        with self._evaluating():
            self.runner.run(rows, 0.0, 0.0, train=False)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.eval()
        try:
            yield
        finally:
            self.train()
            for module in (part for stage in self.stages for part in stage.modules()):
                if isinstance(module, FSDPModule):  # without a backward pass nobody freed what was gathered
                    module.reshard()

    def _step(self, batch: Batch, train: bool) -> Tensor:
        rows = self._prepared(batch)
        count = self._sum_over_rows(self.task.count(rows).to(torch.float64).to(self.device))
        total = float(count)
        if total == 0:
            raise TrainingError("this step's batch holds nothing that counts (every label is -100).")
        # FSDP2 averages gradients over the ranks that see different rows; the loss is a sum over them.
        scale = self.layout.gradient_ranks / total
        aux_scale = total / (self.pieces * self.layout.data_parallel)
        found = self.runner.run(rows, scale, aux_scale, train=train)
        if train:
            complete_gradients(self.parameters())
            self._sum_shared_gradients()
        mean = found / total
        if self.layout.world_size > 1:
            mean = mean / self.layout.tp
            dist.all_reduce(mean)
        return mean

    def _sum_over_rows(self, count: Tensor) -> Tensor:
        if self.layout.data_parallel > 1:
            dist.all_reduce(count)
            count = count / (self.layout.world_size // self.layout.data_parallel)
        return count

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm over the whole model is at most `max_norm`.

        Returns:
            the norm before, the same on every rank.
        """
        norm = self.grad_norm()
        clip_gradients_(self.parameters(), norm, max_norm)
        return norm

    def grad_norm(self) -> Tensor:
        """Norm of all gradients over the whole model; a parameter that several ranks hold counts once."""
        ranks = self.layout.world_size // self.layout.pp
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self.all_named():
            if parameter.grad is not None:
                holders = len(self._holders(name))
                (piece,) = local_gradients([parameter])
                total += piece.double().square().sum() / (copies(parameter, ranks) * holders)
        if self.layout.world_size > 1:
            dist.all_reduce(total)
        return total.sqrt()

    def adamw(self, **options: Any) -> torch.optim.Optimizer:
        """AdamW over this rank's parameters; its state is where the layout's `offload` says. Options as torch's."""
        everything = list(self.parameters())
        # A stage may have nothing to train (adapters elsewhere); torch wants something to hold.
        mode, trained = self.layout.offload, [p for p in everything if p.requires_grad] or everything
        if mode in offload.MODES:
            return offload.AdamW(trained, mode=mode, **options)
        return torch.optim.AdamW(trained, **options)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of every module."""
        for stage in self.stages:
            stage.train(mode)

    def eval(self) -> None:
        """Evaluation mode."""
        self.train(False)

    # ---- what it holds --------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer. One that two stages of this rank hold comes once for each."""
        return (parameter for _, parameter in self.all_named())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the model's own names, each once."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self.all_named():
            found.setdefault(name, parameter)
        return iter(found.items())

    def all_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same, and a parameter that two stages of this rank hold once for each."""
        for stage in self.stages:
            for name, parameter in stage.model.named_parameters():
                yield self.first_names.get(name, name), parameter

    def _holders(self, name: str) -> list[int]:
        """The stages that hold a parameter."""
        cut = self._build.cut
        return (cut.holders(name) or [0]) if cut is not None else [0]

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's parameters and persistent buffers under the model's own names; sharded ones as DTensors."""
        found: dict[str, Tensor] = {}
        for stage in self.stages:
            found.update(stage.model.state_dict())
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's parameters from full tensors by name; tied ones under any of their names.

        Raises:
            CheckpointError: one is missing.
        """
        fill(self._build, self.stages, dict(state), None, None)

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 << 30) -> None:
        """Write safetensors under the names that the model's library uses, and its config. Collective."""
        save_pretrained(self, folder, max_shard_bytes)

    def save_checkpoint(
        self, folder: str | Path, step: int, optimizer: torch.optim.Optimizer, keep: int | None = None, **numbers: Any
    ) -> Path:
        """Write `folder/step-00000100`: weights, optimizer state and plain numbers, loadable in any layout. Collective.

        Raises:
            CheckpointError: as `save_training_state`; two stages of this rank hold one parameter.
        """
        return save_training_state(
            Path(folder), step=step, model=as_module(self), optimizer=optimizer, numbers=numbers, keep=keep
        )

    def load_checkpoint(self, path: str | Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Fill weights and optimizer from what `save_checkpoint` wrote in any layout; the saved numbers. Collective."""
        return load_training_state(Path(path), as_module(self), optimizer)

    def record(self, inputs: Mapping[str, Tensor]) -> Recording:
        """What the whole model's forward does with inputs of these shapes, found without memory.

        Raises:
            LayoutError: it decides by shape.
        """
        return self._build.recordings(inputs)

    # ---- batches --------------------------------------------------------------------------------------------------

    def rows_of(self, batch: Batch) -> dict[str, Tensor]:
        """This rank's rows of a global batch that every rank has.

        Raises:
            TrainingError: its rows do not divide over the ranks.
        """
        index, count = self.data_shard
        rows = _rows(batch)
        if rows % count:
            raise TrainingError(
                f"{rows} rows do not divide over {count} data-parallel ranks: give a multiple of {count}."
            )
        share = rows // count
        return {name: value[index * share : (index + 1) * share] for name, value in batch.items()}

    def micro_batch_of(self, batch: Batch) -> dict[str, Tensor]:
        """The first micro-batch of a batch, prepared."""
        rows = self._prepared(batch)
        return {name: value[: len(value) // self.pieces] for name, value in rows.items()}

    def _prepared(self, batch: Batch) -> dict[str, Tensor]:
        rows = _rows(batch)
        found = self.task.prepare(batch, getattr(self.skeleton, "config", None))
        found = {name: self._placed(value) for name, value in found.items()}
        missing = -rows % self.pieces
        if missing and getattr(getattr(self.skeleton, "config", None), "output_router_logits", False):
            raise TrainingError(
                f"{rows} rows do not divide into {self.pieces} micro-batches, and added rows would count in the "
                f"routers' auxiliary loss: give {missing} rows more."
            )
        return self.task.add_rows(found, missing) if missing else found

    def _placed(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        kept = next(self.skeleton.parameters()).dtype
        return value.to(kept) if value.is_floating_point() and kept == torch.float64 else value

    def _sum_shared_gradients(self) -> None:
        cut = self._build.cut
        if cut is None or not cut.shared:
            return
        assert self.mesh is not None
        owner = self.layout.homes
        mine: dict[str, list[Tensor]] = {}
        for name, parameter in self.all_named():
            if name in cut.shared and parameter.requires_grad:
                mine.setdefault(name, []).append(local_gradient(parameter))
        frozen = {name for name, p in self.skeleton.named_parameters() if not p.requires_grad}
        ranks = {n: sorted({owner[s] for s in cut.holders(n)}) for n in cut.shared if n not in frozen}
        sum_over_holders(mine, ranks, self.mesh["pp"].get_group(), self.mesh["pp"].get_local_rank())


def _rows(batch: Batch) -> int:
    sizes = {name: value.shape[0] if value.dim() else None for name, value in batch.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ConfigError(f"a batch is a dict of tensors with one row count in front; these have {sizes}.")
    return int(next(iter(sizes.values())) or 0)
