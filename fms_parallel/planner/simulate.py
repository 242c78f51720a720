"""Pipeline schedules event by event: which rank does what when, for uneven stages and real sends.

It knows the order in which each schedule does its work and what waits for what; it knows no layout, device or plot.
The closed forms of `schedule` are tested against it, and FASOP's blocking sends are one of its modes.

    F forward, B backward (input gradients), W weight gradients (of its own only in zero-bubble schedules)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fms_parallel.errors import ConfigError, unknown

F, B, W = "F", "B", "W"


@dataclass(frozen=True)
class Work:
    """One piece of work: `kind` of micro-batch `micro` on stage `stage`."""

    kind: str
    stage: int
    micro: int


@dataclass(frozen=True)
class Event:
    """A piece of work on a rank, from `start` to `end` seconds."""

    rank: int
    work: Work
    start: float
    end: float


@dataclass(frozen=True)
class Stages:
    """What stages cost.

    Attributes:
        forward, backward: seconds of one micro-batch on each stage; backward includes weight gradients.
        weight: part of `backward` that a zero-bubble schedule may do later. send: seconds of handing on.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float] | None = None
    send: float = 0.0

    def seconds(self, work: Work, split: bool) -> float:
        """Seconds of a piece of work; `split`: weight gradients are done apart."""
        weight = (self.weight or [b / 2 for b in self.backward])[work.stage]
        if work.kind == F:
            return self.forward[work.stage]
        return weight if work.kind == W else self.backward[work.stage] - (weight if split else 0.0)


def simulate(schedule: str, ranks: int, micros: int, stages: Stages) -> list[Event]:
    """Every event of one step, in order of start.

    Raises:
        ConfigError: an unknown schedule, or stages that the ranks cannot share evenly.
    """
    if len(stages.forward) % ranks:
        raise ConfigError(f"{len(stages.forward)} stages for {ranks} ranks: each rank needs equally many.")
    virtual = len(stages.forward) // ranks
    if schedule in GREEDY:
        return _greedy(ranks, micros, stages, GREEDY[schedule](ranks, virtual))
    if schedule not in ORDERS:
        raise ConfigError(unknown("schedule", schedule, [*ORDERS, *GREEDY]))
    orders = [list(ORDERS[schedule](rank, ranks, virtual, micros)) for rank in range(ranks)]
    return run_orders(orders, stages)


def run_orders(orders: Sequence[Sequence[Work]], stages: Stages) -> list[Event]:
    """Run given orders: each rank does its work in order, as soon as what it waits for is there."""
    done: dict[Work, float] = {}
    place = {work: rank for rank, order in enumerate(orders) for work in order}
    free, position, events = [0.0] * len(orders), [0] * len(orders), []
    last = len(stages.forward) - 1
    while any(position[r] < len(order) for r, order in enumerate(orders)):
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                work = order[position[rank]]
                ready = _ready(work, last, done, place, rank, stages.send)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = done[work] = start + stages.seconds(work, split=Work(W, work.stage, work.micro) in place)
                events.append(Event(rank, work, start, free[rank]))
                position[rank] += 1
                moved = True
        if not moved:
            raise ConfigError("this order of work waits for itself: the schedule does not fit these micro-batches.")
    return sorted(events, key=lambda event: (event.start, event.rank))


def _needs(work: Work, last: int) -> list[Work]:
    if work.kind == F:
        return [Work(F, work.stage - 1, work.micro)] if work.stage else []
    if work.kind == W:
        return [Work(B, work.stage, work.micro)]
    own = [Work(F, work.stage, work.micro)]
    return [*own, Work(B, work.stage + 1, work.micro)] if work.stage < last else own


def _ready(
    work: Work, last: int, done: dict[Work, float], place: dict[Work, int], rank: int, send: float
) -> float | None:
    """When everything that `work` needs has arrived; None if something is not done yet."""
    ready = 0.0
    for needed in _needs(work, last):
        if needed not in done:
            return None
        ready = max(ready, done[needed] + (send if place[needed] != rank else 0.0))
    return ready


# ---- the orders -----------------------------------------------------------------------------------------------------


