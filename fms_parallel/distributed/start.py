"""Start-up and shut-down of the process group, for jobs that torchrun started.

It knows the launcher's protocol (RANK, WORLD_SIZE, ...) and the one safe order of leaving; it knows no layouts.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fms_parallel import compat
from fms_parallel.errors import ConfigError, unknown

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

LONGEST_TIMEOUT = 1e9
"""Seconds, 31 years: backends count in nanoseconds of 64 bits."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process. One process without a launcher is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Launch:
        """Read torchrun's variables; without RANK this is a job of one process.

        Raises:
            ConfigError: a variable that is missing or is not a number.
        """
        if "RANK" not in variables:
            return cls()
        rank, world = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
        local = _number(variables, "LOCAL_RANK", rank)
        return cls(rank, world, local, _number(variables, "LOCAL_WORLD_SIZE", world))


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    word = variables.get(name, "" if default is None else str(default))
    if not word.isdecimal():
        given = f"{name}={word!r} is not a number" if word else f"RANK is set but {name} is not"
        raise ConfigError(f"{given}: start the job with torchrun, or unset RANK for one process.")
    return int(word)


def pick_device(device_type: str, launch: Launch) -> torch.device:
    """This rank's device, made current.

    Raises:
        ConfigError: no such device type here, or fewer GPUs than ranks on this node.
    """
    if device_type not in BACKENDS:
        raise ConfigError(unknown("device type", device_type, BACKENDS))
    if device_type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device type 'cuda': this torch build or machine has no CUDA device; use --device_type cpu.")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU: each rank needs its own and the node has "
            f"{torch.cuda.device_count()}; start with --nproc_per_node={torch.cuda.device_count()}."
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device_type: str = "cpu", timeout_seconds: float = 600.0) -> Iterator[Launch]:
    """Run the body inside a process group of all ranks that the launcher started, and leave it in order.

    A job of one process gets no group at all. Every collective of the job times out after `timeout_seconds`.

    Raises:
        ConfigError: what `Launch.read` and `pick_device` refuse, or a timeout that is none, before the group starts.
    """
    if not 0 < timeout_seconds <= LONGEST_TIMEOUT:
        raise ConfigError(f"timeout {timeout_seconds}: a silent rank is given up after more than 0 seconds, say 600.")
    launch = Launch.read()
    pick_device(device_type, launch)
    if launch.world_size == 1 or dist.is_initialized():
        yield launch
        return
    dist.init_process_group(BACKENDS[device_type], timeout=timedelta(seconds=timeout_seconds))
    try:
        yield launch
    except BaseException:
        # The others may wait in a collective that this rank will never join: leave without a barrier.
        abandon()
        raise
    leave()


def require_group() -> None:
    """Refuse to go on as one process where the launcher started several ranks and nobody made them a group.

    Raises:
        ConfigError: several ranks, and no process group is running.
    """
    launch = Launch.read()
    if launch.world_size > 1 and not dist.is_initialized():
        raise ConfigError(
            f"{launch.world_size} ranks were started but no process group is running: put these calls inside "
            "`with process_group():`, from fms_parallel.distributed.start."
        )


@contextmanager
def first_rank_first(launch: Launch) -> Iterator[None]:
    """Run the body on the first rank of each node, then on the others: what it makes on disk is made once.

    A failure of the first rank is raised on all ranks of the job.
    """
    failure: Exception | None = None
    if launch.local_rank == 0:
        try:
            yield
        except Exception as error:
            failure = error
    _agree(failure, launch)
    if launch.local_rank != 0:
        yield


def _agree(failure: Exception | None, launch: Launch) -> None:
    if launch.world_size == 1:
        words: list[str | None] = [None if failure is None else str(failure)]
    else:
        words = [None] * launch.world_size
        dist.all_gather_object(words, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, word in enumerate(words):
        if word is not None:
            raise ConfigError(f"rank {rank} failed: {word}")


def leave() -> None:
    """Leave the process group after success: everybody's work is done before anybody ends.

    gloo's threads let go of a finished collective's tensors a moment after it is reported done, which takes Python's
    lock: a thread that asks for it while the interpreter ends is killed, and the process with it (`terminate called
    without an active exception`, about one job in ten). Waiting for the others in a barrier gives the lock to those
    threads. Collecting garbage first drops meshes and modules that nobody uses, and so the threads of their groups.
    """
    if not dist.is_initialized():
        return
    compat.forget_meshes()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def abandon() -> None:
    """Leave the process group after a failure: close the connections so that peers fail at once, not at a timeout."""
    if dist.is_initialized():
        dist.destroy_process_group()
