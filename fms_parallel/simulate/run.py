"""`simulate`: one training step of one rank of any world, in this process, and what it held and sent.

The model is built and cut by the code that builds and cuts it on hardware, and the step is `train_step`; only memory
and other ranks are missing. It knows layouts, models and steps, no formulas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel import compat
from fms_parallel.data.feed import Batch
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.errors import ConfigError
from fms_parallel.layout import AXES, ParallelLayout
from fms_parallel.modules.dropout import Dropout
from fms_parallel.simulate.ledger import Ledger
from fms_parallel.simulate.recorder import ACTIVATIONS, GATHERED, GRADIENTS, OPTIMIZER, PARAMETERS, Recorder
from fms_parallel.simulate.unreal import build_unreal
from fms_parallel.strategy.base import parallel_of, repeated_blocks
from fms_parallel.training.gradients import local_gradients
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import dropout_keys, train_step


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one axis in a step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, send, receive, ...
        axis: of the mesh, `fsdp+cp` for two at once, `all` for every rank.
        count: how many. bytes: of all of them, each the larger of what goes in and what comes out on this rank.
    """

    kind: str
    axis: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Simulation:
    """One rank's training step; all sizes in bytes.

    Attributes:
        parameters, gradients, optimizer: what this rank holds of each between two steps.
        gathered: the most there ever was of parameters in another form: whole, or in the precision computed in.
        waiting_gradients: the most there ever was of gradients, those included that wait to be reduced.
        activations: the most there ever was of everything else, working memory included.
        kept_per_block: activations that each block's first forward kept for its backward, by block.
        peak: in all, when there was most; peak_by_purpose: what it was for.
        collectives: of the step, by kind and axis.
    """

    layout: str
    rank: int
    coordinates: Mapping[str, int]
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    waiting_gradients: int
    activations: int
    kept_per_block: Mapping[str, int]
    peak: int
    peak_by_purpose: Mapping[str, int]
    collectives: tuple[Collective, ...]

    def sent(self, kind: str, axis: str) -> Collective:
        """The collectives of one kind over one axis, with a count of 0 when there were none."""
        found = (c for c in self.collectives if (c.kind, c.axis) == (kind, axis))
        return next(found, Collective(kind, axis, 0, 0))


