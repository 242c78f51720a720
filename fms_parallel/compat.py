"""Every private or renamed torch API that the library uses, one named function each, tested in tests/test_compat.py.

Nothing else in the library imports a torch name with a leading underscore. Tested on torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    return mesh[names]._flatten("_".join(names))


def join_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """Views of one mesh as the dimensions of one view."""
    return DeviceMesh._concatenate(meshes)


def dtensor_like(parameter: Tensor, local: Tensor) -> Tensor:
    """A DTensor cut as `parameter` is, around a local tensor on any device; `local` itself for a plain parameter.

    The public `DTensor.from_local` moves what it is given to the mesh's device.
    """
    return DTensor(local, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else local


def schedule_of_cells(stages: list[Any], micro_batches: int, loss: Callable[..., Tensor], cells: list[list[str]]) -> Any:
    """A pipeline schedule whose ranks do what `cells[rank]` say, as a CSV file of torch's has it; torch adds the sends."""
    from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

    schedule = _PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    schedule.pipeline_order = {rank: [_Action.from_str(cell) for cell in row] for rank, row in enumerate(cells)}
    schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    return schedule


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
    cpu = weight.device.type == "cpu" and weight.numel() > 0 and torch.backends.mkldnn.is_available()
    return cpu and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and _mkldnn_bf16())


def _mkldnn_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack_linear(weight: Tensor, rows: int) -> Tensor:
    """`weight [N, E]` laid out for oneDNN and inputs of so many rows: an opaque tensor for `prepacked_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]


def prepacked_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., E]` times a matrix of `prepack_linear` -> `[..., N]`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def has_int8_linear(x: Tensor, values: Tensor) -> bool:
    """Whether torch multiplies rows like these by int8 values in one kernel that is faster than casting them."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and values.dtype == torch.int8 and values.numel() > 0


def int8_linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`x [T, E]` times `scale[:, None] * values [N, E]` -> `[T, N]`."""
    return torch._weight_int8pack_mm(x, values, scale)


@contextmanager
def fake_tensors() -> Iterator[Callable[[Tensor, torch.dtype | None], Tensor]]:
    """Inside, operations make tensors with shapes and without memory; gives `fake(tensor, dtype or None)`, on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield fake


def needs_values(error: BaseException) -> bool:
    """Whether a forward on fake tensors failed because it asked for a tensor's value."""
    from torch._subclasses import fake_tensor

    kinds = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    return isinstance(error, kinds) or "data-dependent" in str(error).lower()


@contextmanager
def watch_operations(saw: Callable[[Any, list[Tensor], list[Tensor], int], None]) -> Iterator[None]:
    """Inside, `saw(operation, tensor arguments, tensor results, flops)` is told of every operation below autograd."""
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
            saw(func, given, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], flops)
            return out

    with Watch():
        yield


def storage_number(tensor: Tensor) -> int:
    """A number that tensors of one storage share, and no other tensor has while that storage lives."""
    return tensor.untyped_storage()._cdata
