"""`KnowledgePolicy`: a learned policy that changes to where knowledge and speed together pay most.

log(measured / predicted) of the layouts is one normal vector, as for Thompson sampling: an error that all share, one of
each family and one of each layout's own. How large the last two are, which is how wrong the planner is, is not known
either: a few scales are weighed by how likely they make what was measured (Bayes). So one odd measurement makes every
untried layout worth a look, and a planner that proves right is believed.

A layout's value is what a change to it wins on average over everything that is possible (the knowledge gradient with
the steps that are left: Frazier et al. 2008): the steps after the trial where it is faster, less the trial where it is
not, less the change there and, as likely as it is slower, back. The best one is taken when that is above zero.

A layout whose step time jumps twice in a row by more than chance allows is a world that changed: what was measured
counts for little from then on, and the planner is taken to be wrong. It is pure: no clocks, no ranks, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fms_parallel.dynamic.policy import Arm, Array, Measures, Situation, Verdict, frozen, likeness, sides

Belief = tuple[float, Array, Array]
"""How likely a scale is; mean and covariance of log(measured / predicted) of the layouts under it."""


@dataclass
class KnowledgePolicy(Measures):
    """See above.

    Args:
        shared: standard deviation of the error that all layouts share. scales, odds: what planners are wrong by, and
            how likely each is before anything was measured; changed: after the world has changed.
        alike: part of that variance that layouts of one family share. fade: of what is known, per decision.
        surprise: standard deviations that count as a jump. kept: of what was known, when the world has changed.
        trial: steps after which a layout is known. horizon: most steps that a trial may count on. least: gain, as a
            part of a step, below which nothing is tried. dwell: steps that the run stays in a layout.
    """

    shared: float = 3.0
    scales: tuple[float, ...] = (0.03, 0.15, 0.5)
    odds: tuple[float, ...] = (0.6, 0.25, 0.15)
    changed: tuple[float, ...] = (0.1, 0.3, 0.6)
    alike: float = 0.5
    fade: float = 0.995
    surprise: float = 3.0
    kept: float = 0.02
    trial: int = 10
    horizon: int = 2000
    least: float = 0.02
    dwell: int = 10
    weights: dict[str, float] = field(default_factory=dict)
    """Layout -> precision of what was measured. means: layout -> mean of log(measured / predicted)."""
    means: dict[str, float] = field(default_factory=dict)
    condition: object = None
    turned: bool = False
    """Whether the world has changed since the run began. odd: jumps in a row."""
    odd: int = 0

    def decide(self, situation: Situation) -> Verdict:
        """See the module."""
        if situation.condition != self.condition:
            self.weights, self.means, self.condition = {}, {}, situation.condition
        if situation.seconds is not None:
            self.turned = self.learn(situation, self.kept) or self.turned
        arms = situation.arms
        here = next(index for index, arm in enumerate(arms) if arm.name == situation.current)
        beliefs = self.beliefs(arms)
        predicted = np.array([arm.predicted for arm in arms])
        expected = predicted * np.exp(sum(odds * mean for odds, mean, _ in beliefs))
        now, left = float(expected[here]), min(situation.remaining, self.horizon)
        if situation.since < self.dwell and not situation.urgent:
            return Verdict(arms[here].name, f"{situation.since} steps after the last change", now, now)
        values = [self._value(situation, beliefs, here, index, left) for index in range(len(arms))]
        best = max(range(len(arms)), key=lambda index: values[index][0])
        value, won = values[best]
        if best == here or won < self.least * now:
            return Verdict(arms[here].name, f"no change pays in the {left} steps that are left", now, now)
        known, cost = arms[best].name in self.weights, situation.cost(arms[best].name)
        reason = (
            f"{'measured' if known else 'predicted'} {expected[best]:.4g} s per step instead of {now:.4g}; on average "
            f"{left} steps win {value:.3g} s more than what the change takes, {cost:.3g} s"
        )
        return Verdict(arms[best].name, reason, float(expected[best]), now)

    def _value(
        self, situation: Situation, beliefs: Sequence[Belief], here: int, there: int, left: int
    ) -> tuple[float, float]:
        """Seconds that a change wins on average, and those of one step where it is faster; nothing for none."""
        if here == there:
            return 0.0, 0.0
        one, other = situation.arms[here], situation.arms[there]
        back, value, gain = situation.cost(one.name), -situation.cost(other.name), 0.0
        for odds, mean, spread in beliefs:
            now, then = one.predicted * math.exp(mean[here]), other.predicted * math.exp(mean[there])
            apart = max(float(spread[there, there] + spread[here, here] - 2 * spread[there, here]), 1e-12)
            won, lost, wrong = sides(now - then, now * math.sqrt(apart))
            value += odds * ((left - self.trial) * won - self.trial * lost - wrong * back)
            gain += odds * won
        return value, gain

    def beliefs(self, arms: Sequence[Arm]) -> list[Belief]:
        """What is known of the arms under every scale, and how likely the scale is."""
        seen = [index for index, arm in enumerate(arms) if arm.name in self.weights]
        noise = np.diag([1 / self.weights[arms[index].name] for index in seen])
        told = np.array([self.means[arms[index].name] for index in seen])
        families = np.array([[likeness(one.family, other.family) for other in arms] for one in arms])
        found: list[Belief] = []
        for odds, scale in zip(self.changed if self.turned else self.odds, self.scales, strict=True):
            own = (1 - self.alike) * np.eye(len(arms))
            prior = self.shared**2 + scale**2 * (self.alike * families + own)
            if not seen:
                found.append((math.log(odds), np.zeros(len(arms)), prior))
                continue
            among = prior[np.ix_(seen, seen)] + noise
            gain = np.linalg.solve(among, prior[seen]).T
            fit = told @ np.linalg.solve(among, told) + np.linalg.slogdet(among)[1]
            found.append((math.log(odds) - fit / 2, gain @ told, prior - gain @ prior[seen]))
        top = max(log for log, _, _ in found)
        total = sum(math.exp(log - top) for log, _, _ in found)
        return [(math.exp(log - top) / total, mean, spread) for log, mean, spread in found]

    def learned(self) -> dict[str, Any]:
        """See `Learner`."""
        known = {"weights": dict(self.weights), "means": dict(self.means), "condition": self.condition}
        return {**known, "turned": self.turned, "odd": self.odd}

    def recall(self, values: dict[str, Any]) -> None:
        """See `Learner`."""
        self.weights, self.means = dict(values["weights"]), dict(values["means"])
        self.condition = frozen(values["condition"])
        self.turned, self.odd = values["turned"], values["odd"]