def simulate(
    factory: Callable[..., nn.Module],
    layout: ParallelLayout,
    *,
    batch_size: int,
    seq_len: int,
    rank: int = 0,
    grad_accum_steps: int = 1,
    **arguments: Any,
) -> Simulation:
    """One step of rank `rank` of the layout's world. Needs no other process, and no memory for the model.

    Args:
        factory: called with `distributed_strategy=` and `arguments`; returns a model that `model_loss` can train. One
            that takes a `fill` is given one that writes nothing.
        layout: all degrees given. batch_size: global rows. seq_len: tokens of a row.
        grad_accum_steps: micro-batches that a rank works on its rows in.
    Raises:
        ConfigError: a process group is running, a rank outside the world, rows that do not divide.
        LayoutError: a degree is left open, for there is no world to fill; or the model cannot be cut this way.
    """
    pieces = layout.data_parallel * grad_accum_steps
    if dist.is_initialized():
        raise ConfigError("a process group is running: simulate in a process of its own.")
    if not 0 <= rank < layout.world_size:
        raise ConfigError(f"rank {rank}: {layout} has ranks 0 .. {layout.world_size - 1}.")
    if seq_len < 1 or grad_accum_steps < 1:
        raise ConfigError(f"seq_len={seq_len}, grad_accum_steps={grad_accum_steps}: both must be >= 1.")
    if batch_size < 1 or batch_size % pieces:
        raise ConfigError(
            f"batch_size={batch_size} does not divide into {layout.data_parallel} shards x {grad_accum_steps} "
            f"micro-batches; {-(-max(batch_size, 1) // pieces) * pieces} would."
        )
    with ExitStack() as stack:
        if layout.world_size > 1:
            stack.enter_context(compat.fake_process_group(rank, layout.world_size))
        mode = compat.unreal_tensors()
        model = build_unreal(factory, layout, mode, **arguments)
        step = _Step(model, layout, batch_size // layout.data_parallel, seq_len, grad_accum_steps)
        with mode:
            return step.run(rank)


def stage_ranks(layout: ParallelLayout) -> list[int]:
    """The first rank of each position in the pipeline; [0] without one."""
    return [stage * (layout.world_size // layout.pp) for stage in range(layout.pp)]


class _Step:
    """A model, its optimizer and its rows, and a recorder beside them."""

    def __init__(self, model: nn.Module, layout: ParallelLayout, rows: int, length: int, pieces: int) -> None:
        self.model, self.layout, self.rows, self.length, self.pieces = model, layout, rows, length, pieces
        self.optimizer = make_optimizer(model, TrainOptions())
        self.recorder = Recorder()
        self.watched: set[int] = set()
        self.shard = data_shard(parallel_of(model).mesh)[0]

    def run(self, rank: int) -> Simulation:
        """The second of two steps: the first one makes what later ones find (optimizer state, schedules, buffers)."""
        self.model.train()
        self.recorder.mark(self.model.parameters(), PARAMETERS)
        with self._watching():
            self._once()
            self.recorder.forget_past()
            self._once()
        return self._told(rank)

    def _once(self) -> None:
        with self.recorder.recording():
            ids = torch.zeros(self.rows, self.length, dtype=torch.int64)
            batches = list(Batch(ids, torch.zeros_like(ids)).split(self.pieces))
            drops = any(isinstance(module, Dropout) and module.p > 0 for module in self.model.modules())
            keys = dropout_keys(batches, 0, self.shard) if drops else None
            train_step(self.model, self.optimizer, batches, max_grad_norm=0.5, keys=keys, check_gradients=True)
        state = self.optimizer.state.values()
        self.recorder.mark((v for values in state for v in values.values() if torch.is_tensor(v)), OPTIMIZER)
        self.recorder.mark(local_gradients(self.model.parameters()), GRADIENTS)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Hooks that tell the recorder what memory is for, and when blocks begin and end."""
        handles = [nn.modules.module.register_module_forward_hook(lambda module, *_: self._look_at(module))]
        for name, block in repeated_blocks(self.model):
            handles.append(block.register_forward_pre_hook(self._at(f"+{name}"), prepend=True))
            handles.append(block.register_forward_hook(self._at(f"-{name}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at(self, name: str) -> Callable[..., None]:
        return lambda *_: self.recorder.moment(name)

    def _look_at(self, module: nn.Module) -> None:
        """After a forward the parameters below it are still as it used them: FSDP's are gathered.

        A module may use those of its children without calling them.
        """
        for parameter in module.parameters():
            self.recorder.mark([parameter], GATHERED, over=False)
            if id(parameter) not in self.watched and parameter.requires_grad:
                self.watched.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _has_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.recorder.mark([parameter.grad], GRADIENTS)

    def _told(self, rank: int) -> Simulation:
        ledger = Ledger.of(self.recorder.events, self.recorder.of)
        kept: dict[str, int] = {}
        for name, size in ledger.kept_between():
            kept.setdefault(name, size)
        coordinates = _coordinates(self.layout, rank)
        state = [v for values in self.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
        return Simulation(
            layout=str(self.layout),
            rank=rank,
            coordinates=coordinates,
            parameters=_bytes(self.model.parameters()),
            gradients=_bytes(local_gradients(self.model.parameters())),
            optimizer=_bytes(state),
            gathered=ledger.most.get(GATHERED, 0),
            waiting_gradients=ledger.most.get(GRADIENTS, 0),
            activations=ledger.most.get(ACTIVATIONS, 0),
            kept_per_block=kept,
            peak=sum(ledger.peak.values()),
            peak_by_purpose=dict(ledger.peak),
            collectives=_collectives(self.recorder, self.layout, coordinates),
        )


def _bytes(tensors: Any) -> int:
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


def _coordinates(layout: ParallelLayout, rank: int) -> dict[str, int]:
    """Where a rank stands on each axis, outermost first."""
    found: dict[str, int] = {}
    for axis, degree in reversed(list(zip(AXES, layout.degrees, strict=True))):
        rank, found[axis] = divmod(rank, degree)
    return dict(reversed(found.items()))


def _collectives(recorder: Recorder, layout: ParallelLayout, here: Mapping[str, int]) -> tuple[Collective, ...]:
    names = _axes_by_ranks(layout, here)
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for kind, ranks, size in recorder.sent:
        key = (kind, names.get(ranks, f"ranks {ranks}"))
        counts[key] += 1
        sizes[key] += size
    return tuple(Collective(*key, counts[key], sizes[key]) for key in sorted(counts, key=lambda key: key[::-1]))


def _axes_by_ranks(layout: ParallelLayout, here: Mapping[str, int]) -> dict[tuple[int, ...], str]:
    """The ranks of every group that a mesh has through this rank -> the axes it runs along."""
    long = [axis for axis, degree in zip(AXES, layout.degrees, strict=True) if degree > 1]
    found: dict[tuple[int, ...], str] = {}
    for count in range(len(long), 0, -1):
        for axes in combinations(long, count):
            places = product(
                *(range(d) if axis in axes else (here[axis],) for axis, d in zip(AXES, layout.degrees, strict=True))
            )
            ranks = tuple(_rank(layout, place) for place in places)
            found[ranks] = "all" if len(axes) == len(long) > 1 else "+".join(axes)
    return found


def _rank(layout: ParallelLayout, place: tuple[int, ...]) -> int:
    rank = 0
    for index, degree in zip(place, layout.degrees, strict=True):
        rank = rank * degree + index
    return rank
