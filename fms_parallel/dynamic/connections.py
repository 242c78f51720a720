"""The sockets of a process group, so that a wait for a lost rank can be ended.

gloo has no abort: a rank that waits for one with a rank in between waits until the timeout. Shutting its connections
down ends the wait at once, as if the other side had gone. NCCL aborts by itself and has no such sockets here. Linux.
Ranks of one host that move state through shared memory wait on sockets of this host, made in the middle of a change.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DESCRIPTORS = Path("/proc/self/fd")


class Connections:
    """Sockets that were made while `noting`; those of this host from then on, gloo's when all of it has connected."""

    def __init__(self) -> None:
        self._noted: set[str] = set()
        self._before: set[str] | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """What connects inside belongs here: open no other connection meanwhile."""
        self._before = before = set(_sockets())
        try:
            yield
        finally:
            self._noted |= set(_sockets()) - before
            self._before = None

    def cut(self) -> int:
        """Shut all of them down; returns how many. From any thread."""
        ended, before = 0, self._before
        for name, descriptor in _sockets().items():
            noted, new = name in self._noted, before is not None and name not in before
            if noted or new:
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    if not noted and connection.family != socket.AF_UNIX:
                        continue
                    connection.getpeername()  # not of one that listens: gloo ends the process when that is shut
                    connection.shutdown(socket.SHUT_RDWR)
                    ended += 1
        return ended

    def forget(self) -> None:
        """They are closed."""
        self._noted.clear()


def _sockets() -> dict[str, int]:
    """The kernel's name of each open socket -> its descriptor."""
    found: dict[str, int] = {}
    for entry in os.listdir(DESCRIPTORS) if DESCRIPTORS.exists() else ():
        with suppress(OSError):
            name = os.readlink(DESCRIPTORS / entry)
            if name.startswith("socket:"):
                found[name] = int(entry)
    return found
