"""`Sockets`: small sums between ranks on one host, through sockets of its kernel.

Over gloo an all-reduce of one token's activations costs hundreds of microseconds of CPU, most of it in waking threads;
a decode step has two for each layer. Here each rank writes its numbers to every other's socket and reads theirs: two
system calls for each peer, no thread, no spinning, no assumption about the order in which a processor's writes are
seen. All ranks add in rank order, so all have the same bits. What is too large for a socket's buffer stays with gloo.

It knows tensors and one group of ranks. `connect` gives it only where a self-test has found it right and faster.
"""

from __future__ import annotations

import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.distributed.collectives import MEANS, Axis, Means
from fms_parallel.errors import ConfigError, RankFailed
from fms_parallel.log import get_logger
from fms_parallel.modules.tp import TPModule

log = get_logger(__name__)

MOST_BYTES = 32 << 10
"""Of one message: both sides write before they read, so it must fit a socket's buffer."""
TEST_SIZES = (1, 7, 768, 4096)
TEST_ROUNDS = 10


class Sockets:
    """A line of ranks on one host, each connected to each.

    Args:
        axis: the ranks. peers: rank -> the socket to it.
    """

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
        if not _fits(x):
            self._means.all_reduce(x, group)
            return
        terms = self._traded(x)
        if len(terms) == 2:  # either order has the same bits
            x.add_(terms[1 - self.axis.rank])
        else:
            x.copy_(_sum(terms))

    def all_gather(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        """Every rank's `x` `[n, ...]` into `out` `[size * n, ...]`."""
        if not _fits(x):
            self._means.all_gather(out, x, group)
            return
        torch.cat(self._traded(x), out=out)

    def start_all_gather(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
        """`all_gather` that is waited for elsewhere; what is small is there at once."""
        if not _fits(x):
            return self._means.start_all_gather(out, x, group)
        torch.cat(self._traded(x), out=out)
        return lambda: None

    def reduce_scatter(self, out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        """`x` `[size * n, ...]` summed over the ranks, this rank's `[n, ...]` into `out`."""
        if not _fits(x):
            self._means.reduce_scatter(out, x, group)
            return
        rows = slice(self.axis.rank * out.shape[0], (self.axis.rank + 1) * out.shape[0])
        out.copy_(_sum([term[rows] for term in self._traded(x)]))

    def first(self, x: Tensor) -> None:
        """What the first of the ranks has, in place."""
        if not _fits(x):
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


def _fits(x: Tensor) -> bool:
    return x.is_cpu and x.numel() * x.element_size() <= MOST_BYTES


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, of any dtype."""
    return memoryview(x.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _failed(peer: int, why: object) -> RankFailed:
    return RankFailed(f"tp rank {peer} of this host has died or hangs ({why}). See its own output.")


# ---- making them ------------------------------------------------------------------------------------------------


def connect(model: nn.Module, wanted: bool | None) -> Sockets | None:
    """Sockets between the ranks of tp; None on all of them where they share no host, or gain nothing. Collective.

    Args:
        wanted: None: where they can be. True: it is an error where they cannot. False: not.
    Raises:
        ConfigError: they are wanted for a model that is not cut by tp, or not on the host.
    """
    axis = next((module.axis for module in model.modules() if isinstance(module, TPModule)), None)
    if axis is None or axis.size == 1 or axis.backend != "gloo" or axis.own_means is not None:
        if wanted:
            raise ConfigError("local_sockets=True: only ranks of tp that compute on the CPU have them; leave it out.")
        return None
    if wanted is False:
        return None
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    try:
        peers = _connected(axis, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not _all_agree(peers is not None, axis):
        log.info("the ranks of tp are not on one host: they talk over %s", axis.backend)
        return None
    assert peers is not None
    found = Sockets(axis, peers)
    if _all_agree(_right(found), axis) and _all_agree(_faster(found), axis):
        return found.attach(model)
    found.close()
    return None


def _connected(axis: Axis, folder: Path) -> dict[int, socket.socket] | None:
    """Rank -> socket; None where somebody cannot be reached."""
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(10.0)
        try:
            door.bind(str(folder / "door"))
            door.listen(axis.size)
            name: str | None = str(folder / "door")
        except OSError:
            name = None
        names: list[Any] = [None] * axis.size
        dist.all_gather_object(names, name, group=axis.group)
        peers: dict[int, socket.socket] = {}
        try:
            for rank in range(axis.rank):
                peers[rank] = socket.socket(socket.AF_UNIX)
                peers[rank].settimeout(10.0)
                peers[rank].connect(names[rank] or "")
                peers[rank].sendall(bytes([axis.rank]))
            for _ in range(axis.rank + 1, axis.size):
                caller, _ = door.accept()
                peers[caller.recv(1)[0]] = caller
        except OSError:
            for peer in peers.values():
                peer.close()
            return None
        return peers


def _all_agree(mine: bool, axis: Axis) -> bool:
    word = torch.tensor([int(mine)])
    dist.all_reduce(word, op=dist.ReduceOp.MIN, group=axis.group)
    return bool(word.item())


def _right(sockets: Sockets) -> bool:
    """Whether sums are those of the backend."""
    axis, right = sockets.axis, True
    generator = torch.Generator().manual_seed(axis.rank)
    for dtype in (torch.float32, torch.bfloat16):
        for size in TEST_SIZES:
            x = torch.randn(size, generator=generator).to(dtype)
            wanted, mine = x.clone(), x.clone()
            dist.all_reduce(wanted, group=axis.group)
            sockets.all_reduce(mine, axis.group)
            close = 0.0 if axis.size == 2 else 4 * torch.finfo(dtype).eps * axis.size  # another order of summing
            right &= bool(torch.allclose(mine, wanted, rtol=close, atol=close))
    return right


def _faster(sockets: Sockets) -> bool:
    """Whether a token's activations are summed in less time."""
    x, group = torch.zeros(1024), sockets.axis.group
    mine = _seconds(lambda: sockets.all_reduce(x, group))
    theirs = _seconds(lambda: dist.all_reduce(x, group=group))
    log.debug("an all-reduce of 4 KiB: %.0f us through sockets, %.0f us over the backend", mine * 1e6, theirs * 1e6)
    return mine < theirs


def _seconds(call: Callable[[], object]) -> float:
    """Of the quickest of some calls."""
    best = float("inf")
    for _ in range(TEST_ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
