"""Process groups, meshes, DTensor and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def all_gather_single(out: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    """Concatenate every rank's `shard` along dim 0 into `out` (named `all_gather_into_tensor` before torch 2.13)."""
    gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, shard, group=group)


def start_all_gather_single(out: Tensor, shard: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    """`all_gather_single` begun: whole when what is returned has been called."""
    gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = gather(out, shard, group=group, async_op=True)
    return work.wait  # type: ignore[no-any-return]


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
    """Shape and global offset of this rank's piece of a DTensor, `_StridedShard` placements included.

    A strided cut is FSDP2's, of what the other axes had left of that dimension, so it comes last here. torch's own
    helper makes it first, and is wrong by a row where an uneven dimension (97 rows, tp=2) is cut in four again.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    size, offset = list(shape), [0] * len(shape)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank that is not in the mesh holds no piece"
    cuts = [(axis, cut) for axis, cut in enumerate(placements) if isinstance(cut, (Shard, _StridedShard))]
    for axis, cut in sorted(cuts, key=lambda each: isinstance(each[1], _StridedShard)):  # a stable sort
        chunk = -(-size[cut.dim] // mesh.size(axis))
        start = min(coordinate[axis] * chunk, size[cut.dim])
        offset[cut.dim] += start
        size[cut.dim] = min(chunk, size[cut.dim] - start)
    return tuple(size), tuple(offset)


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


def forget_meshes() -> None:
    """Empty DTensor's caches of how operations are sharded: they keep every mesh, and so its groups' connections."""
    from torch.distributed.tensor import DTensor, _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo

    MeshTopoInfo.build_from_mesh.cache_clear()  # type: ignore[attr-defined]
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()


def fsdp_took_new_parameters(module: nn.Module) -> None:
    """Tell an FSDP2 module that its parameter objects were replaced; nothing for other modules."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None  # type: ignore[operator]
    group = state and state._fsdp_param_group
    for parameter in group.fsdp_params if group else ():
        parameter.reset_sharded_param()


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
