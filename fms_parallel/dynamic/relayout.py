"""Live re-layout: the same processes, the same run, another layout, without the disk.

    ask      every rank is between two steps and asks for the same layout        | refused: nothing happened
    build    the new model on its mesh, from the factory, with empty memory      |
    plan     what moves (plan.py), whether it fits                               | refused: the new one is dropped,
    move     weights, optimizer state, numbers (transfer.py)                     | the old one goes on
    verify   every piece's fingerprint, agreed over all ranks                    |
    commit   the old model's memory is given back

The old state is only read until the commit. It knows states, factories and the process group of all ranks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel.checkpoint.agree import from_every_rank, rank_and_world
from fms_parallel.checkpoint.named import STATE, WEIGHT, Stored, Targets, aim_state, aim_weights, put_state
from fms_parallel.checkpoint.words import listed
from fms_parallel.distributed.boxes import Box, local_tensor
from fms_parallel.distributed.trade import Trades
from fms_parallel.dynamic.inventory import Entry, Inventory, everyone
from fms_parallel.dynamic.memory import free_bytes
from fms_parallel.dynamic.meshes import MeshCache
from fms_parallel.dynamic.plan import ROUND_BYTES, TransferPlan, plan_transfer, subtract
from fms_parallel.dynamic.state import Luggage, TrainingState, Unpacked, merged
from fms_parallel.dynamic.transfer import Tally, carry_out
from fms_parallel.errors import FmsError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.log import get_logger
from fms_parallel.strategy.base import parallel_of
from fms_parallel.words import split_words

logger = get_logger(__name__)

KEPT = ("precision", "recompute", "offload")
"""Words of a layout that say not how a model is spread: a text that does not name them keeps them."""


SHARED_FROM, SEGMENT = 4 * 2**20, 8 * 2**20
"""Bytes between ranks from which on they share memory to move them, and bytes that each shares then and keeps."""


class ModelFactory(Protocol):
    """Builds the model in a layout, as `get_model` does when everything but the layout is given:

    lambda layout, **how: get_model("llama", "micro", distributed_strategy=layout, **how)
    """

    def __call__(
        self, layout: ParallelLayout, *, mesh: DeviceMesh | None, fill: Callable[[nn.Module], None]
    ) -> nn.Module:
        """The model on `mesh`, its weights written by `fill` (which here writes none: they arrive)."""
        ...


OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class SwitchReport:
    """What a change of layout did.

    Attributes:
        step: at which it happened. moved: bytes of state that all ranks sent; lower_bound: the least there could be.
        largest: bytes that the busiest rank sent or received. seconds: of each phase, and in all.
    """

    step: int
    before: str
    after: str
    moved: int
    lower_bound: int
    largest: int
    rounds: int
    seconds: dict[str, float]


class Relayout:
    """Changes layouts of one run.

    Args:
        model_factory, optimizer_factory, scheduler_factory: build the parts anew in a layout.
        meshes: kept between switches. round_bytes: memory that a transfer may take beside the new shard.
        memory_limit: bytes that old and new state may take together on this rank; None: what the device has free.
        verify: compare fingerprints of every piece before the commit.
        shared_memory: ranks of one host move pieces through memory that they share (CPU): None: where much moves;
            False: never; True: always. Those that cannot go over the process group.
    """

    def __init__(
        self,
        model_factory: ModelFactory,
        optimizer_factory: OptimizerFactory | None = None,
        scheduler_factory: SchedulerFactory | None = None,
        *,
        meshes: MeshCache | None = None,
        round_bytes: int = ROUND_BYTES,
        memory_limit: int | None = None,
        verify: bool = True,
        shared_memory: bool | None = None,
    ) -> None:
        self.model_factory, self.optimizer_factory = model_factory, optimizer_factory
        self.scheduler_factory = scheduler_factory
        self.meshes = meshes or MeshCache()
        self.round_bytes, self.memory_limit, self.verify = round_bytes, memory_limit, verify
        self.shared_memory, self.trades = shared_memory, Trades()
        self.last: SwitchReport | None = None

    # ---- the switch ---------------------------------------------------------------------------------------------

    def __call__(self, state: TrainingState, layout: str | ParallelLayout) -> TrainingState:
        """The run in another layout, or in the same one as it is. Collective: every rank asks for the same.

        Returns:
            the new state, whose model and optimizer are new objects; the old ones are empty.
        Raises:
            LayoutError: on every rank, when any rank refuses or fails: the ranks or the memory do not suffice, the
                factory builds another model, gradients wait, a piece arrived changed. The old state is as it was.
        """
        device = local_tensor(state.slots[0].tensor).device
        with agreed("a change of layout") as check:
            new = check.value = resolved(layout, state.layout)
            state.refuse_unless_between_steps()
        if new == state.layout:
            return state
        self.meshes.adopt(state.layout, parallel_of(state.model).mesh)
        here = state.inventory()
        made = self.rebuild(here, state.luggage(), new, device)
        release(state, here)
        self.meshes.evict(new)
        report = self.last
        assert report is not None
        self.last = replace(report, before=str(state.layout))
        logger.info("step %d: layout %r -> %r, %s", made.step, str(state.layout), str(new), _words(self.last))
        return made

    def rebuild(
        self, here: Inventory, luggage: Luggage | None, layout: ParallelLayout, device: torch.device
    ) -> TrainingState:
        """A state in `layout` from what the ranks hold together, whichever layout that came from. Collective.

        Args:
            here: what this rank holds; only read. luggage: None on a rank that has nothing yet.
        Raises:
            LayoutError: as `__call__`, on every rank; also when the ranks do not hold all of it together.
        """
        clock = _Clock()
        room = free_bytes(device) if self.memory_limit is None else self.memory_limit - here.nbytes
        told = from_every_rank((here.without_memory(), luggage, room))
        described = [(inventory, given) for inventory, given, _ in told]
        clock.done("describe")
        # Every rank reads the same, so what is refused here is refused on all of them.
        held = everyone([inventory for inventory, _ in described])
        taken = merged([given for _, given in described if given is not None])
        if taken is None:
            raise Gap("no rank holds a state to go on from.")
        if len(steps := {given.step for _, given in described if given is not None}) > 1:
            raise LayoutError(f"ranks hold states of steps {sorted(steps)}: they must be of one.")
        _refuse_gaps(held, [inventory for inventory, _ in described], [given for _, given in described if given])
        self._refuse_what_cannot_fit(held, min(left for _, _, left in told), layout)
        unpacked = Unpacked(taken)
        with agreed(f"building layout {str(layout)!r}"), same_random_numbers():
            model, optimizer, scheduler = self._build(layout, device, unpacked)
            targets, there = _targets(model, optimizer, held, unpacked.luggage)
        clock.done("build")
        wanted = from_every_rank(there.without_memory())
        items = {name: entry.item for name, entry in held.items()}
        tables = [inventory.table for inventory, _ in described], [inventory.table for inventory in wanted]
        plan = plan_transfer(items, *tables, self.round_bytes)  # refuses on every rank, or on none
        clock.done("plan")
        messages = device if dist.is_initialized() and dist.get_backend() == "nccl" else None
        tally = self._move(plan, here, there, messages)
        clock.done("move")
        with agreed(f"verifying layout {str(layout)!r}"):
            if tally.wrong:
                raise LayoutError(f"{tally.wrong[0]} arrived changed: the old layout goes on.")
            if optimizer is not None:
                put_state(optimizer, targets.state)
                unpacked.groups(model, optimizer)
            if scheduler is not None:
                assert optimizer is not None
                unpacked.scheduler(scheduler, optimizer)
            model.train(unpacked.luggage.training)
        clock.done("commit")
        self.last = _report(taken.step, layout, plan, clock.seconds)
        numbers = dict(taken.numbers)
        return TrainingState(model, optimizer, step=taken.step, scheduler=scheduler, numbers=numbers)

    def _move(self, plan: TransferPlan, here: Inventory, there: Inventory, device: torch.device | None) -> Tally:
        """Carry a plan out, through shared memory where that is wanted and can be."""
        wanted = plan.total >= SHARED_FROM if self.shared_memory is None else self.shared_memory
        trade = None
        if wanted and plan.rounds and dist.get_backend() == "gloo":
            trade = self.trades.get(min(SEGMENT, self.round_bytes // 4))
        how: dict[str, Any] = {"round_bytes": self.round_bytes, "verify": self.verify, "device": device}
        try:
            return carry_out(plan, here, there, trade=trade, **how)
        except BaseException:
            self.trades.close()  # whoever waits for this rank hears of it
            raise

    def empty(self, layout: ParallelLayout, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model and an optimizer in `layout` that hold nothing yet, to be filled from a checkpoint. Collective."""
        assert self.optimizer_factory is not None
        with same_random_numbers():
            model = self.model_factory(layout, mesh=self.meshes.get(layout, device.type), fill=leave_empty)
            return model, self.optimizer_factory(model)

    def _refuse_what_cannot_fit(self, held: dict[str, Entry], room: int, layout: ParallelLayout) -> None:
        """Before anything is built: the least that a rank will hold, an even share, beside what it holds now."""
        total = sum(entry.item.width * prod(entry.shape) for entry in held.values())
        share = total // (layout.pp * layout.fsdp * layout.tp * (layout.cp if layout.fsdp > 1 else 1))
        if share + self.round_bytes > room:
            raise LayoutError(
                f"layout {str(layout)!r} needs {share:,} bytes and {self.round_bytes:,} for a round on every rank, "
                f"beside the old state, but {max(room, 0):,} are free on one: use a layout that cuts more (fsdp, tp, "
                "pp), or smaller rounds."
            )

    def _build(
        self, layout: ParallelLayout, device: torch.device, unpacked: Unpacked
    ) -> tuple[nn.Module, torch.optim.Optimizer | None, Any]:
        mesh = self.meshes.get(layout, device.type)
        model = self.model_factory(layout, mesh=mesh, fill=leave_empty)
        built = parallel_of(model)
        if built.layout != layout or built.mesh is not mesh:
            raise LayoutError(
                f"the model factory was asked for layout {str(layout)!r} on the mesh it was given, and built "
                f"{str(built.layout)!r}{'' if built.mesh is mesh else ' on another mesh'}: hand layout and mesh on."
            )
        unpacked.freeze(model)
        kind = unpacked.luggage.optimizer
        if kind is None:
            return model, None, None
        if self.optimizer_factory is None:
            raise LayoutError(f"the state has an optimizer ({kind}) and there is no optimizer factory: give one.")
        optimizer = self.optimizer_factory(model)
        if type(optimizer).__name__ != kind:
            raise LayoutError(f"the optimizer factory builds {type(optimizer).__name__}, but the state is of {kind}.")
        if (unpacked.luggage.scheduler is None) != (self.scheduler_factory is None):
            raise LayoutError("a scheduler is carried over by a scheduler factory: give both, or neither.")
        return model, optimizer, self.scheduler_factory(optimizer) if self.scheduler_factory else None


