"""Cutting a chain of nodes into pipeline stages: even, minmax, dp, ilp, bruteforce.

It knows node times and the time to hand on after each node; it knows no GPU. `minmax` is the seed's, step for step, with
its habit of undoing a step it never made; `dp` and `ilp` are exact for their objectives and fast: 642 nodes in 32 stages
take well under a second and a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
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
    steps: int = 0


def minmax(units: int, stages: int, times: Callable[[list[int]], list[Any]]) -> Partition:
    """Move one unit at a time from the slowest to the fastest stage until the slowest gets slower or a state repeats."""
    part = [units // stages] * stages
    for i in range(units - units // stages * stages):
        part[i - 1] += 1
    seen, best = {tuple(part)}, np.inf
    slow = fast = 0
    for step in range(100 * units):
        now = times(part)
        worst = max(now)
        if worst > best:
            part[slow] += 1
            part[fast] -= 1
            return Partition(part, list(part), step)
        best, before = worst, list(part)
        slow, fast = now.index(worst), now.index(min(now))
        if part[slow] > 2:
            part[slow] -= 1
            part[fast] += 1
        if tuple(part) in seen:
            part[slow] += 1
            part[fast] -= 1
            return Partition(part, before, step)
        seen.add(tuple(part))
    return Partition(part, list(part), 100 * units)


def stage_seconds(counts: Sequence[int], seconds: Array, sends: Array, offset: int) -> list[Any]:
    """Seconds of each stage with what middle stages wait for; sums run in fp32 and in order, as the seed's do."""
    found, start = [], 0
    for stage, count in enumerate(counts):
        total = np.float32(0)
        for value in seconds[start : start + count]:
            total = np.float32(total + value)
        middle = 0 < stage < len(counts) - 1
        found.append(np.float32(total + sends[start - offset][stage - 1]) if middle else total)
        start += count
    return found


