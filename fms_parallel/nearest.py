"""Layouts near one that cannot be: how a refusal ends.

    tp=3 does not divide 4 heads ... Near it, these work: 'fsdp=3,tp=2', 'dp=3,tp=2', 'fsdp=6'.

It knows what can be edited in a layout and how far an edit goes; it knows no rule: rules are functions that raise, and
whatever they let pass is offered. The first hundreds of candidates are tried, cheapest edits first, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import nsmallest
from itertools import chain, combinations, islice
from math import log2, prod
from operator import itemgetter
from typing import Any, NamedTuple

from fms_parallel.errors import FmsError
from fms_parallel.schedules import FILE, SCHEDULES, least_stages_per_rank
from fms_parallel.words import REST

ParallelLayout = Any
"""`layout` stands on this page; imported here it would be a circle."""

Rule = Callable[[ParallelLayout], object]
"""Raises an FmsError for a layout that it does not allow."""


class Edit(NamedTuple):
    """How far it goes, the fields that it sets, and what a person would say was changed: not what follows from that."""

    cost: float
    values: dict[str, Any]
    changes: frozenset[str]

    def and_(self, other: Edit) -> Edit:
        """Both."""
        return Edit(self.cost + other.cost, self.values | other.values, self.changes | other.changes)


def _word(cost: float, **values: Any) -> Edit:
    """An edit of one field."""
    return Edit(cost, values, frozenset(values))


COST = {"dp": 1.0, "fsdp": 1.0, "pp": 1.2, "tp": 1.2, "cp": 1.4}
"""Of changing a degree, before its factor: replicas and shards first, they leave the model as it is."""

NEW = {"dp": 0.2, "fsdp": 0.0, "pp": 2.0, "tp": 1.0, "cp": 3.0}
"""Added for an axis that was not asked for."""

PER_DOUBLING = 0.3
MOST_LISTED, MOST_DEGREES, MOST_WITH_WORDS, MOST_OF_A_FILE = 5000, 1500, 60, 20
"""Candidates: other degrees listed, those tried, those tried together with another word, those with a file to read."""

RECOMPUTE_INSTEAD = {"selective": ("full", "none"), "budget": ("selective", "full", "none")}


def check(layout: ParallelLayout, *rules: Rule) -> None:
    """Apply every rule to a layout whose degrees are known.

    Raises:
        FmsError: of the first rule's kind: its sentence, and up to three layouts of as many ranks that all rules allow.
    """
    try:
        for rule in rules:
            rule(layout)
    except FmsError as error:
        raise type(error)(f"{error}{also(nearest(layout, rules, layout.world_size))}") from None


def also(layouts: Iterable[ParallelLayout]) -> str:
    """` Near it, these work: 'tp=2', 'fsdp=2'.`, or nothing without layouts."""
    texts = [repr(str(layout)) if str(layout) else "'' (one process)" for layout in layouts]
    return f" Near it, {'these work' if len(texts) > 1 else 'this works'}: {', '.join(texts)}." if texts else ""


def nearest(layout: ParallelLayout, rules: Iterable[Rule], world: int, count: int = 3) -> list[ParallelLayout]:
    """Up to `count` layouts of `world` ranks that all rules allow, by the size of the edit; each edits other fields."""
    rules = tuple(rules)

    def make(**values: Any) -> ParallelLayout:
        made = type(layout)(**values)
        for rule in rules:
            rule(made)
        return made

    values = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    return _first(make, values, _of_world(values, world), count)


def nearest_words(
    values: Mapping[str, Any], defaults: Mapping[str, Any], make: Callable[..., ParallelLayout], count: int = 3
) -> list[ParallelLayout]:
    """The same for words that do not go together, in whatever world: some are dropped, or their axis is added."""
    values = {**defaults, **values}
    return _first(make, values, _together(values, defaults), count)


def _first(
    make: Callable[..., ParallelLayout], values: Mapping[str, Any], edits: Iterable[Edit], count: int
) -> list[ParallelLayout]:
    """The layouts that the cheapest edits make, among those that can be made."""
    found: dict[frozenset[str], ParallelLayout] = {}
    of_a_file = 0
    for edit in sorted(edits, key=itemgetter(0)):
        if any(less <= edit.changes for less in found):  # that one says as much with fewer changes
            continue
        edited = {**values, **edit.values}
        if str(edited.get("schedule", "")).startswith(FILE):
            of_a_file += 1
            if of_a_file > MOST_OF_A_FILE:
                continue
        try:
            made = make(**edited)
        except FmsError:
            continue
        if made not in found.values():
            found[edit.changes] = made
        if len(found) == count:
            break
    return list(found.values())


# ---- edits of a layout of so many ranks -------------------------------------------------------------------------


def _of_world(values: Mapping[str, Any], world: int) -> Iterator[Edit]:
    """Other degrees, other words, and both."""
    found = chain(islice(_other_degrees(values, world), MOST_LISTED), [_all_shards(world)])
    degrees = nsmallest(MOST_DEGREES, found, key=itemgetter(0))
    for place, (cost, edit, changes) in enumerate(degrees):
        fitted = Edit(cost, _without_idle_words({**values, **edit}), changes)
        yield fitted
        if place < MOST_WITH_WORDS:
            words = list(_other_words(fitted.values))
            yield from (fitted.and_(one) for one in words)
            if cost == 0:
                yield from (fitted.and_(one).and_(other) for one, other in combinations(words, 2))


def _other_degrees(values: Mapping[str, Any], world: int) -> Iterator[Edit]:
    """Degrees whose product is `world`, of which at most three are not as asked; few changes first."""
    asked = {axis: values[axis] for axis in COST}
    opened = {axis for axis, degree in asked.items() if degree == REST}
    if values["hsdp"]:
        opened |= {"dp", "fsdp"}
    for many in range(len(opened), max(len(opened), 3) + 1):
        for changed in combinations(COST, many):
            if not opened <= set(changed):
                continue
            rest, left = divmod(world, prod(degree for axis, degree in asked.items() if axis not in changed))
            if left or not rest:
                continue
            for sizes in _products(rest, many):
                new = dict(zip(changed, sizes, strict=True))
                if all(new[axis] != asked[axis] for axis in changed):
                    closed = [axis for axis in changed if axis not in opened]
                    cost = sum(_far(axis, asked[axis], new[axis]) for axis in closed)
                    said = frozenset(axis if new[axis] > 1 else f"no {axis}" for axis in closed)
                    yield Edit(cost, {**new, "hsdp": False}, said)


def _all_shards(world: int) -> Edit:
    """Far from anything, but any model can be cut so."""
    return Edit(9.0, {**dict.fromkeys(COST, 1), "fsdp": world, "hsdp": False}, frozenset(["all"]))


def _far(axis: str, old: int, new: int) -> float:
    return COST[axis] + (NEW[axis] if old == 1 else 0.0) + PER_DOUBLING * abs(log2(new / old))


def _products(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as a product of `parts` whole numbers, in order."""
    if parts == 0:
        if number == 1:
            yield ()
        return
    for first in _divisors(number) if parts > 1 else (number,):
        for others in _products(number // first, parts - 1):
            yield (first, *others)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _without_idle_words(values: dict[str, Any]) -> dict[str, Any]:
    """What degrees make meaningless, left out."""
    if values["tp"] == 1:
        values |= {"sp": False, "loss_parallel": True, "tp_parts": "all"}
    if values["cp"] == 1:
        values["cp_method"] = "ring"
    if values["pp"] == 1:
        values |= {"schedule": "1f1b", "microbatches": 1, "virtual_stages": 1}
    if values["stage_split"] is not None and (values["pp"] == 1 or len(values["stage_split"]) != _stages(values)):
        values["stage_split"] = None
    if values["fsdp"] == 1 and values["offload"] == "params":
        values["offload"] = "none"
    return values


def _stages(values: Mapping[str, Any]) -> int:
    return int(values["pp"] * max(values["virtual_stages"], least_stages_per_rank(values["schedule"])))


def _other_words(values: Mapping[str, Any]) -> Iterator[Edit]:
    """One word that is not a degree."""
    if values["pp"] > 1:
        yield from _other_pipeline(values)
    if values["cp"] > 1:
        yield from (_word(1.0, cp_method=name) for name in ("ring", "allgather") if name != values["cp_method"])
    for name in RECOMPUTE_INSTEAD.get(str(values["recompute"]).partition("=")[0], ()):
        yield _word(1.0, recompute=name)
    if values["offload"] != "none":
        yield _word(1.0, offload="none")
    if values["tp_parts"] != "all":
        yield _word(1.0, tp_parts="all")


def _other_pipeline(values: Mapping[str, Any]) -> Iterator[Edit]:
    pp, stages, asked = values["pp"], _stages(values), values["microbatches"]
    for pieces in sorted({stages, 2 * stages, pp, *(-(-asked // n) * n for n in (pp, stages))}):
        if pieces != asked:
            yield _word(1.0 + PER_DOUBLING * abs(log2(pieces / asked)), microbatches=pieces)
    for virtual in range(1, min(values["virtual_stages"], 9)):
        yield _word(1.0 + PER_DOUBLING * log2(values["virtual_stages"] / virtual), virtual_stages=virtual)
    for name in SCHEDULES:
        if name != values["schedule"]:
            # One with one stage per rank, or exactly two, takes no virtual_stages.
            follows = {} if SCHEDULES[name].shape == "loop" else {"virtual_stages": 1}
            yield Edit(1.05 if name == "1f1b" else 1.1, {"schedule": name, **follows}, frozenset(["schedule"]))
    if (split := values["stage_split"]) is not None:
        yield _word(1.0, stage_split=None)
        for stage, more in ((s, m) for s in range(min(len(split), 8)) for m in (-2, -1, 1, 2)):
            edited = (*split[:stage], split[stage] + more, *split[stage + 1 :])
            yield Edit(1.0 + 0.1 * abs(more), {"stage_split": edited}, frozenset(["a stage"]))


# ---- edits of words that do not go together ---------------------------------------------------------------------


def _together(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Edit]:
    """Words dropped, axes added or closed, and two of these."""
    single = [_word(1.0, **{name: default}) for name, default in defaults.items() if values[name] != default]
    if values["hsdp"] or REST in values.values():
        single += [_word(0.9, **{axis: 2}) for axis in COST if values[axis] in (1, REST)]
    else:
        single += [_word(0.9, **{axis: REST}) for axis in COST if values[axis] == 1]
    if values["pp"] > 1 and values["stage_split"] is not None:
        single.append(_word(1.1, pp=len(values["stage_split"])))
    if values["tp_parts"] != "all" and not values["sp"]:
        single.append(_word(0.9, sp=True))
    yield from single
    yield from (one.and_(other) for one, other in combinations(single, 2) if one.changes != other.changes)
