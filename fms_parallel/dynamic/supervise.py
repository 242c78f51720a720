"""A supervisor for each rank, so that torchrun, which restarts every rank when one fails, sees none fail.

    torchrun --- supervisor 0 --- member "0"            the processes that torchrun started hold no model; each starts
             --- supervisor 1 --- member "1"            a member, tells the store when it dies, kills it when the others
                              \\-- member "1.1"          have given it up, and may start a replacement, which joins

Members are forked from a server that has loaded torch: a replacement is there in a fraction of a second. It knows
processes and the store; no models.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from fms_parallel.distributed.launch import PRELOAD
from fms_parallel.distributed.start import Launch
from fms_parallel.dynamic.membership import PREFIX, Membership, report_dead
from fms_parallel.errors import ConfigError

LOOK = 0.2
"""Seconds between two looks whether the others have given a member up."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the job's store is, and how members use it: `options` are those of `Membership`."""

    host: str
    port: int
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of_torchrun(cls, **options: Any) -> Rendezvous:
        """The store that torchrun's agent holds.

        Raises:
            ConfigError: no torchrun, or one whose ranks hold the store themselves.
        """
        if "MASTER_ADDR" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ConfigError("members that change need a store that outlives them: start the job with torchrun.")
        return cls(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), tuple(options.items()))

    def connect(self) -> dist.Store:
        """A new connection."""
        limit = timedelta(seconds=dict(self.options).get("timeout", 600.0))
        return dist.TCPStore(self.host, self.port, is_master=False, timeout=limit)


class Supervisor:
    """Starts members and watches over them.

    Args:
        work: called in each member's process as `work(membership, *arguments)`; importable by name.
    """

    def __init__(self, rendezvous: Rendezvous, work: Callable[..., Any], arguments: Sequence[Any] = ()) -> None:
        self.rendezvous, self.work, self.arguments = rendezvous, work, tuple(arguments)
        self.store = rendezvous.connect()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, "fms_parallel.dynamic.elastic", work.__module__])

    def start(self, uid: str, members: Sequence[str] | None, place: Launch) -> BaseProcess:
        """Start a member's process; `members`: of the first generation, None for one that joins later."""
        given = (self.rendezvous, uid, None if members is None else tuple(members), place, self.work, self.arguments)
        process: BaseProcess = self._context.Process(target=_member, args=given, daemon=True)
        process.start()
        return process

    def watch(self, uid: str, process: BaseProcess, kill: bool = True) -> int:
        """Until the member's process has ended; a death is told to the others. Returns its exit code.

        Args:
            kill: a member that the others have given up: frozen, it must not wake and go on.
        """
        store = dist.PrefixStore(PREFIX, self.store)
        while not wait([process.sentinel], timeout=LOOK):
            if kill and store.check([f"dead/{uid}"]):
                process.kill()
        process.join()
        code = process.exitcode or 0
        if code:
            report_dead(self.store, uid, f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        return code

    def is_done(self) -> bool:
        """Whether the run has ended well."""
        return bool(dist.PrefixStore(PREFIX, self.store).check(["done"]))


def supervise(rendezvous: Rendezvous, work: Callable[..., Any], *arguments: Any, replacements: int = 0) -> int:
    """What a process that torchrun started does: one member after another, until the job has ended.

    Args:
        replacements: how many members may be started here after one has died.
    Returns:
        the exit code: 0 when the job ended well, even if this rank's last member died.
    """
    place = Launch.read()
    supervisor = Supervisor(rendezvous, work, arguments)
    members: list[str] | None = [str(rank) for rank in range(place.world_size)]
    uid = str(place.rank)
    for attempt in range(replacements + 1):
        process = supervisor.start(uid, members, place)
        code = supervisor.watch(uid, process)
        if code == 0:
            return 0
        uid, members = f"{place.rank}.{attempt + 1}", None
    # torchrun ends every rank when one fails: stay until the others have finished, or have failed too.
    store = dist.PrefixStore(PREFIX, supervisor.store)
    last = [str(rank) for rank in range(place.world_size)]
    while not supervisor.is_done():
        if store.check(["latest"]):
            last = _members_of(store)
        if all(store.check([f"dead/{one}"]) for one in last):
            return 1
        wait([], timeout=LOOK)
    return 0


def _members_of(store: dist.Store) -> list[str]:
    found: list[str] = json.loads(store.get(f"plan/{int(store.get('latest'))}"))["members"]
    return found


def _member(
    rendezvous: Rendezvous,
    uid: str,
    members: tuple[str, ...] | None,
    place: Launch,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Body of a member's process."""
    gc.freeze()  # what the server has loaded is nobody's garbage
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    numbers = {
        "RANK": place.rank,
        "LOCAL_RANK": place.local_rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_WORLD_SIZE": place.local_world_size,
    }
    os.environ.update({name: str(number) for name, number in numbers.items()})
    work(Membership(rendezvous.connect, uid, members, **dict(rendezvous.options)), *arguments)
