"""`Sockets`: small sums between ranks on one host, through sockets of its kernel.

Over gloo an all-reduce of one token's activations costs hundreds of microseconds of CPU, most of it in waking threads;
a decode step has two for each layer. Here each rank writes its numbers to every other's socket and reads theirs: two
system calls for each peer, no thread, no spinning, no assumption about the order in which a processor's writes are
seen. All ranks add in rank order, so all have the same bits. What is too large for a socket's buffer stays with gloo,
or where that is asked for goes through memory that the ranks share (shared.py).

It knows tensors and one group of ranks. `local.connect` gives it only where a self-test has found it right and faster.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.distributed.collectives import MEANS, Axis, Means
from fms_parallel.errors import RankFailed
from fms_parallel.modules.tp import TPModule

MOST_BYTES = 32 << 10
"""Of one message: both sides write before they read, so it must fit a socket's buffer."""


class Sockets:
    """A line of ranks on one host, each connected to each.

    Args:
        axis: the ranks. peers: rank -> the socket to it.
    Attributes:
        most_bytes: of a tensor that does not stay with the backend. usual: numbers of a sum that there is much of.
    """

    most_bytes = MOST_BYTES
    usual = 1 << 10

    def __init__(self, axis: Axis, peers: dict[int, socket.socket]) -> None:
        self.axis, self.peers = axis, peers
        self._means = MEANS[axis.backend]
        self._changed: list[TPModule] = []
        seconds = compat.group_timeout(axis.group).total_seconds()
        for peer in peers.values():
            peer.setblocking(True)
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def attach(self, model: nn.Module) -> Sockets:
        """Let the tp modules of `model` talk through these, until `close`."""
        means = Means(self.all_reduce, self.all_gather, self.start_all_gather, self.reduce_scatter)
        self._changed = [module for module in model.modules() if isinstance(module, TPModule)]
        for module in self._changed:
            module.axis = replace(module.axis, own_means=means)
        return self

    def all_reduce(self, x: Tensor, group: dist.ProcessGroup) -> None:
        """Sum a contiguous `x` over the ranks, in place."""
        if not self._fits(x):
            self._means.all_reduce(x, group)
            return
        terms = self._traded(x)
        if len(terms) == 2:  # either order has the same bits
            x.add_(terms[1 - self.axis.rank])
        else:
            x.copy_(_sum(terms))

    def all_gather(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        """Every rank's `x` `[n, ...]` into `out` `[size * n, ...]`."""
        if not self._fits(x):
            self._means.all_gather(out, x, group)
            return
        torch.cat(self._traded(x), out=out)

    def start_all_gather(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
        """`all_gather` that is waited for elsewhere; what is small is there at once."""
        if not self._fits(x):
            return self._means.start_all_gather(out, x, group)
        torch.cat(self._traded(x), out=out)
        return lambda: None

    def reduce_scatter(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        """`x` `[size * n, ...]` summed over the ranks, this rank's `[n, ...]` into `out`."""
        if not self._fits(x):
            self._means.reduce_scatter(out, x, group)
            return
        rows = slice(self.axis.rank * out.shape[0], (self.axis.rank + 1) * out.shape[0])
        out.copy_(_sum([term[rows] for term in self._traded(x)]))

    def first(self, x: Tensor) -> None:
        """What the first of the ranks has, in place."""
        if not self._fits(x):
            dist.broadcast(x, group=self.axis.group, group_src=0)
            return
        view = _bytes(x)
        if self.axis.rank == 0:
            for peer in self.peers:
                self._send(peer, view)
        else:
            self._receive(0, view)

    def close(self) -> None:
        """Nothing comes any more; the model talks as before."""
        for module in self._changed:
            module.axis = replace(module.axis, own_means=None)
        self._changed = []
        for peer in self.peers.values():
            peer.close()
        self.peers = {}

    def _fits(self, x: Tensor) -> bool:
        return x.is_cpu and x.nbytes <= self.most_bytes

    def _traded(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in rank order."""
        view = _bytes(x)
        for peer in self.peers:
            self._send(peer, view)
        found = []
        for rank in range(self.axis.size):
            if rank == self.axis.rank:
                found.append(x)
            else:
                found.append(torch.empty_like(x))
                self._receive(rank, _bytes(found[-1]))
        return found

    def _send(self, peer: int, view: memoryview) -> None:
        try:
            self.peers[peer].sendall(view)
        except (OSError, KeyError) as error:
            raise _failed(peer, error) from error

    def _receive(self, peer: int, view: memoryview) -> None:
        place = 0
        while place < len(view):  # a signal may end the wait for all of it
            try:
                came = self.peers[peer].recv_into(view[place:], len(view) - place, socket.MSG_WAITALL)
            except (OSError, KeyError) as error:
                raise _failed(peer, error) from error
            if came == 0:
                raise _failed(peer, "it closed the connection")
            place += came


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """In the order of the ranks."""
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, of any dtype."""
    return memoryview(x.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _failed(peer: int, why: object) -> RankFailed:
    return RankFailed(f"tp rank {peer} of this host has died or hangs ({why}). See its own output.")
