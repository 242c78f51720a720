"""`run_ranks`: run one function on several local ranks and bring back what each returned.

Ranks are forked from a server that has torch loaded already: starting two costs about 0.3 s, where fresh
interpreters cost 12 s. A watchdog ends the job at the first failure or at the timeout and says which rank it was.
It knows processes; it knows nothing of layouts or models. Production jobs are started by torchrun, not by this.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from fms_parallel.errors import RankFailed

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "fms_parallel.distributed.launch",
)


@dataclass(frozen=True)
class _Job:
    """What every rank of one `run_ranks` call needs to know."""

    world_size: int
    port: int
    timeout: float
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*arguments)` on `world_size` gloo ranks of this machine.

    Args:
        function: importable by name (defined at the top of a module); runs inside an initialised process group.
        arguments: picklable, the same for every rank.
        timeout: seconds until every rank must have answered.
    Returns:
        What each rank returned, in rank order (picklable).
    Raises:
        RankFailed: naming the first rank that failed, with its traceback, or those that did not answer in time.
    """
    import torch.distributed as dist

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, function.__module__])
    # The store outlives every rank, so no rank can lose it while leaving.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = _Job(world_size, store.port, timeout, function, arguments)
    ranks: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, job, sender), daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        return _collect(ranks, time.monotonic() + timeout, timeout)
    finally:
        for process, receiver in ranks:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()


def _collect(ranks: list[tuple[BaseProcess, Connection]], deadline: float, timeout: float) -> list[Any]:
    """Wait for every rank's answer; the first failure ends it."""
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} of {len(ranks)} did not answer within {timeout:.0f} s.")
        failures = []
        for receiver in ready:
            rank = waiting.pop(receiver)  # type: ignore[index]
            try:
                ok, value, moment = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                process = ranks[rank][0]
                process.join(timeout=5)
                failures.append((0.0, f"rank {rank} of {len(ranks)} died without a word, exit code {process.exitcode}."))
                continue
            if ok:
                results[rank] = value
            else:
                failures.append((moment, f"rank {rank} of {len(ranks)} failed:\n{value}"))
        if failures:
            raise RankFailed(min(failures)[1])
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(rank: int, job: _Job, sender: Connection) -> None:
    """Body of one rank's process."""
    import torch
    import torch.distributed as dist

    from fms_parallel.distributed.start import leave

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=timedelta(seconds=job.timeout))
        limit = timedelta(seconds=job.timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=limit)
        value = job.function(*job.arguments)
        leave()
        sender.send((True, value, time.time()))
    except BaseException:  # whatever it was, the parent must hear of it
        sender.send((False, traceback.format_exc(), time.time()))
    finally:
        sender.close()
