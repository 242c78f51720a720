"""Live re-layout over ranks: bitwise the same state, the same losses, the least bytes, harmless refusals."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fms_parallel.checkpoint.agree import from_every_rank
from fms_parallel.distributed import shared_memory
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.trade import Trade
from fms_parallel.dynamic.inventory import Inventory
from fms_parallel.dynamic.meshes import MeshCache
from fms_parallel.dynamic.predict import predict_tables
from fms_parallel.dynamic.relayout import Relayout, resolved
from fms_parallel.dynamic.schedule import LayoutSchedule
from fms_parallel.dynamic.state import TrainingState
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config, get_model
from fms_parallel.models.llama import LLaMA
from fms_parallel.training import train
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from tests.poison import poisoned_memory
from tests.training.runs import OPTIONS, TINY, rows

SIZES: dict[str, Any] = {**TINY, "layers": 5, "dropout": 0.2, "attention_bias": True, "tied": True}
RUN: dict[str, Any] = {**OPTIONS, "max_grad_norm": 0.5, "steps": 18}
CHAIN = {
    2: "fsdp=2,tp=2",
    4: "pp=2,tp=2,sp",
    6: "tp=4,sp,tp_parts=attention",
    8: "pp=2,fsdp=2,stage_split=4,1,schedule=gpipe",
    10: "pp=4,stage_split=1,2,1,1",
    12: "dp=2,fsdp=2",
    14: "cp=2,fsdp=2",
    16: "fsdp=4",
}


def build(layout: ParallelLayout | str, sizes: dict[str, Any] | None = None, **how: Any) -> nn.Module:
    return get_model("llama", "micro", distributed_strategy=layout, **(SIZES | (sizes or {})), **how)


def whole(inventory: Inventory) -> dict[str, list[Tensor]]:
    """The full tensors of everything, put together from all ranks' boxes; ranks that hold the same have the same."""
    found: dict[str, list[Tensor]] = {}
    marks: dict[str, Tensor] = {}
    for part in from_every_rank({n: (e.shape, e.boxes, e.memory) for n, e in inventory.entries.items()}):
        for name, (shape, boxes, memory) in part.items():
            for box, tensors in zip(boxes, memory, strict=True):
                full = found.setdefault(name, [torch.full(shape, torch.nan, dtype=t.dtype) for t in tensors])
                seen = marks.setdefault(name, torch.zeros(shape, dtype=torch.bool))
                for target, tensor in zip(full, tensors, strict=True):
                    assert torch.equal(target[box.slices][seen[box.slices]], tensor[seen[box.slices]]), name
                    target[box.slices] = tensor
                seen[box.slices] = True
    assert all(mark.all() for mark in marks.values())
    return found


def same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


class Watched(Relayout):
    """Compares everything that the ranks hold before and after each change: over gloo, through shared memory, and at
    every second change with rank 3 over gloo and the others through memory.
    """

    def __call__(self, state: TrainingState, layout: str | ParallelLayout) -> TrainingState:
        before, goal = whole(state.inventory()), resolved(layout, state.layout)
        self.shared_memory = False
        over_gloo = self.rebuild(state.inventory(), state.luggage(), goal, torch.device("cpu"))
        assert same(before, whole(over_gloo.inventory())), f"{state.layout} -> {goal} over gloo"
        self.shared_memory, trades = True, len(TRADES)
        alone = len(CHECKED) % 2 == 1 and dist.get_rank() == 3
        free, shared_memory.free_bytes = shared_memory.free_bytes, (lambda: 0) if alone else shared_memory.free_bytes
        self.trades.close()
        new = super().__call__(state, layout)
        shared_memory.free_bytes = free
        assert same(before, whole(new.inventory())), f"{state.layout} -> {new.layout}"
        assert self.last is not None and self.last.moved == self.last.lower_bound
        assert len(TRADES) == trades + (0 if alone else self.last.rounds)
        CHECKED.append(self.last)
        return new


