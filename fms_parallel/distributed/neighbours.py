"""Who else is on this host: a Unix socket to each rank that runs on this kernel for this user.

That is found out, not told: hosts may share a name, and containers share a host without reaching each other. Each rank
opens a door whose random name it tells over the group; whoever gets through it is here, because such a socket leads to
no other kernel. The door is in Linux's abstract namespace, so it is no file that could be left behind, and it is closed
when all have met. It knows process groups and sockets; it knows nothing of what they are for.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from fms_parallel.log import get_logger

log = get_logger(__name__)

SECONDS = 10.0
"""That a rank waits for another that has come to its door."""

WORD = 16
"""Bytes of a secret."""


def meet(group: dist.ProcessGroup | None = None) -> dict[int, socket.socket]:
    """A socket to each other rank of `group` that is on this host; none where nobody is. Collective.

    Returns:
        rank in the group -> a blocking stream socket without a time limit.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    name, word = f"\0fms_parallel-{secrets.token_hex(WORD)}", secrets.token_bytes(WORD)
    door = _door(name, size)
    told: list[Any] = [None] * size
    dist.all_gather_object(told, (name if door is not None else None, word), group=group)
    found: dict[int, socket.socket] = {}
    for other in range(rank):
        if door is not None and told[other][0] is not None and (called := _call(told[other][0], word)) is not None:
            found[other] = called
    reached: list[Any] = [None] * size
    dist.all_gather_object(reached, sorted(found), group=group)
    if door is not None:
        callers = [other for other in range(rank + 1, size) if rank in reached[other]]
        with door:
            found.update(_admit(door, {told[other][1]: other for other in callers}, word))
    for other in range(rank):
        if other in found and not _answered(found[other], told[other][1]):
            found.pop(other).close()
    for peer in found.values():
        peer.settimeout(None)
    return found


def _door(name: str, callers: int) -> socket.socket | None:
    """A socket that listens; None where this system has no such names."""
    if not hasattr(socket, "AF_UNIX") or not hasattr(socket, "SO_PEERCRED"):
        return None
    door = socket.socket(socket.AF_UNIX)
    try:
        door.bind(name)
        door.listen(callers)
    except OSError as error:
        log.info("this rank meets nobody on its host: %s", error)
        door.close()
        return None
    return door


def _call(name: str, word: bytes) -> socket.socket | None:
    """Through another rank's door; None where it is not on this host."""
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(SECONDS)
    try:
        caller.connect(name)
        if _own(caller):
            caller.sendall(word)
            return caller
    except OSError:
        pass
    caller.close()
    return None


def _admit(door: socket.socket, expected: dict[bytes, int], word: bytes) -> dict[int, socket.socket]:
    """Those who have come and know the word that they told over the group; they are told this rank's."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + SECONDS
    while len(found) < len(expected) and time.monotonic() < deadline:
        door.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            caller, _ = door.accept()
        except OSError:
            break
        caller.settimeout(SECONDS)
        other = expected.get(_read(caller)) if _own(caller) else None
        if other is None:  # a stranger: names of doors are no secret on their host
            caller.close()
            continue
        found[other] = caller
        with suppress(OSError):
            caller.sendall(word)
    return found


def _answered(caller: socket.socket, word: bytes) -> bool:
    return _read(caller) == word


def _read(peer: socket.socket) -> bytes:
    """A secret; less where the other side is gone."""
    try:
        return peer.recv(WORD, socket.MSG_WAITALL)
    except OSError:
        return b""


def _own(peer: socket.socket) -> bool:
    """Whether the other side is a process of this user."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(user == os.geteuid())
