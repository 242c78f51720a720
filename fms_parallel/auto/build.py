"""Making a rank's stages: cut, planned, wrapped, sharded, given memory, filled.

It is to any model what `strategy/compose.py` is to models with twins, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fms_parallel.auto.blocks import canonical_names, find_blocks
from fms_parallel.auto.cut import Cut, Run, make_cut, stage_model
from fms_parallel.auto.lora import adapter_patterns, draw_adapter, is_adapter
from fms_parallel.auto.plans import styles_for, tensor_patterns
from fms_parallel.auto.schedule import Recordings
from fms_parallel.auto.self_check import check_plan
from fms_parallel.auto.source import draw, skeleton_of
from fms_parallel.auto.stage import AutoStage, constant_inputs
from fms_parallel.auto.tasks import Task
from fms_parallel.auto.weights import open_named
from fms_parallel.checkpoint.lazy import LazyTensor, MemoryTensor, copy_box
from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.mesh import replica_mesh, shard_mesh
from fms_parallel.errors import CheckpointError, FmsError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.strategy.fsdp import FullyShardStrategy, ReplicateStrategy
from fms_parallel.strategy.materialise import materialise
from fms_parallel.strategy.recompute import KEPT
from fms_parallel.strategy.tensor import TensorParallelStrategy


def blocks_of(skeleton: nn.Module, layout: ParallelLayout) -> list[str]:
    """Names of the blocks; without stages a model may have none, and is sharded whole."""
    try:
        return find_blocks(skeleton)
    except LayoutError:
        if layout.pp > 1:
            raise
        return []


@dataclass
class Build:
    """What stages are made from. `cut` is there once they are, when the layout has pp."""

    skeleton: nn.Module
    layout: ParallelLayout
    mesh: DeviceMesh | None
    device: torch.device
    task: Task
    blocks: list[str]
    recordings: Recordings
    split: str | Sequence[int] | Sequence[str]
    tensor_plan: Mapping[str, Any] | None
    self_check: bool = True
    cut: Cut | None = None


def build_stages(build: Build, micro: dict[str, Tensor]) -> list[AutoStage]:
    """This rank's stages, with memory and without values."""
    runs = _runs(build, micro)
    patterns = _tensor_patterns(build, micro) if build.layout.tp > 1 else {}
    made = [_stage(build, run) for run in runs]
    for stage in made:
        if build.layout.tp > 1:
            _cut_over_tp(build, patterns, stage.model)
        _recompute(stage, build.layout)
        _shard(stage, build)
        materialise(stage, build.device)
        _move_buffers(stage, build.device)
    return made


def _tensor_patterns(build: Build, micro: dict[str, Tensor]) -> dict[str, Any]:
    inputs = {**build.task.inputs(micro), **constant_inputs(build.skeleton)}
    cut = build.cut
    stages = {n: s for s in range(cut.stages) for n in cut.blocks[slice(*cut.range_of(s))]} if cut is not None else {}

    def find() -> dict[str, Any]:
        return tensor_patterns(build.skeleton, build.layout.tp, build.tensor_plan, inputs, stages)

    patterns = adapter_patterns(build.skeleton, find() if build.tensor_plan is not None else from_first_rank(find))
    if build.self_check:
        assert build.mesh is not None
        check_plan(build.skeleton, inputs, build.blocks, build.mesh["tp"], partial(_cut_over_tp, build, patterns))
    return patterns


