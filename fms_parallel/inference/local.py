"""How the ranks of tp on one host talk while they decode: through sockets, or memory that they share, or the backend.

Whatever it is, every rank has tried it first: its sums are those of the backend, and it takes less time. It knows the
ways there are and one group of ranks; how each of them sums is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.neighbours import meet
from fms_parallel.distributed.shared_memory import SharedMemory
from fms_parallel.errors import ConfigError, unknown
from fms_parallel.inference.shared import SEGMENT, SharedSums
from fms_parallel.inference.sockets import Sockets
from fms_parallel.log import get_logger
from fms_parallel.modules.tp import TPModule

log = get_logger(__name__)

TEST_SIZES = (1, 7, 768, 4096)
TEST_ROUNDS = 10

SHARED_MEMORY = "shared_memory"
"""Word of `local_sockets`."""


def connect(model: nn.Module, wanted: bool | str | None) -> Sockets | None:
    """Sockets between the ranks of tp; None on all of them where they share no host, or gain nothing. Collective.

    Args:
        wanted: None: where they can be. True: it is an error where they cannot. False: not. `shared_memory`: as True,
            and sums go through memory that the ranks share where that can be had, found right and faster than gloo.
    Raises:
        ConfigError: they are wanted for a model that is not cut by tp, or not on the host; an unknown word.
    """
    if isinstance(wanted, str) and wanted != SHARED_MEMORY:
        raise ConfigError(unknown("word of local_sockets", wanted, (SHARED_MEMORY,)))
    axis = next((module.axis for module in model.modules() if isinstance(module, TPModule)), None)
    if axis is None or axis.size == 1 or axis.backend != "gloo" or axis.own_means is not None:
        if wanted:
            raise ConfigError(
                f"local_sockets={wanted!r}: only ranks of tp that compute on the CPU have them; leave it out."
            )
        return None
    if wanted is False:
        return None
    if wanted == SHARED_MEMORY:
        if (shared := _tried(_sharing(axis), axis)) is not None:
            return shared.attach(model)
        log.info("the ranks of tp share no memory that is right and faster than %s: sockets are tried", axis.backend)
    found = _tried(_connected(axis), axis)
    if found is None:
        log.info("the ranks of tp are not on one host, or gain nothing: they talk over %s", axis.backend)
        return None
    return found.attach(model)


def _tried(found: Sockets | None, axis: Axis) -> Sockets | None:
    """What every rank has, and has found right and faster; None on all of them otherwise."""
    if _all_agree(found is not None, axis):
        assert found is not None
        if _all_agree(_right(found), axis) and _all_agree(_faster(found), axis):
            return found
    if found is not None:
        found.close()
    return None


def _connected(axis: Axis) -> Sockets | None:
    """To all others; None where somebody is not on this host."""
    peers = meet(axis.group)
    if len(peers) == axis.size - 1:
        return Sockets(axis, peers)
    for peer in peers.values():
        peer.close()
    return None


def _sharing(axis: Axis) -> Sockets | None:
    """Memory shared with all others; None where somebody's cannot be read."""
    memory = SharedMemory.among(axis.group, SEGMENT)
    if memory is not None and len(memory.theirs) == axis.size - 1:
        return SharedSums(axis, memory)
    if memory is not None:
        memory.close()
    return None


def _all_agree(mine: bool, axis: Axis) -> bool:
    word = torch.tensor([int(mine)])
    dist.all_reduce(word, op=dist.ReduceOp.MIN, group=axis.group)
    return bool(word.item())


def _right(sockets: Sockets) -> bool:
    """Whether sums are those of the backend."""
    axis, right = sockets.axis, True
    generator = torch.Generator().manual_seed(axis.rank)
    for dtype in (torch.float32, torch.bfloat16):
        for size in (*TEST_SIZES, sockets.most_bytes // dtype.itemsize + 3):  # the last in parts, or by the backend
            x = torch.randn(size, generator=generator).to(dtype)
            wanted, mine = x.clone(), x.clone()
            dist.all_reduce(wanted, group=axis.group)
            sockets.all_reduce(mine, axis.group)
            close = 0.0 if axis.size == 2 else 4 * torch.finfo(dtype).eps * axis.size  # another order of summing
            right &= bool(torch.allclose(mine, wanted, rtol=close, atol=close))
    return right


def _faster(sockets: Sockets) -> bool:
    """Whether what there is much of, activations of a token or of a prompt, is summed in less time."""
    x, group = torch.zeros(sockets.usual), sockets.axis.group
    mine = _seconds(lambda: sockets.all_reduce(x, group))
    theirs = _seconds(lambda: dist.all_reduce(x, group=group))
    how = (x.nbytes >> 10, mine * 1e6, type(sockets).__name__, theirs * 1e6)
    log.debug("an all-reduce of %d KiB: %.0f us through %s, %.0f us over the backend", *how)
    return mine < theirs


def _seconds(call: Callable[[], object]) -> float:
    """Of the quickest of some calls."""
    best = float("inf")
    for _ in range(TEST_ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
