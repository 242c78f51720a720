"""The ilp partition: minimise (m - 1) * slowest stage + sum of stages, with scipy's HiGHS.

It knows a chain and its cuts. A stage is a path's arc (i, start, end), a partition a path from the first node to the
last, so that the relaxation is tight but for the slowest stage. An exact dynamic program bounds that from both sides
and often proves the optimum alone; HiGHS gets what is left, without arcs that no optimal path can have: 642 nodes in 32
stages are thousands of arcs, not millions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError
from fms_parallel.planner.fasop.partition import enough, shortest

Array = NDArray[Any]

BISECTIONS = 60
"""Steps in which the dynamic program alone may prove the optimum, before HiGHS is asked."""
GAP = 1e-4
"""Relative distance from the proven optimum at which HiGHS stops."""


@dataclass(frozen=True)
class Arc:
    """Stage `stage` over nodes start..end-1, with its load and the send that it waits for."""

    stage: int
    start: int
    end: int
    load: float
    send: float


def integer_program(seconds: Array, sends: Array, stages: int, micros: int, limit_s: float = 20.0) -> list[int]:
    """Nodes of each stage. A stage costs its work and, in the middle, what it waits for: sends[start][stage - 1].

    Raises:
        ConfigError: scipy is not installed, fewer nodes than stages, or no answer in `limit_s` seconds.
    """
    enough(len(seconds), stages)
    if stages == 1:
        return [len(seconds)]
    chain = _Chain(np.asarray(seconds, dtype=float), np.asarray(sends, dtype=float), stages, micros)
    if micros == 1:
        return chain.cheapest()
    low, counts = chain.balanced()
    high = chain.highest(low, counts)
    counts, proven = _bisect(chain, low, high, counts)
    if proven:
        return counts
    found = _solve(chain.arcs(high), chain, low, high, limit_s)
    return min((counts, found), key=chain.objective) if found else counts


def _bisect(chain: _Chain, low: float, high: float, counts: list[int]) -> tuple[list[int], bool]:
    """Narrow the slowest stage by halves: below b and above a, nothing is better than (m - 1) a + the sum at b.

    Returns the best partition seen, and whether it is proven to lie within `GAP` of the optimum.
    """
    best, most = counts, chain.cheapest_below(high)
    best = min((best, most), key=chain.objective)
    parts = [(low, high, sum(chain.loads(most)))]
    for _ in range(BISECTIONS):
        ahead = chain.micros - 1
        parts = [p for p in parts if ahead * p[0] + p[2] < chain.objective(best) * (1 - GAP)]
        if not parts:
            return best, True
        a, b, least = parts.pop(min(range(len(parts)), key=lambda i: ahead * parts[i][0] + parts[i][2]))
        middle = (a + b) / 2
        found = chain.cheapest_below(middle)
        best = min((best, found), key=chain.objective)
        parts += [(a, middle, sum(chain.loads(found))), (middle, b, least)]
    return best, False


class _Chain:
    """Loads and sends of a chain of nodes."""

    def __init__(self, seconds: Array, sends: Array, stages: int, micros: int) -> None:
        self.seconds, self.stages, self.micros = seconds, stages, micros
        self.prefix = np.concatenate([[0.0], np.cumsum(seconds)])
        zero = np.zeros(len(seconds))
        # into[i][s - 1] is what a stage that starts at node s waits for.
        shifted = np.concatenate([sends[1:], sends[-1:]])
        self.into = [shifted[:, i - 1] if 0 < i < stages - 1 else zero for i in range(stages)]
        self.out = [zero] * stages

    def send(self, stage: int, start: int) -> float:
        """Seconds that a stage waits."""
        return float(self.into[stage][start - 1]) if start else 0.0

    def loads(self, counts: Sequence[int]) -> list[float]:
        """Seconds of each stage."""
        edges = [0, *np.cumsum(counts).tolist()]
        work = [self.prefix[b] - self.prefix[a] for a, b in pairwise(edges)]
        return [float(w + self.send(i, edges[i])) for i, w in enumerate(work)]

    def objective(self, counts: Sequence[int]) -> float:
        """(m - 1) * slowest + sum."""
        loads = self.loads(counts)
        return (self.micros - 1) * max(loads) + sum(loads)

    def cheapest(self) -> list[int]:
        """Smallest sum."""
        return shortest(self.seconds, self.into, self.out, np.add)

    def cheapest_below(self, limit: float) -> list[int]:
        """Smallest sum with no stage slower than `limit`."""
        return shortest(self.seconds, self.into, self.out, np.add, limit)

    def balanced(self) -> tuple[float, list[int]]:
        """The smallest possible slowest stage, and the cheapest partition that reaches it."""
        slowest = max(self.loads(shortest(self.seconds, self.into, self.out, np.maximum)))
        return slowest, self.cheapest_below(slowest * (1 + 1e-12))

    def highest(self, low: float, counts: list[int]) -> float:
        """A slowest stage above this cannot pay: even with the cheapest sends the sum would be larger."""
        least = sum(self.loads(self.cheapest()))
        return max(low, (self.objective(counts) - least) / (self.micros - 1)) * (1 + 1e-12)

    def arcs(self, high: float) -> list[Arc]:
        """Arcs of paths without a stage above `high`."""
        n, total = len(self.seconds), float(self.prefix[-1])
        found = []
        for i in range(self.stages):
            for start in range(i, n - self.stages + i + 1) if i else (0,):
                if self.prefix[start] > i * high or total - self.prefix[start] > (self.stages - i) * high:
                    continue
                send = self.send(i, start)
                last = int(np.searchsorted(self.prefix, self.prefix[start] + high - send + 1e-12, side="right")) - 1
                for end in range(start + 1, last + 1) if i < self.stages - 1 else ((n,) if last >= n else ()):
                    rest = total - self.prefix[end]
                    if rest <= (self.stages - i - 1) * high + 1e-12 and n - end >= self.stages - i - 1:
                        load = float(self.prefix[end] - self.prefix[start]) + send
                        found.append(Arc(i, start, end, load, send))
        return found


def _solve(arcs: list[Arc], chain: _Chain, low: float, high: float, limit_s: float) -> list[int]:
    """Nodes of each stage, or nothing where HiGHS finds no path in time."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError:
        raise ConfigError("the ilp partition needs scipy: pip install 'fms_parallel[plan]'.") from None
    last = len(arcs)
    entries, inner = _constraints(arcs, chain.stages)
    rows, columns, values = zip(*entries, strict=True)
    matrix = csr_matrix((values, (rows, columns)), shape=(chain.stages + inner + 1, last + 1))
    lower = np.concatenate([np.full(chain.stages, -np.inf), np.zeros(inner), [1.0]])
    upper = np.concatenate([np.zeros(chain.stages + inner), [1.0]])
    answer = milp(
        np.array([*(arc.send for arc in arcs), chain.micros - 1.0]),
        constraints=LinearConstraint(matrix, lower, upper),
        integrality=np.array([*[1] * last, 0]),
        bounds=Bounds(np.array([*[0.0] * last, low]), np.array([*[1.0] * last, high])),
        options={"time_limit": limit_s, "mip_rel_gap": GAP},
    )
    if answer.x is None:
        return []
    chosen = sorted((arc for arc, x in zip(arcs, answer.x, strict=False) if x > 0.5), key=lambda arc: arc.stage)
    return [arc.end - arc.start for arc in chosen]


def _constraints(arcs: list[Arc], stages: int) -> tuple[list[tuple[int, int, float]], int]:
    """(row, column, value) of the constraints, and how many inner nodes there are.

    Columns are arcs, and the slowest stage behind them. Rows: no stage is slower than that; a path that comes to an
    inner node goes on from there; one path begins.
    """
    entries: list[tuple[int, int, float]] = [(stage, len(arcs), -1.0) for stage in range(stages)]
    inner: dict[tuple[int, int], int] = {}
    for j, arc in enumerate(arcs):
        entries.append((arc.stage, j, arc.load))
        for node, sign in (((arc.stage, arc.start), 1.0), ((arc.stage + 1, arc.end), -1.0)):
            if 0 < node[0] < stages:
                entries.append((inner.setdefault(node, stages + len(inner)), j, sign))
    entries += [(stages + len(inner), j, 1.0) for j, arc in enumerate(arcs) if arc.stage == 0]
    return entries, len(inner)
