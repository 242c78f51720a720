"""All ranks of a model go on with the same tokens, and start from the same request.

Every rank computes the same logits, but not always to the last bit: kernels and reduction orders differ. One different
token would send the ranks' sequences apart for good, or let one leave the loop while others wait in a collective. It
knows a mesh and small tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel.errors import ConfigError, RankFailed

if TYPE_CHECKING:
    from fms_parallel.inference.sockets import Sockets


class SameOnAllRanks:
    """The ranks of one model's mesh; without a mesh this process is alone and nothing is sent.

    Args:
        without: dimensions of the mesh whose ranks are not meant: those of each run by themselves.
    Attributes:
        device: where these ranks compute. broken: one of them failed; nothing more can be agreed upon.
    """

    broken = False
    sockets: Sockets | None = None
    """What the ranks of tp talk through, where they have that."""

    def use(self, sockets: Sockets | None) -> None:
        """Talk through these."""
        self.sockets = sockets

    def __init__(self, mesh: DeviceMesh | None, device: torch.device, without: Sequence[str] = ()) -> None:
        self.device = torch.device(mesh.device_type) if mesh is not None else device
        names = () if mesh is None else [name for name in mesh.mesh_dim_names or () if name not in without]
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
        with self._heard():
            self._spread(tokens)
        return tokens

    def _spread(self, tokens: Tensor) -> None:
        for group in self._groups:
            if self.sockets is not None and group == self.sockets.axis.group:
                self.sockets.first(tokens)
            else:
                dist.broadcast(tokens, group=group, group_src=0)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What torch raises when a rank does not take part, as an error with a way out."""
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            raise RankFailed(f"a rank has died or hangs ({error}): see its own output.") from error

    def share(self, sent: bytes) -> bytes:
        """What the first rank sends, on all of them; what others send is dropped. Collective."""
        if self.alone:
            return sent
        sent = sent if self.is_first else b""
        size = int(self.first(torch.tensor([len(sent)], device=self.device)))
        if size == 0:
            return b""
        content = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if sent:
            content.copy_(torch.frombuffer(bytearray(sent), dtype=torch.uint8))
        return bytes(self.first(content).cpu().numpy().tobytes())

    def close(self) -> None:
        """No more will be said."""
        if self.sockets is not None:
            self.sockets.close()
            self.sockets = None

    def check_same(self, value: object, what: str) -> None:
        """Raise ConfigError on every rank when the `repr` of this value differs on one. Collective."""
        digest = int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
        bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=self.device)
        with self._heard():
            for group in self._groups:
                dist.all_reduce(bounds, op=dist.ReduceOp.MIN, group=group)
        low, high = bounds[0].item(), -bounds[1].item()
        if low != high:
            raise ConfigError(f"{what} differ between ranks: all ranks of a model must be given the same.")
