"""A failure on one rank is a failure on all: nobody goes on to wait for a rank that has stopped.

It knows a process group of all ranks, the default one where none is given; without any this process is the only rank.
A thread beside the training loop has a group of its own: two threads never talk over one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from fms_parallel.errors import CheckpointError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_every_rank(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order. Collective; for small picklable values."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[T | None] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


@contextmanager
def on_every_rank(work: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank and raise on every rank when any of them raised. Collective.

    The body must be rank-local, or a collective that fails on all ranks alike: a rank that fails leaves it early.

    Raises:
        CheckpointError: on the ranks that did not fail themselves, naming the first that did and why; on a rank that
            failed with OSError, naming the work. Other errors go on as they are.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    rank, _ = rank_and_world()
    reasons = from_every_rank(None if failure is None else f"{failure}" or type(failure).__name__, group)
    if isinstance(failure, OSError):
        raise CheckpointError(f"{work} failed: {failure}.") from failure
    if failure is not None:
        raise failure
    for other, reason in enumerate(reasons):
        if reason is not None:
            raise CheckpointError(f"{work} failed on rank {other} (this is rank {rank}): {reason}")
