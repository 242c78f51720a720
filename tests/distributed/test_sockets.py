"""Sums through sockets: those of gloo, the same bits on every rank, and an error when a rank is gone."""

from __future__ import annotations

import shutil
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fms_parallel import compat
from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError, RankFailed
from fms_parallel.inference import InferenceEngine
from fms_parallel.inference.sockets import MOST_BYTES, Sockets, _connected, _right
from tests.inference.models import PROMPTS, tiny_llama

CASES = [
    *((torch.float32, (5,)), (torch.float64, (3, 7)), (torch.bfloat16, (1, 768)), (torch.int64, (6,))),
    *((torch.float32, (0, 4)), (torch.float32, (MOST_BYTES,))),
]
"""Dtypes and shapes; the last is too large for a socket."""


def sockets_of_world() -> Sockets:
    group: Any = dist.group.WORLD
    folder = Path(tempfile.mkdtemp())
    axis = Axis(group, dist.get_world_size(), dist.get_rank(), "gloo")
    peers = _connected(axis, folder)
    shutil.rmtree(folder)
    assert peers is not None
    return Sockets(axis, peers)


def three_ranks() -> dict[str, Any]:
    sockets, rank = sockets_of_world(), dist.get_rank()
    group, close, summed = sockets.axis.group, [], []
    for dtype, shape in CASES:
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 8).to(dtype)
        wanted, mine, gathered = x.clone(), x.clone(), x.new_empty(3 * shape[0], *shape[1:])
        dist.all_reduce(wanted)
        sockets.all_reduce(mine, group)
        sockets.all_gather(gathered, x, group)
        later = torch.empty_like(gathered)
        sockets.start_all_gather(later, x, group)()
        part = torch.empty_like(x)
        sockets.reduce_scatter(part, gathered, group)
        rows = gathered[rank * shape[0] : (rank + 1) * shape[0]]
        close.append(
            bool((mine - wanted).abs().max() <= (0.3 if dtype is torch.bfloat16 else 1e-5)) if x.numel() else True
        )
        close.append(torch.equal(gathered, later) and torch.equal(rows, x) and torch.equal(part, rows + rows + rows))
        summed.append(mine.double().flatten()[:64].tolist())
    word = torch.tensor([10 + rank, 3])
    sockets.first(word)
    found = {"close": close, "summed": summed, "first": word.tolist(), "right": _right(sockets)}
    dist.barrier()
    if rank == 2:
        sockets.close()
    dist.barrier()
    found["gone"] = "" if rank == 2 else failure(sockets)
    return found


def failure(sockets: Sockets) -> str:
    start = time.monotonic()
    try:
        sockets.first(torch.zeros(1)) if sockets.axis.rank == 2 else sockets._receive(2, memoryview(bytearray(4)))
    except RankFailed as error:
        return f"{time.monotonic() - start < 5} {error}"
    return "nothing"


def two_ranks() -> dict[str, Any]:
    model = tiny_llama(2, "tp=2").double()
    found: dict[str, Any] = {}
    for wanted in (True, False):
        with InferenceEngine(model, max_seq_len=40, local_sockets=wanted) as engine:
            found[str(wanted)] = [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=6)]
    found["restored"] = all(m.axis.own_means is None for m in model.modules() if hasattr(m, "axis"))
    group: Any = model.get_submodule("head").axis.group  # type: ignore[union-attr]
    compat.set_group_timeout(group, timedelta(seconds=1.2))
    engine = InferenceEngine(model, max_seq_len=40, local_sockets=True)
    compat.set_group_timeout(group, timedelta(seconds=60))
    found["used"] = engine.ranks.sockets is not None
    if found["used"] and dist.get_rank() == 0:
        assert engine.ranks.sockets is not None
        try:
            engine.ranks.sockets._receive(1, memoryview(bytearray(4)))
        except RankFailed as error:
            found["silent"] = str(error)
    dist.barrier()
    engine.ranks.broken = True
    engine.close()
    return found


def test_sums_are_those_of_gloo_and_the_same_on_three_ranks() -> None:
    every = run_ranks(three_ranks, 3)
    for found in every:
        assert all(found["close"])
        assert found["right"]
        assert found["summed"] == every[0]["summed"]
        assert found["first"] == [10, 3]
    for found in every[:2]:
        assert found["gone"].startswith("True tp rank 2 of this host has died or hangs (it closed the connection)")


def test_an_engine_talks_through_them_and_leaves_the_model_as_it_was() -> None:
    every = run_ranks(two_ranks, 2)
    with InferenceEngine(tiny_llama(2).double(), max_seq_len=40) as engine:
        wanted = [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=6)]
    for found in every:
        assert found["True"] == found["False"] == wanted
        assert found["restored"]
        assert found["used"]
    assert every[0]["silent"].startswith("tp rank 1 of this host has died or hangs")


def test_one_process_has_nobody_to_talk_to() -> None:
    try:
        InferenceEngine(tiny_llama(2), local_sockets=True)
    except ConfigError as error:
        assert "only ranks of tp" in str(error)
    else:
        raise AssertionError("not refused")
