"""Sums through sockets and shared memory: those of gloo, the same bits on every rank, an error when a rank is gone."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fms_parallel import compat
from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError, RankFailed
from fms_parallel.inference import InferenceEngine
from fms_parallel.inference.local import _connected, _right, _sharing
from fms_parallel.inference.shared import SEGMENT
from fms_parallel.inference.sockets import MOST_BYTES, Sockets
from tests.inference.models import PROMPTS, tiny_llama

CASES = [
    *((torch.float32, (5,)), (torch.float64, (3, 7)), (torch.bfloat16, (1, 768)), (torch.int64, (6,))),
    *((torch.float32, (0, 4)), (torch.float32, (MOST_BYTES,)), (torch.float32, (SEGMENT // 8 + 3,))),
]
"""Dtypes and shapes; the last but one is too large for a socket, the last for a slot of shared memory."""


def three_ranks() -> list[dict[str, Any]]:
    group: Any = dist.group.WORLD
    axis = Axis(group, dist.get_world_size(), dist.get_rank(), "gloo")
    ways = [_connected(axis), _sharing(axis)]
    return [sums(way) for way in ways if way is not None]


def sums(sockets: Sockets) -> dict[str, Any]:
    rank = dist.get_rank()
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
    for wanted in (True, False, "shared_memory"):
        with InferenceEngine(model, max_seq_len=40, local_sockets=wanted) as engine:
            found[str(wanted)] = [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=6)]
            found[f"{wanted} is"] = type(engine.ranks.sockets).__name__
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


def test_sums_are_those_of_gloo_and_the_same_on_three_ranks_through_sockets_and_memory() -> None:
    told = run_ranks(three_ranks, 3)
    assert [len(ways) for ways in told] == [2, 2, 2]
    for every in zip(*told, strict=True):
        for found in every:
            assert all(found["close"])
            assert found["right"]
            assert found["summed"] == every[0]["summed"]
            assert found["first"] == [10, 3]
        for found in every[:2]:
            assert found["gone"].startswith("True tp rank 2 of this host has died or hangs (it closed the connection)")
    assert told[0][0]["summed"][:-2] == told[0][1]["summed"][:-2]  # through sockets the last two are gloo's


def test_an_engine_talks_through_them_and_leaves_the_model_as_it_was() -> None:
    every = run_ranks(two_ranks, 2)
    with InferenceEngine(tiny_llama(2).double(), max_seq_len=40) as engine:
        wanted = [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=6)]
    for found in every:
        assert found["True"] == found["False"] == found["shared_memory"] == wanted
        assert (found["True is"], found["shared_memory is"]) == ("Sockets", "SharedSums")
        assert found["False is"] == "NoneType"
        assert found["restored"]
        assert found["used"]
    assert every[0]["silent"].startswith("tp rank 1 of this host has died or hangs")


@pytest.mark.parametrize("wanted", [True, "shared_memory"])
def test_one_process_has_nobody_to_talk_to(wanted: bool | str) -> None:
    with pytest.raises(ConfigError, match=f"local_sockets={wanted!r}: only ranks of tp"):
        InferenceEngine(tiny_llama(2), local_sockets=wanted)


def test_an_unknown_way_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown word of local_sockets 'shared'.*Known: shared_memory"):
        InferenceEngine(tiny_llama(2), local_sockets="shared")
