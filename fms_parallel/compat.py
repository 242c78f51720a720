"""Every private or renamed torch API that the library uses, one named function each, tested in tests/test_compat.py.

Nothing else in the library imports a torch name with a leading underscore. Tested on torch 2.13.0.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def all_gather_single(out: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    """Concatenate every rank's `shard` along dim 0 into `out` (named `all_gather_into_tensor` before torch 2.13)."""
    gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, shard, group=group)


def reduce_scatter_single(out: Tensor, full: Tensor, group: dist.ProcessGroup) -> None:
    """Sum `full` over the ranks and keep this rank's chunk of dim 0 (`reduce_scatter_tensor` before torch 2.13)."""
    scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, full, group=group)


def functional_all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Out-of-place sum that torch.compile can trace."""
    from torch.distributed import _functional_collectives as functional

    return functional.wait_tensor(functional.all_reduce(tensor, "sum", group))


def functional_all_gather(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Out-of-place gather along dim 0 that torch.compile can trace."""
    from torch.distributed import _functional_collectives as functional

    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    return functional.wait_tensor(gather(shard, 0, group))


def functional_reduce_scatter(full: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Out-of-place reduce-scatter along dim 0 that torch.compile can trace."""
    from torch.distributed import _functional_collectives as functional

    scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
    return functional.wait_tensor(scatter(full, "sum", 0, group))


def local_shape_and_offset(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and global offset of this rank's piece of a DTensor, `_StridedShard` placements included."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(local), tuple(offset)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail (RuntimeError) when a bool scalar is false: on the CPU at once, elsewhere without making the host wait."""
    torch._assert_async(condition, message)


def replicate(module: nn.Module | list[nn.Module], mesh: DeviceMesh, **policies: Any) -> None:
    """FSDP2's machinery with whole parameters on every rank: plain data parallelism, gradients all-reduced."""
    from torch.distributed._composable.replicate_with_fsdp import replicate as torch_replicate

    torch_replicate(module, mesh=mesh, **policies)


def set_fsdp_collectives(
    module: nn.Module,
    all_gather: Callable[[Tensor, Tensor, dist.ProcessGroup], None],
    reduce_scatter: Callable[[Tensor, Tensor, dist.ProcessGroup], None],
) -> None:
    """Let an FSDP2 module collect parameters and sum gradients with these, `(out, given, group)` on flat tensors."""
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

    class Gather(AllGather):
        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
        ) -> None:
            all_gather(output_tensor, input_tensor, group)

    class Reduce(ReduceScatter):
        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
        ) -> None:
            if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
                raise NotImplementedError(f"FSDP asked for {op}, which is neither a sum nor a mean.")
            reduce_scatter(output_tensor, input_tensor, group)
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(dist.get_world_size(group))

    module.set_custom_all_gather(Gather())  # type: ignore[operator]
    module.set_custom_reduce_scatter(Reduce())  # type: ignore[operator]


def flatten_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """Several dimensions of a mesh as one, `("fsdp", "cp")` as `fsdp_cp`. Collective when it is asked for first."""
    flat = mesh[names]._flatten("_".join(names))
    set_group_timeout(flat.get_group(), group_timeout())
    return flat


def join_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """Views of one mesh as the dimensions of one view."""
    return DeviceMesh._concatenate(meshes)


