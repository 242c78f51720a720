"""Cutting a chain of nodes into pipeline stages: even, minmax, dp, ilp, bruteforce.

It knows node times and the time to hand on after each node; it knows no GPU. `minmax` is the seed's, step for step,
with its habit of undoing a step it never made; `dp` and `ilp` (in `integer_program`) are exact for their objectives and
fast: 642 nodes in 32 stages take well under a second and a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError

Array = NDArray[Any]

BRUTE_FORCE = 5_000_000
"""Partitions up to which all of them are tried."""


@dataclass(frozen=True)
class Partition:
    """Nodes of each stage; `timed` is what the seed takes the stage times from, which after an undo is another one."""

    counts: list[int]
    timed: list[int]


def minmax(units: int, stages: int, times: Callable[[list[int]], list[Any]]) -> Partition:
    """Move a unit at a time from the slowest to the fastest stage until the slowest gets slower or a state repeats."""
    part = [units // stages] * stages
    for i in range(units - units // stages * stages):
        part[i - 1] += 1
    seen, best = {tuple(part)}, np.inf
    slow = fast = 0
    for _ in range(100 * units):
        now = times(part)
        worst = max(now)
        if worst > best:
            part[slow] += 1
            part[fast] -= 1
            return Partition(part, list(part))
        best, before = worst, list(part)
        slow, fast = now.index(worst), now.index(min(now))
        if part[slow] > 2:
            part[slow] -= 1
            part[fast] += 1
        if tuple(part) in seen:
            part[slow] += 1
            part[fast] -= 1
            return Partition(part, before)
        seen.add(tuple(part))
    return Partition(part, list(part))


def stage_seconds(counts: Sequence[int], seconds: Array, sends: Array, offset: int) -> list[Any]:
    """Seconds of each stage with what middle stages wait for; sums run in fp32 and in order, as the seed's do."""
    found, start = [], 0
    for stage, count in enumerate(counts):
        total = np.float32(0)
        if count:
            # cumsum adds one after the other; sum would add in pairs and break ties differently.
            total = np.cumsum(seconds[start : start + count], dtype=np.float32)[-1]
        middle = 0 < stage < len(counts) - 1
        found.append(np.float32(total + sends[start - offset][stage - 1]) if middle else total)
        start += count
    return found


def even(units: int, stages: int) -> list[int]:
    """Boundaries at floor(i * units / stages)."""
    cuts = [i * units // stages for i in range(stages + 1)]
    return [b - a for a, b in pairwise(cuts)]


def dynamic(seconds: Array, sends: Array, stages: int, micros: int, compat: bool = False) -> list[int]:
    """The partition with the smallest largest stage: work, and what is received and handed on. Exact, O(p n^2).

    With one micro-batch nothing overlaps and the sum counts. `compat` prices handing on like the send before it, and
    nothing on the first stage, as the seed does.
    """
    n = len(seconds)
    enough(n, stages)
    zero = np.zeros(n)

    def out(stage: int) -> Array:
        if stage == stages - 1 or (compat and stage == 0):
            return zero
        return np.asarray(sends[:, stage - 1 if compat else stage])

    into = [zero if stage == 0 else sends[:, stage - 1] for stage in range(stages)]
    return shortest(seconds, into, [out(i) for i in range(stages)], np.maximum if micros > 1 else np.add)


def shortest(
    seconds: Array, into: Sequence[Array], out: Sequence[Array], join: Any, limit: float = np.inf
) -> list[int]:
    """Counts that minimise the largest (`join` = maximum) or the sum (add) of stages.

    A stage over nodes s..t-1 costs its work, `into[i][s - 1]` and `out[i][t - 1]`. Under `limit` only sends are added,
    and a stage may not cost more than it. Empty when nothing keeps the limit.
    """
    n, stages = len(seconds), len(into)
    prefix = np.concatenate([[0.0], np.cumsum(seconds, dtype=float)])
    cost = np.full((stages + 1, n + 1), np.inf)
    back = np.zeros((stages + 1, n + 1), dtype=np.int64)
    cost[0, 0] = 0.0
    before = [np.concatenate([[0.0], column]) for column in into]
    after = [np.concatenate([[0.0], column]) for column in out]
    for stage in range(stages):
        for end in _ends(prefix, stage, stages, limit):
            starts = np.arange(max(stage, int(np.searchsorted(prefix, prefix[end] - limit * (1 + 1e-9)))), end)
            if not len(starts):
                continue
            sends = before[stage][starts] + after[stage][end]
            load = prefix[end] - prefix[starts] + sends
            value = join(cost[stage, starts], load)
            if limit < np.inf:
                value = np.where(load <= limit, cost[stage, starts] + sends, np.inf)
            best = int(np.argmin(value))
            cost[stage + 1, end], back[stage + 1, end] = value[best], starts[best]
    return _follow(back, stages, n) if np.isfinite(cost[stages, n]) else []


def _ends(prefix: Array, stage: int, stages: int, limit: float) -> range:
    """Where a stage may end: what lies before and after must fit into the other stages under the limit."""
    n, later = len(prefix) - 1, stages - stage - 1
    first, last = stage + 1, n - later
    if limit < np.inf:
        first = max(first, int(np.searchsorted(prefix, prefix[-1] - later * limit * (1 + 1e-9))))
        last = min(last, int(np.searchsorted(prefix, (stage + 1) * limit * (1 + 1e-9), side="right")) - 1)
    return range(first, last + 1)


def _follow(back: Array, stages: int, n: int) -> list[int]:
    counts, end = [], n
    for stage in range(stages, 0, -1):
        counts.append(end - int(back[stage, end]))
        end = int(back[stage, end])
    return counts[::-1]


def brute_force(seconds: Array, stages: int) -> list[int]:
    """Every partition; the smallest largest stage by work alone, the first of equals.

    Raises:
        ConfigError: more partitions than can be tried.
    """
    n = len(seconds)
    enough(n, stages)
    if comb(n - 1, stages - 1) > BRUTE_FORCE:
        raise ConfigError(
            f"bruteforce: {n} nodes in {stages} stages are {comb(n - 1, stages - 1):.2e} partitions, more than "
            f"{BRUTE_FORCE:.0e}: use --pp-partition-method dp, which is exact, too."
        )
    prefix = np.concatenate([[0.0], np.cumsum(seconds, dtype=float)])
    best, found = np.inf, [n]
    for cuts in combinations(range(1, n), stages - 1):
        edges = np.array((0, *cuts, n))
        worst = float(np.max(prefix[edges[1:]] - prefix[edges[:-1]]))
        if worst < best - 1e-12:
            best, found = worst, np.diff(edges).tolist()
    return found


def enough(nodes: int, stages: int) -> None:
    """Raises ConfigError when there are fewer nodes than stages."""
    if stages > nodes:
        raise ConfigError(f"{nodes} nodes cannot be cut into {stages} stages: each needs one.")
