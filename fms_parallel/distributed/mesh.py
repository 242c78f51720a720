"""The `DeviceMesh` of a layout, and the views of it that strategies need.

One mesh shape serves every layout: all five dimensions (pp, dp, fsdp, cp, tp) are there, those of size one included,
so no strategy has a special case. It knows degrees; it knows nothing of modules.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fms_parallel import compat
from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.start import require_group
from fms_parallel.layout import AXES, ParallelLayout


def build_mesh(layout: ParallelLayout, device_type: str = "cpu") -> DeviceMesh:
    """The mesh of a resolved layout over the running process group, whose timeout all its dimensions get.

    Raises:
        LayoutError: the layout needs another number of ranks than the job has. ConfigError: no process group.
    """
    require_group()
    layout = layout.resolve(dist.get_world_size())
    mesh = init_device_mesh(device_type, layout.degrees, mesh_dim_names=AXES)
    for group in compat.mesh_groups(mesh):
        compat.set_group_timeout(group, compat.group_timeout())
    return mesh


def tp_axis(mesh: DeviceMesh) -> Axis:
    """The ranks that share every matrix with this one."""
    return Axis.of(mesh["tp"])


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh for `fully_shard`: `[fsdp]`, or `[dp, fsdp]` when there are replicas (HSDP).

    With cp, whose ranks would hold copies, parameters are cut over fsdp and cp as one dimension.
    """
    if mesh["cp"].size() == 1:
        return mesh["fsdp"] if mesh["dp"].size() == 1 else mesh["dp", "fsdp"]
    shards = compat.flatten_mesh(mesh, ("fsdp", "cp"))
    return shards if mesh["dp"].size() == 1 else compat.join_meshes([mesh["dp"], shards])


def replica_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Without fsdp, the ranks that hold the same parameters and see other tokens: dp and cp, as one dimension."""
    if mesh["cp"].size() == 1:
        return mesh["dp"]
    return mesh["cp"] if mesh["dp"].size() == 1 else compat.flatten_mesh(mesh, ("dp", "cp"))


def context_axis(mesh: DeviceMesh) -> Axis:
    """The ranks that share every sequence with this one."""
    return Axis.of(mesh["cp"])


def data_shard(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(index, count) of this rank among those that read different rows of the batch; (0, 1) without a mesh."""
    if mesh is None:
        return 0, 1
    dp, fsdp = mesh["dp"], mesh["fsdp"]
    return dp.get_local_rank() * fsdp.size() + fsdp.get_local_rank(), dp.size() * fsdp.size()
