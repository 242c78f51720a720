"""The page: in what order strategies are applied, and why.

    cut stages -> tensor / sequence -> context -> recompute -> compile -> shard -> memory

Stages are cut first, so that nothing later touches a block that another rank has. Tensor parallelism must see the plain
parameters; context changes none; recomputation and compilation wrap what a block computes; sharding is outermost, so
that a parameter is gathered before anything inside the block runs, and runs again. Nothing has memory until the end, so
a model that fits no single rank is never whole anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from fms_parallel import compat
from fms_parallel.distributed.mesh import build_mesh, replica_mesh, shard_mesh
from fms_parallel.errors import LayoutError
from fms_parallel.fit import check_fit
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.embedding import Embedding
from fms_parallel.nearest import Rule, check
from fms_parallel.shape import ModelShape
from fms_parallel.strategy.base import Parallel, repeated_blocks
from fms_parallel.strategy.context import ContextStrategy, refuse_without_context
from fms_parallel.strategy.fsdp import FullyShardStrategy, ReplicateStrategy
from fms_parallel.strategy.materialise import initialise, materialise
from fms_parallel.strategy.pipeline import Pipeline, PipelineStrategy, refuse_forward
from fms_parallel.strategy.recompute import RecomputeStrategy, refuse_budget_without_compile
from fms_parallel.strategy.rows import SameRows, guard_forward
from fms_parallel.strategy.stages import refuse_unless_stageable
from fms_parallel.strategy.tensor import TensorParallelStrategy, refuse_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""What parameters are stored in under each precision."""


def compose(
    model: nn.Module,
    layout: ParallelLayout,
    *,
    device: torch.device | None = None,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, ParallelStyle] | None = None,
    compile_blocks: bool = False,
    dtype: torch.dtype | None = None,
    fill: Callable[[nn.Module], None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Spread `model` as `layout` says, give it memory, and fill it.

    Args:
        model: built under `torch.device("meta")` (or in memory already: then it keeps its values).
        layout: resolved; its world is the running process group, or one process.
        device: where this rank computes. mesh: the layout's mesh when it exists already.
        plan: styles for modules without twins. compile_blocks: torch.compile each repeated block.
        dtype: what parameters are stored in; None is what the layout's precision asks for.
        fill: writes every parameter, a checkpoint loader say; None draws initial weights from `seed`.
    Raises:
        LayoutError: an axis that no strategy implements, or a model that cannot be cut this way.
    """
    check_layout(layout, model=type(model), compile_blocks=compile_blocks)
    names = tuple(model.state_dict())
    device = device or torch.device("cpu")
    if layout.world_size > 1 and mesh is None:
        mesh = build_mesh(layout, device.type)
    fresh = any(parameter.is_meta for parameter in model.parameters())
    if fresh:
        model = model.to(dtype or DTYPES[layout.precision])
    pipeline: PipelineStrategy | None = None
    if mesh is not None and layout.pp > 1:
        pipeline = PipelineStrategy(mesh["pp"], layout)
        model = pipeline.distribute(model)
    if mesh is not None:
        tensor = TensorParallelStrategy(
            mesh["tp"], sp=layout.sp, loss_parallel=layout.loss_parallel, parts=layout.tp_parts, plan=plan
        )
        model = tensor.distribute(model)
    context: ContextStrategy | None = None
    if mesh is not None and layout.cp > 1:
        context = ContextStrategy(mesh, layout)
        model = context.distribute(model)
    model = RecomputeStrategy(layout).distribute(model)
    if compile_blocks:
        _compile(model, layout.recompute_budget)
    stages = pipeline.stages(model) if pipeline is not None else []
    parts: list[nn.Module] = [*stages] or [model]
    for part in parts:
        _shard(part, layout, mesh)
    materialise(model, device, torch.device("cpu") if layout.offload == "params" else None)
    runner = None
    if pipeline is not None:
        activations = torch.bfloat16 if layout.precision == "bf16" else dtype or DTYPES[layout.precision]
        runner = Pipeline(model, stages, pipeline, device, activations)
        refuse_forward(model)
    elsewhere = frozenset(names) - frozenset(model.state_dict())
    same_rows = None if mesh is None else SameRows(mesh)
    if same_rows is not None and runner is None:
        guard_forward(model, same_rows)
    model.parallel = Parallel(layout, mesh, runner, elsewhere, names, context, same_rows)  # type: ignore[assignment]
    if fresh:
        (fill or _initialise(seed))(model)
    return model


def check_layout(
    layout: ParallelLayout,
    *also_by: Rule,
    shape: ModelShape | None = None,
    model: Any = None,
    compile_blocks: bool = False,
) -> None:
    """Everything that can be known to be wrong before a process group starts.

    Args:
        also_by: more rules. shape: of the model. model: its class. compile_blocks: as in `compose`.
    Raises:
        LayoutError: the rule that is broken, and the nearest layouts that break none.
    """
    rules: list[Rule] = [] if shape is None else [lambda each: check_fit(each, shape)]
    rules += [
        refuse_unimplemented,
        lambda each: refuse_budget_without_compile(each, compile_blocks),
        lambda each: refuse_without_context(model, each),
    ]
    check(layout, *rules, *also_by)


def refuses(native: nn.Module, shape: ModelShape) -> Callable[[ParallelLayout], None]:
    """A rule that raises for every layout which an undistributed model of this shape cannot be spread in."""

    def rule(layout: ParallelLayout) -> None:
        check_fit(layout, shape)
        refuse_unimplemented(layout)
        refuse_without_context(type(native), layout)
        refuse_parts(native, layout.tp_parts)
        if layout.pp > 1:
            refuse_unless_stageable(native)

    return rule


def refuse_unimplemented(layout: ParallelLayout) -> None:
    """Name every word of the layout that no strategy implements yet; call it before a process group starts."""
    if layout.offload == "params" and layout.fsdp == 1:
        raise LayoutError(f"layout {str(layout)!r}: offload=params keeps shards on the host; add fsdp=N or drop it.")


def _shard(model: nn.Module, layout: ParallelLayout, mesh: DeviceMesh | None) -> None:
    """Data parallelism, or the same precision without it; in place."""
    if mesh is not None and layout.fsdp > 1:
        FullyShardStrategy(
            shard_mesh(mesh),
            precision=layout.precision,
            offload=layout.offload == "params",
            # A stage runs many micro-batches between two updates: it would gather for each.
            free_after_forward=layout.pp == 1,
            keep_gathered=layout.keep_gathered,
        ).distribute(model)
    elif mesh is not None and layout.gradient_ranks > 1:
        ReplicateStrategy(replica_mesh(mesh), precision=layout.precision).distribute(model)
    elif layout.precision == "bf16":
        _compute_in(model, torch.bfloat16, required=layout.pp == 1)


def _compute_in(model: nn.Module, dtype: torch.dtype, required: bool) -> None:
    """Activations follow the embedding's dtype, and every matrix is cast to its input's."""
    embeddings = [module for module in model.modules() if isinstance(module, Embedding)]
    if required and not embeddings:
        raise LayoutError("precision=bf16 without dp or fsdp needs a model that starts with our Embedding; add fsdp.")
    for embedding in embeddings:
        embedding.compute_dtype = dtype


def _compile(model: nn.Module, budget: float | None) -> None:
    blocks = [block for _, block in repeated_blocks(model)]
    if budget is not None:
        compat.compile_within(blocks, budget)
        return
    for block in blocks:
        block.compile(dynamic=False)


def _initialise(seed: int) -> Callable[[nn.Module], None]:
    return lambda model: initialise(model, seed)
