"""Micro-batches that one rank holds at once, by schedule and in closed form.

It knows counts, of torch's own orders of work: tests walk through those. What a micro-batch keeps, `memory` knows.

A schedule that splits the backward pass first asks a stage for the gradients of its inputs. torch keeps the whole graph
of that forward until the second half has made those of the weights, and besides the gradients of all results of
products, from which the second half starts. The first stage has no inputs to ask for: it does all in the second half.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import Columns
from fms_parallel.planner.schedule import CODE, SPLITS, TURNS

Array = NDArray[Any]


@dataclass(frozen=True)
class Flight:
    """One moment of a rank, in micro-batches of all its stages: one of two stages' counts half.

    Attributes:
        whole: micro-batches that keep what their forward pass keeps. split: those between the two halves.
        answered: those whose inputs' gradients lie in memory until the step ends, as a first half leaves them.
        late: 1 where the gradients of all weights are there. within: stages whose results the same rank reads.
    """

    whole: Array
    split: Array
    answered: Array
    late: Array
    within: Array

    @property
    def held(self) -> Array:
        """Both."""
        return np.asarray(self.whole + self.split)


def plain(held: Array) -> Flight:
    """Where backward passes come in one piece."""
    none = np.zeros_like(held)
    return Flight(held, none, none, none, none)


def flights(columns: Columns, last: bool) -> list[Flight]:
    """The moments of the first rank or (`last`) the last that can be its fullest.

    In a V schedule the rank with the last stage is the first one: `last` then means that one.
    """
    code = columns.schedule
    one = plain(_of_last(columns) if last else _of_first(columns))
    rows = np.isin(code, SPLITS) & (columns.pp > 1)
    if not rows.any():
        return [one]
    return [_where(rows, moment, one) for moment in _splitting(columns, last)]


def _where(rows: Array, yes: Flight, no: Flight) -> Flight:
    return Flight(**{f.name: np.where(rows, getattr(yes, f.name), getattr(no, f.name)) for f in fields(Flight)})


def _splitting(columns: Columns, last: bool) -> list[Flight]:
    """While micro-batches still come, and when only second halves are left.

    In stages times micro-batches; p ranks of v stages, m micro-batches in rounds of r:

                                 first rank           last rank
        interleaved_zero_bubble  (v-1) r + p-1, 1     (v-1) r, p
        zbv                      2p - 1, 1            2p - 1, 1   then 0, 2p - 1
        dualpipev                2p + 1, 0            2p + 1, 0   then 0, p
                                 2p - 1, 1
    """
    p, v, m, code = columns.pp, columns.virtual, columns.count, columns.schedule
    bent, dual = np.isin(code, TURNS), code == CODE["dualpipev"]
    middle = bent & (not last)  # of a V: the rank with neither end
    turns = (v - 1) * (m // np.maximum(m // p, 1))
    comes = np.where(last, turns, turns + p - 1), np.where(last, p, 1)
    comes = np.where(bent, 2 * p - 1, comes[0]), np.where(bent, 1, comes[1])
    comes = np.where(dual, 2 * p + 1, comes[0]), np.where(dual, 0, comes[1])
    goes = np.where(dual, p, np.minimum(2 * np.maximum(m - p, 0) + 1, 2 * p - 1))
    ends = np.where(middle, 0, np.where(dual, 2 * p - 1, comes[0])), np.where(middle, goes, np.where(dual, 1, comes[1]))
    few = np.where(bent & last & ~dual, m, v * m)  # zbv's first rank holds one micro-batch of its last stage
    found = []
    for (whole, split), late in ((comes, np.zeros_like(p)), (ends, middle)):
        whole = np.minimum(whole, few)
        answered = np.where(dual, np.where(middle, p / 2, p - 1), np.maximum(m - whole / v, 0))
        found.append(Flight(whole / v, split / v, answered, late, middle))
    return found


def _of_first(columns: Columns) -> Array:
    pp, m, v = columns.pp, columns.count, columns.virtual
    held = np.where(v > 1, np.minimum((pp * v + pp - 1) / v, m), np.minimum(pp, m))
    held = np.where(_all_at_once(columns), m, held)
    return np.where(pp == 1, 1, held)


def _of_last(columns: Columns) -> Array:
    """One in 1F1B, all in GPipe, and those of its other stages."""
    pp, v, first = columns.pp, columns.virtual, _of_first(columns)
    steady = np.where(v > 1, np.minimum((pp * (v - 1) + 1) / v, first), 1.0)
    return np.where(_all_at_once(columns) | (pp == 1), first, steady)


def _all_at_once(columns: Columns) -> Array:
    return np.asarray((columns.schedule == CODE["gpipe"]) | (columns.schedule == CODE["looped_bfs"]))
