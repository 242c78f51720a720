"""Policies in simulated runs: how much slower than an oracle that knows every layout's true step time.

A world has layouts with predicted and true step times that differ by a known mismatch, noise, spikes, a switch cost and
changes on the way. It is pure and seeded: the same words give the same numbers. `benchmarks/decisions.py` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.dynamic.policy import Arm, Policy, Situation

Array = NDArray[Any]


@dataclass(frozen=True)
class World:
    """One simulated run.

    Attributes:
        truths: true seconds of a step of every layout, one row per phase. predictions: what the planner says, the same
            form. starts: the first step of every phase. announced: whether the policy is told of phases.
        costs: seconds of a change to each layout. noise: relative, of one step. spikes: part of the steps that take
            three times as long. every: steps between two decisions. steps: of the run. families: of each layout.
    """

    truths: tuple[tuple[float, ...], ...]
    predictions: tuple[tuple[float, ...], ...]
    starts: tuple[int, ...]
    costs: tuple[float, ...]
    families: tuple[tuple[str, ...], ...]
    noise: float = 0.05
    spikes: float = 0.0
    every: int = 10
    steps: int = 500
    announced: bool = True

    def phase(self, step: int) -> int:
        """The phase that a step belongs to."""
        return sum(step >= start for start in self.starts) - 1

    def until(self, step: int) -> int:
        """Steps left of what is known to stay: the phase when phases are announced, else the run."""
        if not self.announced:
            return self.steps - step
        return min((start for start in self.starts if start > step), default=self.steps) - step


@dataclass(frozen=True)
class Replay:
    """What a policy did: seconds of the whole run, of the oracle's, changes, and the layout of every decision."""

    seconds: float
    oracle: float
    switches: int
    path: tuple[int, ...]

    @property
    def regret(self) -> float:
        """How much slower than the oracle, as a part of its seconds."""
        return self.seconds / self.oracle - 1


def replay(world: World, policy: Policy, seed: int = 0, first: int | None = None) -> Replay:
    """One run under a policy; it starts in the layout that is predicted to be fastest, as a job does."""
    times = multipliers(world, seed)
    current = int(np.argmin(world.predictions[0])) if first is None else first
    names = [str(index) for index in range(len(world.costs))]
    total, switches, since, path = 0.0, 0, 10**6, []
    for begin in range(0, world.steps, world.every):
        count = min(world.every, world.steps - begin)
        phase = world.phase(begin)
        taken = world.truths[phase][current] * times[begin : begin + count]
        total += float(taken.sum())
        since += count
        path.append(current)
        step = begin + count
        if step >= world.steps:
            break
        after = world.phase(step) if world.announced else phase
        arms = tuple(
            Arm(name, world.predictions[world.phase(step)][int(name)], world.families[int(name)]) for name in names
        )
        changed = after != phase
        # What was measured belongs to the old phase's prediction: the ratio is what carries over.
        seconds = float(np.median(taken)) * world.predictions[world.phase(step)][current]
        seconds /= world.predictions[phase][current]
        scatter = float(np.median(np.abs(taken / np.median(taken) - 1))) * 1.48 * 1.25 / math.sqrt(count)
        situation = Situation(
            current=names[current],
            arms=arms,
            remaining=world.until(step),
            since=since,
            cost=lambda name: world.costs[int(name)],
            seconds=seconds,
            spread=scatter,
            urgent=changed,
        )
        verdict = int(policy.decide(situation).arm)
        if verdict != current:
            total, switches, since, current = total + world.costs[verdict], switches + 1, 0, verdict
    return Replay(total, oracle(world, times, path[0]), switches, tuple(path))


def multipliers(world: World, seed: int) -> Array:
    """How much longer each step takes than it should, whatever the layout: noise and spikes."""
    draws = np.random.default_rng(seed)
    noise = np.exp(draws.normal(0, world.noise, world.steps))
    return np.asarray(noise * np.where(draws.random(world.steps) < world.spikes, 3.0, 1.0))


def oracle(world: World, times: Array, first: int) -> float:
    """Seconds of the best sequence of layouts, changes included, when everything is known (dynamic programming)."""
    ends = [*world.starts[1:], world.steps]
    best = np.array([0.0 if arm == first else cost for arm, cost in enumerate(world.costs)])
    for phase, (start, end) in enumerate(zip(world.starts, ends, strict=True)):
        if phase:
            best = np.minimum(best, best.min() + np.array(world.costs))
        best = best + times[start:end].sum() * np.array(world.truths[phase])
    return float(best.min())


def random_world(
    seed: int,
    *,
    mismatch: float,
    noise: float = 0.05,
    spikes: float = 0.0,
    arms: int = 8,
    steps: int = 500,
    phases: int = 1,
    announced: bool = True,
    spread: float = 0.25,
    cost: float = 4.0,
) -> World:
    """Layouts whose step times differ by `spread` (of their logarithm), predicted within `mismatch`.

    Half of an error's variance is shared by layouts of one family. `cost`: of a change, in steps of the first layout.
    """
    draws = np.random.default_rng([seed, 7])
    families = [f"axis {index % 4}" for index in range(arms)]
    of_family = {name: draws.normal(0, mismatch * math.sqrt(0.5)) for name in dict.fromkeys(families)}
    error = np.array([of_family[name] for name in families]) + draws.normal(0, mismatch * math.sqrt(0.5), arms)
    bias = draws.normal(0, 0.3)
    predictions: list[tuple[float, ...]] = []
    truths: list[tuple[float, ...]] = []
    for _ in range(phases):
        fresh = np.exp(draws.normal(0, spread, arms))
        predicted = fresh if announced or not predictions else np.array(predictions[0])
        predictions.append(tuple(predicted.tolist()))
        truths.append(tuple((fresh * np.exp(bias + error)).tolist()))
    length = steps // phases
    starts = tuple(length * index for index in range(phases))
    unit = fmean(truths[0])
    costs = tuple((unit * cost * np.exp(draws.normal(0, 0.3, arms))).tolist())
    return World(
        tuple(truths),
        tuple(predictions),
        starts,
        costs,
        tuple((name,) for name in families),
        noise,
        spikes,
        steps=steps,
        announced=announced,
    )


def regrets(make: Callable[[], Policy], worlds: Sequence[World], first: int | None = None) -> list[float]:
    """The regret of a fresh policy in every world."""
    return [replay(world, make(), seed=index, first=first).regret for index, world in enumerate(worlds)]