def dtensor_like(parameter: Tensor, local: Tensor) -> Tensor:
    """A DTensor cut as `parameter` is, around a local tensor on any device; `local` itself for a plain parameter.

    The public `DTensor.from_local` moves what it is given to the mesh's device.
    """
    return DTensor(local, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else local


def schedule_of_cells(
    stages: list[Any], micro_batches: int, loss: Callable[..., Tensor], cells: list[list[str]]
) -> Any:
    """A pipeline schedule whose ranks do what `cells[rank]` say, as a CSV file of torch's has it; it adds the sends."""
    from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

    schedule = _PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    schedule.pipeline_order = {rank: [_Action.from_str(cell) for cell in row] for rank, row in enumerate(cells)}
    schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    return schedule


@contextmanager
def forwards_only(schedule: Any) -> Iterator[None]:
    """Inside, a pipeline schedule leaves out its backward pass.

    Its own `eval` walks through it, and trips where two neighbouring stages are on one rank.
    """
    from torch.distributed.pipelining.schedules import _ComputationType as Kind

    whole = getattr(schedule, "pipeline_order_with_comms", None)  # schedules of one stage per rank have none
    if whole is not None:
        kept = (Kind.FORWARD, Kind.SEND_F, Kind.RECV_F, Kind.UNSHARD, Kind.RESHARD)
        parts = {rank: [part for a in row for part in a.sub_actions or (a,)] for rank, row in whole.items()}
        forwards = {rank: [part for part in row if part.computation_type in kept] for rank, row in parts.items()}
        schedule.pipeline_order_with_comms = forwards
    try:
        yield
    finally:
        if whole is not None:
            schedule.pipeline_order_with_comms = whole


def schedule_cells(name: str, ranks: int, held: list[int], count: int, micro_batches: int) -> list[list[str]]:
    """What each rank does in torch's multi-stage schedule `name`, cell by cell; empty cells wait.

    Args:
        held: the stages of rank 0, of `count`.
    """
    from types import SimpleNamespace

    from torch.distributed.pipelining.schedules import get_schedule_class

    place = {"group_size": ranks, "group_rank": 0, "num_stages": count, "has_backward": True, "submod": nn.Identity()}
    stages = [SimpleNamespace(**place, stage_index=n, is_first=n == 0, is_last=n == count - 1) for n in held]
    schedule: Any = get_schedule_class(name)(stages, micro_batches)  # type: ignore[arg-type]
    return [["" if a is None else str(a) for a in schedule.pipeline_order[rank]] for rank in range(ranks)]


def compile_within(modules: list[nn.Module], budget: float, backend: str = "inductor") -> None:
    """Compile each module so that it keeps at most this fraction of its activations and makes the others again."""
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    compile_graph = lookup_backend(backend)

    def compile_graph_within(graph: Any, inputs: list[Tensor]) -> Any:
        # What is kept is decided in here; the setting itself is of the whole process.
        with config.patch(activation_memory_budget=budget):
            return compile_graph(graph, inputs)

    for module in modules:  # one function for all of them: what is alike is compiled once
        module.compile(dynamic=False, backend=compile_graph_within)


def forget_meshes() -> None:
    """Empty DTensor's caches of how operations are sharded: they keep every mesh, and so its groups' connections."""
    from torch.distributed.tensor import DTensor, _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo

    MeshTopoInfo.build_from_mesh.cache_clear()  # type: ignore[attr-defined]
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()


def has_attention_sums(q: Tensor) -> bool:
    """Whether torch has a fused attention for queries like these that tells its log of the sum of exponentials."""
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.float64, torch.bfloat16)
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attention_sums(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Fused attention of `q [B, h, S, D]` over `k, v [B, k, T, D]`, and log sum exp of the scores, `[B, h, S]`."""
    ops = torch.ops.aten
    if q.device.type == "cpu":
        out, sums = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        out, sums, *_ = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, sums


def attention_sums_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `attention_sums`; `out` and `sums` may be those of a softmax over more keys."""
    ops, given = torch.ops.aten, (grad, q, k, v, out, sums)
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scale)  # type: ignore[no-any-return]
    # Without dropout the kernel reads no random state.
    nothing = torch.empty(2, dtype=torch.uint64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2])
    return ops._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        *given, *lengths, 0.0, causal, nothing, nothing, scale=scale
    )


def has_prepacked_linear(weight: Tensor) -> bool:
    """Whether torch can lay out a matrix like this for oneDNN once and for all."""
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def prepack_linear(weight: Tensor, rows: int) -> Tensor:
    """`weight [N, E]` laid out for oneDNN and inputs of so many rows: an opaque tensor for `prepacked_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]


def prepacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., E]` times a matrix of `prepack_linear` -> `[..., N]`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def has_int8_linear(x: Tensor, values: Tensor) -> bool:
    """Whether torch multiplies rows like these by int8 values in one kernel that is faster than casting them.

    It reads whole vectors without looking where a row ends (torch 2.13: wrong results and crashes for a width of 24).
    """
    fits = values.dtype == torch.int8 and values.numel() > 0 and values.shape[1] % 32 == 0
    return fits and x.device.type == "cpu" and x.dtype == torch.bfloat16


def int8_linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`x [T, E]` times `scale[:, None] * values [N, E]` -> `[T, N]`."""
    return torch._weight_int8pack_mm(x.contiguous(), values.contiguous(), scale)


def needs_values(error: BaseException) -> bool:
    """Whether a forward on fake tensors failed because it asked for a tensor's value."""
    from torch._subclasses import fake_tensor

    kinds = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    return isinstance(error, kinds) or "data-dependent" in str(error).lower()


