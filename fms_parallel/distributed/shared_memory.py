"""Memory that the ranks of one host share: each gives a segment, and every neighbour maps it.

    rank 0   own [size] ----mapped by----> rank 1: theirs[0]        a byte through the socket says: it is written
    rank 1   own [size] ----mapped by----> rank 0: theirs[1]

A segment is a file without a name (`memfd`) whose descriptor goes through a Unix socket: nobody else can find it, the
limit of /dev/shm is not its own, and it is gone when the last process that maps it is, however that ends. Its memory is
taken when it is made, so a host that has too little says so then and not by killing a rank later. Only who writes a
segment may write it: neighbours map it read-only. It knows sockets and bytes; what is said in them others decide.

Order: a rank writes memory, then a byte to a socket; the other reads the byte, then memory. Entering and leaving the
kernel on both sides orders the two on every processor; nothing here relies on the order of plain stores.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed.neighbours import SECONDS, WORD, meet
from fms_parallel.log import get_logger

log = get_logger(__name__)

SHARE = 16
"""A segment takes at most this part of the memory that is free."""

YES, NO = b"+", b"-"


@dataclass
class SharedMemory:
    """Segments of the ranks of a group that are on this host and reach each other's memory.

    Attributes:
        rank: this one, in the group. own: its segment, uint8 `[size]`. theirs: neighbour -> its segment, to be read.
        sockets: neighbour -> socket. neighbours: rank on this host -> those that map its segment, itself left out.
    """

    rank: int
    own: Tensor
    theirs: dict[int, Tensor]
    sockets: dict[int, socket.socket]
    neighbours: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def among(cls, group: dist.ProcessGroup | None, size: int) -> SharedMemory | None:
        """Segments of `size` bytes, tried out; None on a rank that shares with nobody. Collective over the group."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        found = cls(rank, torch.empty(0, dtype=torch.uint8), {}, meet(group))
        reached = found._share(size)
        told: list[Any] = [None] * world
        dist.all_gather_object(told, sorted(reached), group=group)
        every = {one: tuple(other for other in told[one] if one in told[other]) for one in range(world)}
        found.neighbours = {one: others for one, others in every.items() if others}
        for other in set(found.sockets) - set(every[rank]):
            found.sockets.pop(other).close()
            found.theirs.pop(other, None)
        if not every[rank]:
            log.info("rank %d shares memory with no other rank: none is on its host, or memory is short", rank)
            return None
        return found

    def close(self) -> None:
        """Give the memory back; who still waits for this rank hears that it is gone."""
        for peer in self.sockets.values():
            peer.close()
        self.sockets, self.theirs, self.own = {}, {}, self.own.new_empty(0)

    # ---- making it --------------------------------------------------------------------------------------------------

    def _share(self, size: int) -> list[int]:
        """Hand the segments round; those ranks whose memory this one has read right. Each socket has its own turn."""
        segment = _segment(size)
        try:
            for peer in self.sockets.values():
                peer.settimeout(SECONDS)
                _give(peer, segment)
        finally:
            if segment is not None:
                self.own = _mapped(segment, size, writable=True)
                os.close(segment)
        for rank, peer in self.sockets.items():
            if (theirs := _take(peer, size)) is not None:
                self.theirs[rank] = theirs
        return [] if segment is None else self._tried()

    def _tried(self) -> list[int]:
        """Whether what a rank writes now is what the others read: a secret in memory, told through the socket too."""
        secret = secrets.token_bytes(WORD)
        self.own[:WORD] = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
        self.own[-WORD:] = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
        for peer in self.sockets.values():
            _send(peer, secret)
        right = []
        for rank, theirs in self.theirs.items():
            told = _received(self.sockets[rank], WORD)
            if bytes(theirs[:WORD].tolist()) == bytes(theirs[-WORD:].tolist()) == told:
                right.append(rank)
            self.sockets[rank].settimeout(None)
        return right


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that processes here may still take: the system's, or what their control group has left of it."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return 0
    line = next(line for line in meminfo.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable"))
    free = int(line.split()[1]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        ends = [_number(root / "sys/fs/cgroup" / name) for name in (limit, used)]
        if None not in ends:
            free = min(free, ends[0] - ends[1])  # type: ignore[operator]
    return max(free, 0)


def _number(path: Path) -> int | None:
    """Of a file with one; None where there is no limit (`max`), or no such file."""
    try:
        word = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(word) if word.isdecimal() else None


def _segment(size: int) -> int | None:
    """The descriptor of a new segment whose memory is there; None, with a line in the log, where it cannot be."""
    if not hasattr(os, "memfd_create"):
        log.info("no shared memory: this system has no memfd_create")
        return None
    if size * SHARE > (free := free_bytes()):
        log.info("no shared memory: a segment of %d bytes is more than 1/%d of the %d that are free", size, SHARE, free)
        return None
    import fcntl

    descriptor = None
    try:
        descriptor = os.memfd_create("fms_parallel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(descriptor, 0, size)
        # Nobody can make it shorter: reading memory that a file has lost ends a process.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        log.info("no shared memory: %s", error)
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _mapped(descriptor: int, size: int, writable: bool) -> Tensor:
    """A segment as a tensor, which keeps it mapped."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(
        descriptor, size, mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if writable else 0), access
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)


def _give(peer: socket.socket, segment: int | None) -> None:
    try:
        if segment is None:
            peer.sendall(NO)
        else:
            socket.send_fds(peer, [YES], [segment])
    except OSError as error:
        log.info("a rank of this host is gone: %s", error)


def _take(peer: socket.socket, size: int) -> Tensor | None:
    """A neighbour's segment; None where it has none of this size."""
    try:
        word, descriptors, _, _ = socket.recv_fds(peer, 1, 1)
    except OSError:
        return None
    try:
        if word != YES or len(descriptors) != 1 or os.fstat(descriptors[0]).st_size != size:
            return None
        return _mapped(descriptors[0], size, writable=False)
    except (OSError, ValueError) as error:
        log.info("a neighbour's memory cannot be mapped: %s", error)
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _send(peer: socket.socket, word: bytes) -> None:
    try:
        peer.sendall(word)
    except OSError as error:
        log.info("a rank of this host is gone: %s", error)


def _received(peer: socket.socket, count: int) -> bytes:
    try:
        return peer.recv(count, socket.MSG_WAITALL)
    except OSError:
        return b""