def _one_forward_one_backward(rank: int, ranks: int, virtual: int, micros: int) -> list[Work]:
    warm = min(ranks - rank - 1, micros)
    order = [Work(F, rank, m) for m in range(warm)]
    for m in range(micros - warm):
        order += [Work(F, rank, warm + m), Work(B, rank, m)]
    return order + [Work(B, rank, m) for m in range(micros - warm, micros)]


def _all_forward(rank: int, ranks: int, virtual: int, micros: int) -> list[Work]:
    own = [rank + ranks * v for v in range(virtual)]
    return [Work(F, s, m) for s in own for m in range(micros)] + [
        Work(B, s, m) for s in reversed(own) for m in range(micros)
    ]


def _interleaved(rank: int, ranks: int, virtual: int, micros: int) -> list[Work]:
    """Megatron's order: groups of `ranks` micro-batches pass all own stages in turn."""
    total = micros * virtual

    def piece(index: int, backward: bool) -> Work:
        turn, inside = divmod(index, ranks * virtual)
        chunk = inside // ranks
        chunk = virtual - 1 - chunk if backward else chunk
        return Work(B if backward else F, rank + ranks * chunk, turn * ranks + inside % ranks)

    warm = min((ranks - rank - 1) * 2 + (virtual - 1) * ranks, total)
    order = [piece(i, False) for i in range(warm)]
    for i in range(total - warm):
        order += [piece(warm + i, False), piece(i, True)]
    return order + [piece(i, True) for i in range(total - warm, total)]


ORDERS: dict[str, Callable[[int, int, int, int], list[Work]]] = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _all_forward,
    "looped_bfs": _all_forward,
    "interleaved1f1b": _interleaved,
}


# ---- zero-bubble schedules, found greedily --------------------------------------------------------------------------


def _loop(ranks: int, virtual: int) -> list[int]:
    return [stage % ranks for stage in range(ranks * virtual)]


def _vee(ranks: int, virtual: int) -> list[int]:
    if virtual != 2:
        raise ConfigError(f"a V schedule has 2 stages per rank, not {virtual}.")
    return [min(stage, 2 * ranks - 1 - stage) for stage in range(2 * ranks)]


GREEDY: dict[str, Callable[[int, int], list[int]]] = {"interleaved_zero_bubble": _loop, "zbv": _vee, "dualpipev": _vee}


def _greedy(ranks: int, micros: int, stages: Stages, home: list[int]) -> list[Event]:
    """Each rank takes a ready backward first, then a forward while memory lasts, weight gradients in the gaps.

    Micro-batches of one kind and stage are done in order, so that only the next one of each is looked at.
    """
    last = len(home) - 1
    place = {Work(k, s, m): home[s] for k in (F, B, W) for s in range(last + 1) for m in range(micros)}
    upcoming = {(kind, stage): 0 for kind in (B, F, W) for stage in range(last + 1)}
    done: dict[Work, float] = {}
    free, held = [0.0] * ranks, [0] * ranks
    events: list[Event] = []
    limit = 2 * ranks * max(len(home) // ranks, 1)
    while len(events) < len(place):
        choice: tuple[tuple[float, int, int, int], Work] | None = None
        for (kind, stage), micro in upcoming.items():
            rank, work = home[stage], Work(kind, stage, micro)
            if micro == micros or (kind == F and held[rank] >= limit):
                continue
            ready = _ready(work, last, done, place, rank, stages.send)
            if ready is not None:
                key = (max(ready, free[rank]), {B: 0, F: 1, W: 2}[kind], micro, -stage)
                choice = (key, work) if choice is None or key < choice[0] else choice
        if choice is None:
            limit += 1  # memory alone must never stop the schedule
            continue
        (start, *_), work = choice
        rank = home[work.stage]
        free[rank] = done[work] = start + stages.seconds(work, split=True)
        held[rank] += {F: 1, B: 0, W: -1}[work.kind]
        upcoming[work.kind, work.stage] += 1
        events.append(Event(rank, work, start, free[rank]))
    return sorted(events, key=lambda event: (event.start, event.rank))


def makespan(events: Sequence[Event]) -> float:
    """Seconds until the last event ends."""
    return max((event.end for event in events), default=0.0)


def idle(events: Sequence[Event], ranks: int) -> float:
    """Mean part of the step in which a rank does nothing."""
    busy = sum(event.end - event.start for event in events)
    whole = makespan(events) * ranks
    return 1 - busy / whole if whole else 0.0