def even(units: int, stages: int) -> list[int]:
    """Boundaries at floor(i * units / stages)."""
    cuts = [i * units // stages for i in range(stages + 1)]
    return [b - a for a, b in zip(cuts, cuts[1:], strict=False)]


def dynamic(seconds: Array, sends: Array, stages: int, micros: int) -> list[int]:
    """The partition with the smallest largest stage: work, and what is received and handed on. Exact, O(p n^2).

    With one micro-batch nothing overlaps and the sum counts: then fewest and cheapest sends decide.
    """
    n = len(seconds)
    _enough(n, stages)
    prefix = np.concatenate([[0.0], np.cumsum(seconds, dtype=float)])
    cost = np.full((stages + 1, n + 1), np.inf)
    back = np.zeros((stages + 1, n + 1), dtype=np.int64)
    cost[0, 0] = 0.0
    join = np.maximum if micros > 1 else np.add
    for stage in range(1, stages + 1):
        into = np.concatenate([[0.0], sends[:, stage - 2]]) if stage > 1 else np.zeros(n + 1)
        out = np.concatenate([[0.0], sends[:, stage - 1]]) if stage < stages else np.zeros(n + 1)
        for end in range(stage, n - (stages - stage) + 1):
            starts = np.arange(stage - 1, end)
            value = join(cost[stage - 1, starts], prefix[end] - prefix[starts] + into[starts] + out[end])
            best = int(np.argmin(value))
            cost[stage, end], back[stage, end] = value[best], starts[best]
    return _follow(back, stages, n)


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
    _enough(n, stages)
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


def integer_program(seconds: Array, sends: Array, stages: int, micros: int, limit_s: float = 60.0) -> list[int]:
    """Minimise (m - 1) * slowest stage + sum of stages with HiGHS; a stage is its work and what it waits for.

    x[k, i] says that stage i starts at node k. Stages start in windows only: with the bound that `dynamic` gives, no
    stage can lie far from its share, so that 642 nodes in 32 stages are a few hundred binaries.

    Raises:
        ConfigError: scipy is not installed, or HiGHS finds nothing in `limit_s` seconds.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError:
        raise ConfigError("the ilp partition needs scipy: pip install 'fms_parallel[plan]'.") from None
    n = len(seconds)
    _enough(n, stages)
    if stages == 1:
        return [n]
    program = _Program(np.asarray(seconds, dtype=float), np.asarray(sends, dtype=float), stages, micros)
    rows, low, high = program.constraints()
    matrix = csr_matrix(
        ([v for row in rows for v in row.values()],
         ([i for i, row in enumerate(rows) for _ in row], [j for row in rows for j in row])),
        shape=(len(rows), program.variables),
    )  # fmt: skip
    whole = np.ones(program.variables)
    whole[-1] = 0
    upper = np.ones(program.variables)
    upper[-1] = np.inf
    answer = milp(
        program.objective(),
        constraints=LinearConstraint(matrix, low, high),
        integrality=whole,
        bounds=Bounds(0, upper),
        options={"time_limit": limit_s, "mip_rel_gap": 1e-6},
    )
    if answer.x is None:
        raise ConfigError(f"ilp: HiGHS found no partition in {limit_s} s ({answer.message}): use dp.")
    return program.counts(answer.x)


class _Program:
    """Variables and constraints of the integer program; the last variable is the slowest stage."""

    def __init__(self, seconds: Array, sends: Array, stages: int, micros: int) -> None:
        self.seconds, self.sends, self.stages, self.micros = seconds, sends, stages, micros
        self.prefix = np.concatenate([[0.0], np.cumsum(seconds)])
        counts = dynamic(seconds, sends, stages, 2)
        self.bound = self._objective_of(counts) / max(micros - 1 + 1e-9, 1e-9) if micros > 1 else np.inf
        self.bound = self._slowest_allowed(counts)
        total, n = self.prefix[-1], len(seconds)
        self.windows = [
            [k for k in range(i, n - stages + i + 1)
             if self.prefix[k] <= i * self.bound + 1e-9 and total - self.prefix[k] <= (stages - i) * self.bound + 1e-9]
            for i in range(1, stages)
        ]  # fmt: skip
        self.index = {}
        for i, window in enumerate(self.windows, 1):
            for k in window:
                self.index[k, i] = len(self.index)
        self.variables = len(self.index) + 1

    def _objective_of(self, counts: list[int]) -> float:
        times = self._times(counts)
        return (self.micros - 1) * max(times) + sum(times)

    def _times(self, counts: list[int]) -> list[float]:
        edges = np.concatenate([[0], np.cumsum(counts)])
        work = np.diff(self.prefix[edges])
        return [float(w + (self.sends[edges[i]][i - 1] if 0 < i < self.stages - 1 else 0)) for i, w in enumerate(work)]

    def _slowest_allowed(self, counts: list[int]) -> float:
        """No better partition has a slower stage: its sum is at least all the work."""
        if self.micros == 1:
            return float(self.prefix[-1])
        return (self._objective_of(counts) - float(self.prefix[-1])) / (self.micros - 1)

    def objective(self) -> Array:
        """Coefficients: sends of middle stages, and (m - 1) of the slowest stage."""
        found = np.zeros(self.variables)
        found[-1] = self.micros - 1
        for (k, i), j in self.index.items():
            if i < self.stages - 1:
                found[j] = self.sends[k][i - 1]
        return found

    def constraints(self) -> tuple[list[dict[int, float]], Array, Array]:
        """One start per stage, starts in order, no stage slower than the slowest."""
        rows: list[dict[int, float]] = []
        low: list[float] = []
        high: list[float] = []
        for i, window in enumerate(self.windows, 1):
            rows.append({self.index[k, i]: 1.0 for k in window})
            low.append(1.0)
            high.append(1.0)
        for i in range(1, self.stages - 1):
            row = {self.index[k, i + 1]: float(k) for k in self.windows[i]}
            row |= {self.index[k, i]: -float(k) for k in self.windows[i - 1]}
            rows.append(row)
            low.append(1.0)
            high.append(np.inf)
        for i in range(self.stages):
            rows.append(self._load(i))
            low.append(-np.inf)
            high.append(-float(self.prefix[-1]) if i == self.stages - 1 else 0.0)
        return rows, np.array(low), np.array(high)

    def _load(self, i: int) -> dict[int, float]:
        """prefix[start of i + 1] - prefix[start of i] + send - slowest <= 0; the total is on the right for the last."""
        row: dict[int, float] = {self.variables - 1: -1.0}
        if i < self.stages - 1:
            row |= {self.index[k, i + 1]: float(self.prefix[k]) for k in self.windows[i]}
        if i > 0:
            middle = i < self.stages - 1
            for k in self.windows[i - 1]:
                row[self.index[k, i]] = float(-self.prefix[k] + (self.sends[k][i - 1] if middle else 0.0))
        return row

    def counts(self, x: Array) -> list[int]:
        """Nodes of each stage."""
        starts = [max(window, key=lambda k: x[self.index[k, i]]) for i, window in enumerate(self.windows, 1)]
        edges = [0, *starts, len(self.seconds)]
        return [b - a for a, b in zip(edges, edges[1:], strict=False)]


def _enough(nodes: int, stages: int) -> None:
    if stages > nodes:
        raise ConfigError(f"{nodes} nodes cannot be cut into {stages} stages: each needs one.")