TRADES: list[Trade] = []


def counted() -> None:
    """`TRADES` has one entry for each round that goes through shared memory."""
    honest = Trade.__call__

    def counting(trade: Trade, *given: Any) -> None:
        TRADES.append(trade)
        honest(trade, *given)

    Trade.__call__ = counting  # type: ignore[method-assign]


CHECKED: list[Any] = []


def chain(layouts: dict[int, str] | None) -> tuple[list[float], list[Any], dict[int, str]]:
    """Losses of a run over a chain of layouts, what each change did, and what was refused."""
    import fms_parallel.dynamic.schedule as schedule

    schedule.Relayout = Watched  # type: ignore[misc]
    counted()
    told: list[float] = []
    hook = LayoutSchedule(layouts or {}, build, round_bytes=1 << 14) if layouts else None
    with poisoned_memory():
        model = build("fsdp=4,precision=fp64" if layouts else ParallelLayout(precision="fp64"))
        train(model, rows(), on_step=lambda n: told.append(n["loss"]), between_steps=hook, **RUN)
    assert not layouts or len(TRADES) > len(layouts)
    return told, [(r.before, r.after, r.moved, r.lower_bound) for r in CHECKED], hook.refused if hook else {}


def test_eight_layouts_have_the_losses_of_a_run_that_never_switched_and_bitwise_its_state() -> None:
    expected, _, _ = chain(None)
    for found, reports, refused in run_ranks(chain, 4, CHAIN, timeout=240):
        assert not refused and len(reports) == 8
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-12
        assert all(moved == bound for _, _, moved, bound in reports)


# ---- what is predicted ------------------------------------------------------------------------------------------

PREDICTED = [
    "fsdp=4",
    "fsdp=2,tp=2,sp",
    "fsdp=2,tp=2,sp,tp_parts=attention",
    "pp=2,tp=2",
    "tp=4",
    "dp=2,fsdp=2",
    "pp=2,fsdp=2,stage_split=4,1",
    "cp=2,fsdp=2",
]


def wrongly_predicted(layouts: list[str]) -> list[str]:
    wrong = []
    with torch.device("meta"):
        native = LLaMA(get_config("llama", "micro", **SIZES))
    for text in layouts:
        state = TrainingState(build(text))
        table = {name: boxes for name, boxes in state.inventory().table.items() if boxes[0].numel}
        expected = predict_tables(native, ParallelLayout.parse(text))[dist.get_rank()]
        wrong += [text] if table != {name: boxes for name, boxes in expected.items() if boxes[0].numel} else []
    return wrong


def test_predicted_boxes_are_those_that_ranks_hold() -> None:
    assert run_ranks(wrongly_predicted, 4, PREDICTED) == [[]] * 4


# ---- refusals ---------------------------------------------------------------------------------------------------


def quiet(layout: ParallelLayout | str, sizes: dict[str, Any] | None = None, **how: Any) -> nn.Module:
    """Without dropout, to be called by hand."""
    return build(layout, {"dropout": 0.0, **(sizes or {})}, **how)


class Job:
    """Two ranks, a tiny model, and one step done by hand."""

    def __init__(self, layout: str = "fsdp=2", build: Callable[..., nn.Module] = quiet) -> None:
        options = TrainOptions(lr=1e-2)
        self.model = build(f"{layout},precision=fp64")
        self.state = TrainingState(self.model, make_optimizer(self.model, options), numbers={"cursor": 7})
        self.relayout = Relayout(build, lambda model: make_optimizer(model, options), round_bytes=1 << 14)
        self.step()

    def backward(self) -> None:
        ids = torch.arange(26).view(2, 13) % 61
        self.state.model(ids, labels=ids).backward()

    def step(self) -> None:
        assert self.state.optimizer is not None
        self.backward()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.state.step += 1

    def refused(self, layout: str | ParallelLayout) -> str:
        """Why the change was refused; the old state is bitwise as it was, and takes another step."""
        before = whole(self.state.inventory())
        try:
            self.relayout(self.state, layout)
        except LayoutError as error:
            assert same(before, whole(self.state.inventory()))
            return str(error)
        return "not refused"