def relayout(
    state: TrainingState,
    layout: str | ParallelLayout,
    model_factory: ModelFactory,
    optimizer_factory: OptimizerFactory | None = None,
    **options: Any,
) -> TrainingState:
    """One change of layout; arguments and errors are those of `Relayout`, which keeps meshes between several."""
    return Relayout(model_factory, optimizer_factory, **options)(state, layout)


# ---- parts ------------------------------------------------------------------------------------------------------


def resolved(layout: str | ParallelLayout, now: ParallelLayout) -> ParallelLayout:
    """The layout that is asked for, for the ranks there are. A text keeps the words of `KEPT` that it does not say."""
    new = ParallelLayout.parse(layout)
    if isinstance(layout, str):
        said = {word for word, _ in split_words(layout)}
        new = replace(new, **{word: getattr(now, word) for word in KEPT if word not in said})
    return new.resolve(rank_and_world()[1])


def leave_empty(model: nn.Module) -> None:
    """Fills nothing: what a rank holds of the weights is about to arrive."""


def _targets(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, held: dict[str, Entry], luggage: Luggage
) -> tuple[Targets, Inventory]:
    """Where everything goes on this rank: the new parameters, and new optimizer state beside them."""
    stored: dict[str, Stored] = {}
    for entry in held.values():
        for key, dtype in entry.kinds:
            stored[key] = Stored(entry.shape, dtype)
    with_state = {key.split("/", 2)[2] for key in stored if key.startswith(f"{STATE}/")}
    stateless = [name for name in luggage.trained if name not in with_state]
    targets = Targets()
    aim_weights(targets, model, stored, exact_dtype=True)
    if optimizer is not None:
        aim_state(targets, model, optimizer, stored, stateless)
    wrong = {"not in the state": targets.missing, "of another shape or type": targets.unfit}
    if found := [listed(kind, names) for kind, names in wrong.items() if names]:
        raise LayoutError(f"the model factory builds another model than the one that runs: {'; '.join(found)}.")
    own = {key: tensor for key, tensor in targets.tensors.items() if key.split("/", 1)[0] in (WEIGHT, STATE)}
    return targets, Inventory.of(own)


