"""`run_ranks`: run one function on several local ranks and bring back what each returned.

Ranks are forked from a server that has torch loaded already: starting two costs about 0.3 s, where fresh
interpreters cost 12 s. A watchdog ends the job at the first failure or at the timeout and says which rank it was.
A rank sees what torchrun would tell it (RANK, WORLD_SIZE, ...), so code under test needs no other way in.
It knows processes; it knows nothing of layouts or models. Production jobs are started by torchrun, not by this.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from fms_parallel.errors import RankFailed

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "fms_parallel.distributed.launch",
)
"""What the server of ranks loads, once for all ranks; a server that runs already is taken as it is."""

LEAVING = 10.0
"""Seconds that a rank which has answered gets to end its process."""


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
        RankFailed: naming the first rank that failed, with its traceback; those that did not answer in time; or one
            that answered and then did not end with exit code 0.
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
            process: BaseProcess = context.Process(target=_rank_main, args=(rank, job, sender), daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        results = _collect(ranks, time.monotonic() + timeout, timeout)
        _check_exits([process for process, _ in ranks])
        return results
    finally:
        for process, receiver in ranks:
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
            silent = ", ".join(map(str, sorted(waiting.values())))
            raise RankFailed(
                f"ranks {silent} of {len(ranks)} did not answer within {timeout:.0f} s: one of them hangs, or the job "
                "needs a longer timeout."
            )
        failures = []
        for receiver in cast("list[Connection]", ready):
            rank = waiting.pop(receiver)
            ok, value, moment = _receive(receiver, ranks[rank][0])
            if ok:
                results[rank] = value
            else:
                failures.append((moment, f"rank {rank} of {len(ranks)} {value}"))
        if failures:
            raise RankFailed(min(failures)[1])
    return [results[rank] for rank in range(len(ranks))]


def _receive(receiver: Connection, process: BaseProcess) -> tuple[bool, Any, float]:
    """(succeeded, what the rank returned or how it failed, when)."""
    try:
        answer: tuple[bool, Any, float] = pickle.loads(receiver.recv_bytes())
    except (EOFError, OSError):
        process.join(LEAVING)
        return False, f"died without a word, exit code {process.exitcode}.", 0.0
    return answer


def _check_exits(processes: list[BaseProcess]) -> None:
    """Every rank has answered; a run that succeeded also ends with exit code 0."""
    deadline = time.monotonic() + LEAVING
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            raise RankFailed(f"rank {rank} of {len(processes)} answered, but did not end within {LEAVING:.0f} s.")
        if process.exitcode:
            raise RankFailed(f"rank {rank} of {len(processes)} answered, then died with exit code {process.exitcode}.")


def _rank_main(rank: int, job: _Job, sender: Connection) -> None:
    """Body of one rank's process."""
    gc.freeze()  # what the server has loaded is nobody's garbage: looking through it costs 0.3 s at each end of a rank
    import torch
    import torch.distributed as dist

    from fms_parallel.distributed.start import leave

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world_size, "LOCAL_WORLD_SIZE": job.world_size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    limit = timedelta(seconds=job.timeout)
    try:
        store = dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=limit)
        value = job.function(*job.arguments)
        leave()
        # Pickled here and whole: torch's own way for connections shares memory with a process that is about to end.
        answer = pickle.dumps((True, value, time.time()))
    except BaseException:  # whatever it was, the parent must hear of it
        answer = pickle.dumps((False, f"failed:\n{traceback.format_exc()}", time.time()))
    sender.send_bytes(answer)
    sender.close()