def refusals() -> dict[str, str]:
    told: dict[str, str] = {}
    job = Job()
    told["ranks"] = job.refused("tp=4")
    told["word"] = job.refused("tp=2,warp=9")
    told["differ"] = job.refused("tp=2" if dist.get_rank() else "dp=2")
    job.relayout.memory_limit = job.state.inventory().nbytes + 1000
    told["memory"] = job.refused("tp=2")
    job.relayout.memory_limit = None
    job.backward()
    told["accumulating"] = job.refused("tp=2")
    job.state.model.zero_grad()

    for name, factory in FACTORIES.items():
        job.relayout.model_factory = factory
        told[name] = job.refused("tp=2")
    job.relayout.model_factory = quiet
    made = job.relayout.optimizer_factory
    job.relayout.optimizer_factory = lambda model: torch.optim.SGD(model.parameters())
    told["optimizer"] = job.refused("tp=2")
    job.relayout.optimizer_factory = lambda model: torch.optim.AdamW(model.parameters())
    told["groups"] = job.refused("tp=2")
    job.relayout.optimizer_factory = made
    told["corrupted"] = corrupted(job)
    job.relayout.shared_memory = True
    told["corrupted in memory"] = corrupted(job)
    job.step()
    job.state = job.relayout(job.state, "tp=2")
    job.backward()
    assert job.state.optimizer is not None
    job.state.optimizer.step()
    job.backward()  # into gradients that a step has used already
    told["added to"] = job.refused("fsdp=2")
    job.state.model.zero_grad()
    job.state.step += 1
    assert job.state.step == 3 and job.state.numbers == {"cursor": 7}
    return told


def fails_on_one(layout: ParallelLayout, **how: Any) -> nn.Module:
    if dist.get_rank() == 1:
        raise RuntimeError("out of cheese")
    return quiet(layout, **how)


FACTORIES: dict[str, Any] = {
    "wider": partial(quiet, sizes={"ffn_width": 40}),
    "deeper": partial(quiet, sizes={"layers": 6}),
    "shallower": partial(quiet, sizes={"layers": 4}),
    "untied": partial(quiet, sizes={"tied": False}),
    "other dtype": lambda layout, **how: quiet(replace(layout, precision="fp32"), **how),
    "own mesh": lambda layout, mesh, **how: quiet(layout, **how),
    "fails": fails_on_one,
}


def corrupted(job: Job) -> str:
    """A bit that changes on its way to rank 1."""
    import fms_parallel.dynamic.transfer as transfer

    honest = transfer._exchange

    def flipping(moves: Any, here: Any, there: Any, rank: int, *more: Any) -> int:
        sent = honest(moves, here, there, rank, *more)
        arrived = [move for move in moves if move.target == rank]
        if rank == 1 and arrived:
            view = there[arrived[0].name].views(arrived[0].box)[0]
            view.flatten()[-1:].view(torch.int64).bitwise_xor_(1) if view.is_contiguous() else view.add_(1e-9)
        return sent

    transfer._exchange = flipping
    try:
        return job.refused("tp=2")
    finally:
        transfer._exchange = honest


MESSAGES = {
    "ranks": r"needs 4 ranks \(tp=4\) but the job has 2",
    "word": "unknown layout word 'warp'",
    "differ": "rank 0 asks for 'dp=2,precision=fp64' and rank 1 for 'tp=2,precision=fp64'",
    "memory": r"layout 'tp=2,precision=fp64' needs [\d,]+ bytes and 16,384 for a round on every rank.*1,000 are free",
    "accumulating": "finish the accumulation with optimizer.step",
    "added to": "finish the accumulation with optimizer.step",
    "wider": r"another model.*of another shape or type \(45\): layers\.0\.feed_forward",
    "deeper": r"another model.*not in the state.*layers\.5\.",
    "shallower": r"layers\.4\..* has no home in the new layout",
    "untied": "another model.*not in the state.*head.weight",
    "other dtype": "was asked for layout 'tp=2,precision=fp64'.*and built 'tp=2'",
    "own mesh": "on another mesh: hand layout and mesh on",
    "fails": r"RuntimeError: out of cheese",
    "optimizer": "builds SGD, but the state is of AdamW",
    "groups": "group the parameters by name",
    "corrupted": "arrived changed: the old layout goes on",
    "corrupted in memory": "arrived changed: the old layout goes on",
}


