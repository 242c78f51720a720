"""All ranks of a model go on with the same tokens, and start from the same request.

Every rank computes the same logits, but not always to the last bit: kernels and reduction orders differ. One different
token would send the ranks' sequences apart for good, or let one leave the loop while others wait in a collective. It
knows a mesh and small tensors.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel.errors import ConfigError


class SameOnAllRanks:
    """The ranks of one model's mesh; without a mesh this process is alone and nothing is sent.

    Attributes:
        device: where these ranks compute.
    """

    def __init__(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        self.device = torch.device(mesh.device_type) if mesh is not None else device
        names = () if mesh is None else mesh.mesh_dim_names or ()
        self._groups = [mesh[name].get_group() for name in names if mesh is not None and mesh[name].size() > 1]

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return not self._groups

    @property
    def is_first(self) -> bool:
        """Whether this is the mesh's first rank."""
        return all(dist.get_rank(group) == 0 for group in self._groups)

    def first(self, tokens: Tensor) -> Tensor:
        """What the mesh's first rank has, on all of them (in place). Collective.

        Along one dimension after the other: after each, the ranks that differ from the first in those dimensions only
        have it.
        """
        for group in self._groups:
            dist.broadcast(tokens, group=group, group_src=0)
        return tokens

    def check_same(self, value: object, what: str) -> None:
        """Raise ConfigError on every rank when the `repr` of this value differs on one. Collective."""
        digest = int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
        bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=self.device)
        for group in self._groups:
            dist.all_reduce(bounds, op=dist.ReduceOp.MIN, group=group)
        low, high = bounds[0].item(), -bounds[1].item()
        if low != high:
            raise ConfigError(f"{what} differ between ranks: all ranks of a model must be given the same.")