@contextmanager
def watch_operations(saw: Callable[[bool, list[Tensor], list[Tensor], int], None]) -> Iterator[None]:
    """Inside, `saw(writes into an argument, tensors read, tensors made, flops)` of every operation below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            count = flop_registry.get(func.overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            saw(func._schema.is_mutable, given, made, flops)
            return out

    with Watch():
        yield


def flatten_tree(tree: Any) -> tuple[list[Any], Any]:
    """(leaves, structure) of nested tuples, lists, dicts and what libraries have registered (transformers' outputs)."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(tree)


def unflatten_tree(leaves: list[Any], structure: Any) -> Any:
    """What `flatten_tree` took apart, with these leaves."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


def storage_number(tensor: Tensor) -> int:
    """A number that tensors of one storage share, and no other tensor has while that storage lives."""
    return tensor.untyped_storage()._cdata


# ---- simulation -------------------------------------------------------------------------------------------------


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """A process group of which only this rank exists: every collective returns at once and moves nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported", category=UserWarning)
            yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


def unreal_tensors() -> Any:
    """A mode, to enter as often as one likes: tensors have shapes, dtypes and storages of a size, and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def intercept(answer: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside, `answer(operation, args, kwargs)` runs every operation on plain tensors, collectives included.

    Operations on DTensors come as those on their local tensors.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Intercept(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented
            return answer(func, args, kwargs or {})

    with Intercept():
        yield


@contextmanager
def storage_resizes(told: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, `told(storage)` after each `storage.resize_`, by which FSDP2 frees and takes gathered parameters."""
    resize = torch.UntypedStorage.resize_

    def noted(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        told(storage)
        return result

    torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def fsdp_took_new_parameters(module: nn.Module) -> None:
    """Tell an FSDP2 module that its parameter objects were replaced; nothing for other modules."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None  # type: ignore[operator]
    group = state and state._fsdp_param_group
    for parameter in group.fsdp_params if group else ():
        parameter.reset_sharded_param()


def group_of_collective(func: Any, args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    """The process group that a collective's operation was given, as an object or by name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    if func.namespace == "c10d":
        found = [value for value in args if isinstance(value, torch.ScriptObject)]
        return dist.ProcessGroup.unbox(found[0]) if found else None
    name: Any = next(value for value in reversed(args) if isinstance(value, str))
    return _resolve_process_group(name)


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """How long every later collective of `group` waits. Mesh dimensions start with half an hour, whatever the job's."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    if dist.get_backend(group) in ("gloo", "nccl"):  # others, such as torch's fake one, wait for nobody
        _set_pg_timeout(timeout, group)


def group_timeout(group: dist.ProcessGroup | None = None) -> timedelta:
    """How long a collective of `group`, by default of the whole job, waits; as it was made, or torch's own default."""
    from torch.distributed.distributed_c10d import _get_default_group, _get_default_timeout

    group = group or _get_default_group()
    options: Any = getattr(group._get_backend(group._device_types[0]), "options", None)
    found: timedelta | None = getattr(options, "_timeout", None)
    return found if found is not None else _get_default_timeout(dist.get_backend(group))


def mesh_groups(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """The process groups of this rank that belong to a mesh alone: its dimensions, and those made of several."""
    root = mesh._get_root_mesh()
    found = [group for one in (root, *root._flatten_mapping.values()) for group in one.get_all_groups()]
    return list({id(group): group for group in found if group is not dist.group.WORLD}.values())


def close_mesh(mesh: DeviceMesh) -> None:
    """Destroy a mesh's process groups. torch's caches keep meshes alive, and so their groups' threads: let go here."""
    groups = mesh_groups(mesh)
    root = mesh._get_root_mesh()
    for one in (root, *root._flatten_mapping.values()):
        one._pg_registry.clear()
    for group in groups:
        dist.destroy_process_group(group)


def has_unreduced_gradients(model: nn.Module) -> bool:
    """Whether an FSDP2 module keeps gradients of micro-batches that it has not summed over the ranks yet."""
    from torch.distributed.fsdp import FSDPModule

    groups = (
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    )
    return any(
        parameter.unsharded_accumulated_grad is not None
        or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
        for group in groups
        for parameter in group.fsdp_params
    )


# ---- graphs -----------------------------------------------------------------------------------------------------


def trace_operations(run: Callable[..., Any], *args: Any) -> Any:
    """The FX graph of the operations that `run(*args)` calls, composite ones whole; args are trees of fake tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    noisy = logging.getLogger("torch._subclasses.fake_tensor")  # shows the traceback of errors that callers answer
    before, noisy.disabled = noisy.disabled, True
    try:
        return make_fx(run, pre_dispatch=True)(*args).graph
    finally:
        noisy.disabled = before


def traced_so_far() -> Any:
    """The newest node of the graph that is being traced; None outside of a trace."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else next(iter(reversed(mode.tracer.graph.nodes)), None)