def release(state: TrainingState, held: Inventory) -> None:
    """Give back the memory of a state that nobody needs any more; its model and optimizer are empty then."""
    for parameter in state.model.parameters():
        parameter.grad = None
    held.release()
    if state.optimizer is not None:
        state.optimizer.state.clear()


class Gap(LayoutError):
    """The ranks do not hold the whole state together: part of it was lost with others."""


def _refuse_gaps(held: dict[str, Entry], inventories: list[Inventory], luggage: list[Luggage]) -> None:
    for name, entry in held.items():
        boxes = dict.fromkeys(box for inventory in inventories if name in inventory for box in inventory[name].boxes)
        if lost := subtract([Box.whole(entry.shape)], boxes):
            raise Gap(f"{name}: no rank holds the part at {lost[0].offset} of size {lost[0].size} of {entry.shape}.")
    if missing := [name for name in luggage[0].names if not any(name in given.held for given in luggage)]:
        raise Gap(f"{missing[0]}: no rank holds any of it.")


class Agreement:
    """What a rank found out, to be the same on every rank."""

    value: Any = None


@contextmanager
def agreed(work: str) -> Iterator[Agreement]:
    """Run the body on every rank; refuse on every rank when one did, or when values differ. Collective.

    Raises:
        LayoutError: with the reason of the first rank that has one.
    """
    check, failure = Agreement(), None
    try:
        yield check
    except Exception as error:
        failure = error
    reason = None if failure is None else _reason(failure)
    told = from_every_rank((reason, check.value))
    for rank, (other, _) in enumerate(told):
        if other is not None:
            place = "" if failure is not None and other == reason else f" (on rank {rank})"
            kind = Gap if isinstance(failure, Gap) else LayoutError
            raise kind(f"{work} is refused{place}: {other}") from failure
    for rank, (_, value) in enumerate(told):
        if value != told[0][1]:
            raise LayoutError(
                f"{work} is refused: rank 0 asks for {str(told[0][1])!r} and rank {rank} for {str(value)!r}; one rank "
                "decides and tells the others."
            )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, FmsError) else f"{type(error).__name__}: {error}"


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, the generators of torch and Python go on where they were."""
    python = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.start = self.mark = time.perf_counter()
        self.phases: dict[str, float] = {}

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase], self.mark = now - self.mark, now

    @property
    def seconds(self) -> dict[str, float]:
        return {**self.phases, "all": self.mark - self.start}


def _report(step: int, layout: ParallelLayout, plan: TransferPlan, seconds: dict[str, float]) -> SwitchReport:
    largest = max((*plan.sent, *plan.received), default=0)
    return SwitchReport(step, "", str(layout), plan.total, plan.lower_bound, largest, len(plan.rounds), seconds)


def _words(report: SwitchReport) -> str:
    return f"{report.moved / 1e6:.1f} MB in {report.seconds['all']:.2f} s"