def test_what_cannot_be_is_refused_on_every_rank_and_the_job_goes_on() -> None:
    for told in run_ranks(refusals, 2):
        assert told.keys() == MESSAGES.keys()
        for name, pattern in MESSAGES.items():
            assert re.search(pattern, told[name]), f"{name}: {told[name]}"


# ---- many switches ----------------------------------------------------------------------------------------------


def resources() -> tuple[int, int, int]:
    """Threads, descriptors, process groups."""
    gc.collect()
    groups = len(dist.distributed_c10d._world.pg_map)
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), groups


SMALL = {"layers": 2, "width": 8, "ffn_width": 8, "heads": 2, "kv_heads": 2, "attention_bias": False}


def small(layout: ParallelLayout | str, **how: Any) -> nn.Module:
    """As few parameters as two stages can have."""
    return quiet(layout, SMALL, **how)


def many(switches: int) -> tuple[tuple[int, int, int], tuple[int, int, int], bool]:
    job = Job(build=small)
    job.relayout.meshes, job.relayout.shared_memory = MeshCache(limit=2), True
    layouts = ["tp=2", "dp=2", "pp=2", "fsdp=2"]
    for layout in layouts * 2:
        job.state = job.relayout(job.state, layout)
    start, before = whole(job.state.inventory()), resources()
    for index in range(switches):
        job.relayout.shared_memory = index % 8 < 4
        job.state = job.relayout(job.state, layouts[index % 4])
    after = resources()
    return before, after, same(start, whole(job.state.inventory()))


@pytest.mark.parametrize(
    "switches", [24, pytest.param(200, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_many_switches_leak_nothing_and_change_nothing(switches: int) -> None:
    for before, after, unchanged in run_ranks(many, 2, switches, timeout=max(600, 4 * switches)):
        assert unchanged
        assert all(late <= early + 2 for early, late in zip(before, after, strict=True)), (before, after)


# ---- memory -----------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Bytes of storages that were made inside and live; the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come here next
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return out


def peak(layouts: list[str], round_bytes: int) -> list[tuple[str, int, int]]:
    """(change, most bytes that were allocated on the way, bytes of the new shard) of each change."""
    job = Job(layouts[0], build=partial(quiet, sizes={"width": 96, "ffn_width": 256, "vocab_size": 512}))
    job.relayout.round_bytes = round_bytes
    found = []
    for index, layout in enumerate(layouts[1:]):
        before = job.state.layout
        job.relayout.shared_memory = bool(index % 2)
        if not index % 2:
            job.relayout.trades.close()
        gc.collect()
        with Allocated() as allocated:
            job.state = job.relayout(job.state, layout)
        assert job.relayout.trades.nbytes == (round_bytes // 4 if index % 2 else 0)
        most = allocated.most + job.relayout.trades.nbytes
        found.append((f"{before} -> {layout}", most, job.state.inventory().nbytes))
    return found


def test_a_change_takes_the_new_shard_and_at_most_one_and_a_half_rounds() -> None:
    round_bytes = 1 << 20
    for found in run_ranks(peak, 2, ["fsdp=2", "tp=2", "fsdp=2", "pp=2", "dp=2", "tp=2", "pp=2"], round_bytes):
        for change, most, shard in found:
            assert shard <= most <= shard + 1.5 * round_bytes, (change, most, shard)
