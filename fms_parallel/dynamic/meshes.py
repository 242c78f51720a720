"""Meshes kept per layout: switching back and forth makes no process group anew, and none outlives its use.

A mesh of four ranks owns five groups, fifteen threads and some twenty descriptors. It knows meshes; no models.
"""

from __future__ import annotations

import gc
from collections import OrderedDict

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel import compat
from fms_parallel.distributed.mesh import build_mesh
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout


class MeshCache:
    """The meshes of the last `limit` combinations of degrees; layouts that differ in words only share one.

    Args:
        limit: how many are kept, the one in use included.
    """

    def __init__(self, limit: int = 4) -> None:
        if limit < 1:
            raise ConfigError(f"a cache of {limit} meshes: keep at least the one in use.")
        self.limit = limit
        self._known: OrderedDict[tuple[int, ...], DeviceMesh] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def adopt(self, layout: ParallelLayout, mesh: DeviceMesh | None) -> None:
        """Take over a mesh that was built elsewhere: it is destroyed here when it is evicted."""
        if mesh is not None:
            self._known.setdefault(layout.degrees, mesh)

    def get(self, layout: ParallelLayout, device_type: str) -> DeviceMesh | None:
        """The mesh of a resolved layout, None for one process. Collective."""
        if layout.world_size == 1:
            return None
        mesh = self._known.get(layout.degrees)
        if mesh is None:
            mesh = self._known[layout.degrees] = build_mesh(layout, device_type)
        self._known.move_to_end(layout.degrees)
        return mesh

    def evict(self, using: ParallelLayout) -> int:
        """Destroy the longest unused beyond `limit`; never that of `using`. Collective; returns how many."""
        surplus = [degrees for degrees in self._known if degrees != using.degrees]
        surplus = surplus[: max(len(self._known) - self.limit, 0)]
        if surplus:
            gc.collect()  # modules that nobody uses let go of their groups
            dist.barrier()  # the others have finished with them too
            for degrees in surplus:
                compat.close_mesh(self._known.pop(degrees))
            compat.forget_meshes()
        return len(surplus)

    def forget(self) -> None:
        """Drop all, because their process group is gone."""
        self._known.clear()