def from_first_rank(find: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank: seconds of work once, and no rank with a plan of its own. Collective.

    Raises:
        FmsError: what rank 0 raises, on every rank.
    """
    found: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found[0] = find()
        except FmsError as error:
            found[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _cut_over_tp(build: Build, patterns: Mapping[str, Any], model: nn.Module) -> None:
    assert build.mesh is not None
    plan = styles_for(model, patterns, build.layout.tp)
    TensorParallelStrategy(build.mesh["tp"], plan=plan).distribute(model)


def _runs(build: Build, micro: dict[str, Tensor]) -> list[Run | None]:
    """One for each stage of this rank; `[None]` without a cut."""
    layout = build.layout
    if layout.pp == 1:
        return [None]
    assert build.mesh is not None
    recording = build.recordings(build.task.inputs(micro))
    split = layout.stage_split if layout.stage_split is not None else build.split
    build.cut = make_cut(build.skeleton, recording, layout.stages, split)
    for stage, arriving in enumerate(build.cut.arriving[1:], start=1):
        if not arriving:
            raise LayoutError(
                f"nothing crosses the cut before stage {stage}: what follows reads nothing before it. Split otherwise."
            )
    runs: list[Run | None] = []
    for stage in layout.stages_of(build.mesh["pp"].get_local_rank()):
        run = Run(build.cut, stage)
        run.device = build.device
        runs.append(run)
    return runs


def _stage(build: Build, run: Run | None) -> AutoStage:
    if run is None:
        return AutoStage(skeleton_of(build.skeleton), build.task, build.blocks, None, build.recordings)
    first, end = run.cut.range_of(run.stage)
    model = stage_model(build.skeleton, run.cut, run)
    return AutoStage(model, build.task, run.cut.blocks[first:end], run, build.recordings)


def _shard(stage: AutoStage, build: Build) -> None:
    layout, mesh = build.layout, build.mesh
    if layout.fsdp > 1 or (layout.precision == "bf16" and layout.dp == 1):
        assert mesh is not None
        FullyShardStrategy(
            shard_mesh(mesh),
            precision=layout.precision,
            offload=layout.offload == "params",
            free_after_forward=layout.pp == 1,
            keep_gathered=layout.keep_gathered,
        ).distribute(stage)
    elif layout.dp > 1:
        assert mesh is not None
        ReplicateStrategy(replica_mesh(mesh), precision=layout.precision).distribute(stage)


def _recompute(stage: AutoStage, layout: ParallelLayout) -> None:
    """Recompute blocks in the backward pass, with the random bits of the forward."""
    options: dict[str, Any] = {"use_reentrant": False}
    if layout.recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    every = layout.recompute_interval
    for number, block in enumerate(group[0] for group in stage.parameter_groups()):
        if every and number % every == 0:
            block.forward = partial(_again, block.forward, options)  # type: ignore[method-assign]


def _again(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, **options, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _move_buffers(stage: nn.Module, device: torch.device) -> None:
    for module in stage.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


# ---- values -----------------------------------------------------------------------------------------------------


def fill(
    build: Build,
    stages: Sequence[AutoStage],
    values: Mapping[str, Tensor],
    weights: str | Path | None,
    seed: int | None,
) -> None:
    """Write every parameter of this rank: from values, from files, or drawn.

    Args:
        values: full tensors by any name of a parameter. seed: None refuses to draw.
    Raises:
        CheckpointError: a parameter that nobody gives. ConfigError: one that nobody knows how to draw.
    """
    first = canonical_names(build.skeleton)
    source: dict[str, LazyTensor] = {first.get(name, name): MemoryTensor(value) for name, value in values.items()}
    if weights is not None:
        source.update(open_named(weights, build.skeleton))
    targets = [(first.get(name, name), p) for stage in stages for name, p in stage.model.named_parameters()]
    adapters = [(name, p) for name, p in targets if is_adapter(name) and name not in source]
    missing = {name for name, _ in targets if name not in source and not is_adapter(name)}
    if missing and (weights is not None or values or seed is None):
        shown = ", ".join(sorted(missing)[:5])
        raise CheckpointError(
            f"{len(missing)} parameters are not among the weights ({shown}): nothing was left to chance."
        )
    with torch.no_grad():
        for name, parameter in targets:
            if name in source:
                write(parameter, source[name])
        for name, parameter in adapters:
            write(parameter, MemoryTensor(draw_adapter(name, parameter.shape, parameter.dtype, seed or 0)))
        if missing:
            _draw(build, targets, missing, seed or 0)
        for stage in stages:
            _fill_buffers(stage.model, source)


def _draw(build: Build, targets: list[tuple[str, nn.Parameter]], missing: set[str], seed: int) -> None:
    for name, value in draw(build.skeleton, build.blocks, missing, seed):
        for target, parameter in targets:
            if target == name:
                write(parameter, MemoryTensor(value))


def write(parameter: Tensor, source: LazyTensor) -> None:
    """This rank's piece of a parameter. Raises CheckpointError for another shape."""
    if source.shape != tuple(parameter.shape):
        raise CheckpointError(f"a value of shape {source.shape} for a parameter of shape {tuple(parameter.shape)}.")
    box = local_box(parameter)
    if box.numel:
        copy_box(source, box, local_tensor(parameter))


def _fill_buffers(model: nn.Module, source: Mapping[str, LazyTensor]) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.state_dict(keep_vars=True).items():
        if name not in parameters and name in source:
            buffer.copy_(source[name].read_all().to(buffer.dtype))
