"""Ranks of one host: who they are, memory that they share, and tensors that go through it."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed import neighbours, shared_memory
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.shared_memory import SharedMemory, free_bytes
from fms_parallel.distributed.trade import ALIGNED, Trade, Trades, loads, pieces
from fms_parallel.errors import RankFailed

# ---- what lies where, without ranks ------------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(), (1,), (0, 3), (7,), (5, 3), (1, 1, 9), (3, 1, 70), (40, 33), (2, 65, 3)]


@pytest.mark.parametrize("most", [1, 2, 7, 64, 10_000])
def test_pieces_hold_every_element_once_and_are_no_larger_than_asked(most: int) -> None:
    for shape in SHAPES:
        tensor = torch.zeros(shape)
        for piece in pieces(tensor, most):
            assert 0 < piece.numel() <= most
            piece += 1
        assert bool((tensor == 1).all()), shape


def test_both_ends_agree_on_what_lies_where_whatever_their_strides() -> None:
    here = [torch.zeros(shape, dtype=kind) for shape in SHAPES for kind in (torch.float64, torch.bfloat16, torch.int8)]
    plans = [[[(p.shape, p.dtype, start) for p, start in load] for load in loads(x, 512)] for x in (here, empty(here))]
    assert plans[0] == plans[1] and len(plans[0]) > 10
    for load in loads(here, 512):
        end = 0
        for piece, start in load:
            assert start >= end and start % ALIGNED == 0
            end = start + piece.nbytes
        assert end <= 512
    assert sum(p.numel() for load in loads(here, 512) for p, _ in load) == sum(x.numel() for x in here)


# ---- how much there is -------------------------------------------------------------------------------------------


def test_what_is_free_is_the_least_of_the_system_and_the_control_group(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == 0  # nobody says: nothing is taken
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   2000 kB\n")
    assert free_bytes(tmp_path) == 2000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "5000\n")
    assert free_bytes(tmp_path) == 2000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "65000\n")
    assert free_bytes(tmp_path) == 60000
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "4000")
    write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "4100")
    assert free_bytes(tmp_path) == 0


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_a_host_that_is_short_of_memory_gives_none(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "fms_parallel")
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 64 << 20)
    assert shared_memory._segment((4 << 20) + 1) is None
    assert "a segment of 4194305 bytes is more than 1/16 of the 67108864 that are free" in caplog.text
    os.close(shared_memory._segment(4 << 20) or 0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    assert shared_memory._segment(4096) is None and "No space left on device" in caplog.text
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_has_no_name_and_keeps_its_size(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    descriptor = shared_memory._segment(8192)
    assert descriptor is not None and set(os.listdir("/dev/shm")) == before
    own = shared_memory._mapped(descriptor, 8192, writable=True)
    theirs = shared_memory._mapped(descriptor, 8192, writable=False)
    with pytest.raises(OSError):
        os.ftruncate(descriptor, 4096)
    os.close(descriptor)
    own[5] = 77
    assert int(theirs[5]) == 77
    del own, theirs
    gc.collect()
    assert "memfd:fms_parallel" not in Path("/proc/self/maps").read_text()


# ---- who is let in -----------------------------------------------------------------------------------------------


def test_a_door_opens_to_those_who_know_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SECONDS", 0.3)
    name, word, known = f"\0fms_parallel-{secrets.token_hex(16)}", b"o" * 16, b"k" * 16
    door = neighbours._door(name, 4)
    assert door is not None
    stranger, friend = neighbours._call(name, b"s" * 16), neighbours._call(name, known)
    assert stranger is not None and friend is not None
    with door:
        found = neighbours._admit(door, {known: 3, b"a" * 16: 1}, word)  # one who is expected does not come
    assert list(found) == [3] and neighbours._answered(friend, word)
    assert not neighbours._answered(stranger, word)
    assert neighbours._call(name, known) is None  # closed
    for peer in (stranger, friend, *found.values()):
        peer.close()


# ---- two ends in one process -------------------------------------------------------------------------------------


@contextmanager
def two_ends(size: int, seconds: float = 5.0) -> Iterator[tuple[Trade, Trade]]:
    """Ranks 0 and 1, as `SharedMemory.among` makes them."""
    sockets = socket.socketpair(socket.AF_UNIX)
    segments = [shared_memory._segment(size) for _ in range(2)]
    memories = []
    for rank in range(2):
        own, theirs = (shared_memory._mapped(segments[one] or 0, size, one == rank) for one in (rank, 1 - rank))
        memories.append(SharedMemory(rank, own, {1 - rank: theirs}, {1 - rank: sockets[rank]}, {0: (1,), 1: (0,)}))
    for segment in segments:
        os.close(segment or 0)
    yield Trade(memories[0], seconds), Trade(memories[1], seconds)
    for memory in memories:
        memory.close()


def some(seed: int) -> list[Tensor]:
    """Of many dtypes and shapes, some of them no run of memory."""
    draw = torch.Generator().manual_seed(seed)
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    found = [(torch.rand(shape, generator=draw) * 50).to(kind) for shape in SHAPES for kind in kinds]
    return [*found, torch.randn(90, 40, generator=draw)[:, 3:21], torch.randn(33, 50, generator=draw).t()]


def empty(tensors: list[Tensor]) -> list[Tensor]:
    """Room for the same in other strides."""
    return [x.new_zeros(x.shape[::-1]).permute(tuple(reversed(range(x.dim())))) for x in tensors]


def test_tensors_arrive_bit_for_bit_through_little_memory() -> None:
    with two_ends(4096) as (one, other):
        given = [some(1), some(2)]
        found = [empty(given[1]), empty(given[0])]
        for _ in range(2):  # the second time slots are in use and counted on
            threads = [
                threading.Thread(target=trade, args=({1 - rank: given[rank]}, {1 - rank: found[rank]}))
                for rank, trade in enumerate((one, other))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert all(torch.equal(a, b) for a, b in zip(found[0] + found[1], given[1] + given[0], strict=True))
            for x in found[0] + found[1]:
                x.zero_()


def test_a_neighbour_that_is_silent_or_gone_is_named() -> None:
    x = torch.ones(5000)
    with two_ends(4096, seconds=0.2) as (one, other):
        with pytest.raises(RankFailed, match=r"rank 1 of this host said nothing for 0\.2 s"):
            one({1: [x]}, {})
        other.memory.close()
        with pytest.raises(RankFailed, match="rank 1 of this host has died or left") as caught:
            one({}, {1: [x]})
        assert isinstance(caught.value.__cause__, OSError)  # it was seen to be gone, not waited for


def test_what_a_neighbour_wrote_before_it_left_still_arrives() -> None:
    x, found = torch.arange(256.0), torch.zeros(256)
    with two_ends(4096) as (one, other):
        other({0: [x]}, {})  # fits a slot: nobody is waited for
        other.memory.close()
        one({}, {1: [found]})
        assert torch.equal(found, x)


# ---- ranks -------------------------------------------------------------------------------------------------------


def ring(memory: SharedMemory, seed: int) -> bool:
    """Everybody sends something else to each neighbour."""
    trade = Trade(memory, 20.0)
    rank = memory.rank
    sent = {peer: some(100 * seed + 10 * rank + peer) for peer in trade.peers}
    found = {peer: empty(some(0)) for peer in trade.peers}
    trade(sent, found)
    expected = {peer: some(100 * seed + 10 * peer + rank) for peer in trade.peers}
    return all(torch.equal(a, b) for peer in found for a, b in zip(found[peer], expected[peer], strict=True))


def four_ranks() -> dict[str, Any]:
    rank, size = dist.get_rank(), 1 << 14
    shared_memory.log.setLevel(logging.INFO)
    open_before, in_shm = len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))
    memory = SharedMemory.among(None, size)
    assert memory is not None
    found: dict[str, Any] = {"all": memory.neighbours[rank], "right": ring(memory, 1)}
    memory.close()
    del memory
    gc.collect()
    found["left"] = (
        len(os.listdir("/proc/self/fd")) - open_before,
        sorted(os.listdir("/dev/shm")) == in_shm,
        Path("/proc/self/maps").read_text().count("memfd:fms_parallel"),
    )
    honest = shared_memory.free_bytes
    if rank == 3:
        shared_memory.free_bytes = lambda root=Path("/"): 1000
    memory = SharedMemory.among(None, size)
    shared_memory.free_bytes = honest
    found["short"] = None if memory is None else (memory.neighbours[rank], ring(memory, 2), sorted(memory.sockets))
    if memory is not None:
        memory.close()
    take = shared_memory._take
    if rank == 1:  # it cannot read the others, who can read it
        shared_memory._take = lambda peer, size: take(peer, size + 1)
    memory = SharedMemory.among(None, size)
    shared_memory._take = take
    found["one way"] = None if memory is None else (memory.neighbours[rank], ring(memory, 4))
    if memory is not None:
        memory.close()
    trades = Trades()
    made = trades.get(size)
    found["trades"] = (trades.get(64) is None, trades.get(size) is made is not None, trades.nbytes == size)
    trades.close()
    found["trades"] += (trades.nbytes == 0, trades.get(size) is not made)
    trades.close()
    door = neighbours._door
    if rank == 1:
        neighbours._door = lambda name, callers: None
    if rank == 2:  # a door that leads nowhere from here, as one on another host
        neighbours._door = lambda name, callers: door(name + "elsewhere", callers)
    memory = SharedMemory.among(None, size)
    neighbours._door = door
    found["elsewhere"] = None if memory is None else (memory.neighbours[rank], ring(memory, 3))
    if memory is not None:
        memory.close()
    return found


def test_ranks_find_their_neighbours_and_trade_with_those_alone() -> None:
    every = run_ranks(four_ranks, 4)
    for rank, found in enumerate(every):
        assert found["all"] == tuple(other for other in range(4) if other != rank) and found["right"]
        assert found["left"] == (0, True, 0) and all(found["trades"])
    for rank, found in enumerate(every[:3]):
        others = [other for other in range(3) if other != rank]
        assert found["short"] == (tuple(others), True, others)
    for rank, others in ((0, (2, 3)), (2, (0, 3)), (3, (0, 2))):
        assert every[rank]["one way"] == (others, True)
    assert every[1]["one way"] is None
    assert every[3]["short"] is None and every[1]["elsewhere"] is None
    # Rank 2 gets through the doors of lower ranks; nobody gets through its own.
    assert [found["elsewhere"] for found in every] == [((2, 3), True), None, ((0,), True), ((0,), True)]
