"""Every private or renamed torch API that the library uses, one named function each, tested in tests/test_compat.py.

Nothing else in the library imports a torch name with a leading underscore. Tested on torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


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


def set_fsdp_reduce_scatter(
    module: nn.Module, reduce_scatter: Callable[[Tensor, Tensor, dist.ProcessGroup], None]
) -> None:
    """Let an FSDP2 module sum gradients with `reduce_scatter(out, full, group)`, where `full` is flat."""
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

    class Custom(ReduceScatter):
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

    module.set_custom_reduce_scatter(Custom())  # type: ignore[operator]


def flatten_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """Several dimensions of a mesh as one, `("fsdp", "cp")` as `fsdp_cp`. Collective when it is asked for first."""
    return mesh[names]._flatten("_".join(names))


def join_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """Views of one mesh as the dimensions of one view."""
    return DeviceMesh._concatenate(meshes)


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
