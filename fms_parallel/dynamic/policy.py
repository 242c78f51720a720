"""Which layout a run should go on in: what a policy is told, what it answers, and those that there are.

    RulePolicy         the calibrated prediction, a break-even rule, hysteresis
    ThompsonPolicy     learns the error of every prediction, and tries a layout when what it may win pays the trial
    KnowledgePolicy    learns also how wrong the planner is, and values every trial (knowledge.py)

All price a layout as prediction x learned factor. It is pure: no clocks, no ranks, no torch; `replay.py` runs
policies by the thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown

Array = NDArray[Any]


@dataclass(frozen=True)
class Arm:
    """A layout that the run could have.

    Attributes:
        name: the layout as text. predicted: seconds of a step that the planner expects, as things are now.
        family: what it has in common with others, such as the axes that it uses: errors of alike layouts are alike.
    """

    name: str
    predicted: float
    family: tuple[str, ...] = ()


@dataclass(frozen=True)
class Situation:
    """What a decision is made from.

    Attributes:
        current: the arm the run is in. arms: all that fit, the current one among them. remaining: steps for which
            things stay as they are, as far as is known. since: steps since the last change. cost: seconds that a
            change to an arm takes. seconds: of a step, measured since the last decision; None: nothing new.
            spread: relative error of that number. urgent: something has just happened (a phase, a straggler).
        condition: of the machine (which ranks are slow); what was learned under another one does not count.
    """

    current: str
    arms: tuple[Arm, ...]
    remaining: int
    since: int
    cost: Callable[[str], float]
    seconds: float | None = None
    spread: float = 0.05
    urgent: bool = False
    condition: object = None

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Verdict:
    """The arm to go on in and why; `expected`: seconds of a step there, `now`: here."""

    arm: str
    reason: str
    expected: float
    now: float


class Policy(Protocol):
    """Decides. It may keep what it learns; it is asked on one rank only."""

    def decide(self, situation: Situation) -> Verdict:
        """Learn from what was measured, and say where to go on."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A policy whose knowledge outlives its run."""

    def learned(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        ...

    def recall(self, values: dict[str, Any]) -> None:
        """Know again what `learned` told, also after a journey through a file."""
        ...


# ---- rules ------------------------------------------------------------------------------------------------------


@dataclass
class RulePolicy:
    """Change when  steps left * seconds won per step > `margin` * seconds of the change, and

    the gain is above `least` of a step and above twice its measured spread, and the run has been `dwell` steps in its
    layout. What was measured corrects the prediction of its layout; the layouts not seen yet are all corrected by the
    geometric mean of the known corrections. A layout that disappoints is so corrected upwards, and left again.
    """

    margin: float = 1.5
    least: float = 0.05
    dwell: int = 10
    forget: float = 0.5
    """Weight of the newest measurement of a layout."""
    factors: dict[str, float] = field(default_factory=dict)
    """Layout -> logarithm of measured over predicted."""
    condition: object = None

    def decide(self, situation: Situation) -> Verdict:
        """See the class."""
        if situation.condition != self.condition:
            self.factors, self.condition = {}, situation.condition
        here = situation.arm(situation.current)
        if situation.seconds is not None:
            ratio = math.log(situation.seconds / here.predicted)
            old = self.factors.get(here.name, ratio)
            self.factors[here.name] = old + self.forget * (ratio - old)
        now = self._expected(here)
        best = min(situation.arms, key=self._expected)
        expected = self._expected(best)
        refusal = self._refusal(situation, best, now - expected, now)
        if refusal:
            return Verdict(here.name, refusal, now, now)
        reason = (
            f"{expected:.4g} s per step instead of {now:.4g}: {situation.remaining} steps win "
            f"{situation.remaining * (now - expected):.3g} s, the change takes {situation.cost(best.name):.3g} s"
        )
        return Verdict(best.name, reason, expected, now)

    def learned(self) -> dict[str, Any]:
        """See `Learner`."""
        return {"factors": dict(self.factors), "condition": self.condition}

    def recall(self, values: dict[str, Any]) -> None:
        """See `Learner`."""
        self.factors, self.condition = dict(values["factors"]), frozen(values["condition"])

    def _expected(self, arm: Arm) -> float:
        known = self.factors.get(arm.name)
        if known is None:
            known = sum(self.factors.values()) / len(self.factors) if self.factors else 0.0
        return arm.predicted * math.exp(known)

    def _refusal(self, situation: Situation, best: Arm, gain: float, now: float) -> str:
        """Why the run stays, or nothing."""
        if best.name == situation.current:
            return "nothing faster is known"
        if situation.since < self.dwell and not situation.urgent:
            return f"{situation.since} steps after the last change"
        if gain < max(self.least, 2 * situation.spread) * now:
            return f"a gain of {gain / now:.1%} is within {max(self.least, 2 * situation.spread):.0%}"
        cost = situation.cost(best.name)
        if situation.remaining * gain <= self.margin * cost:
            return f"{situation.remaining} steps win {situation.remaining * gain:.3g} s, the change takes {cost:.3g} s"
        return ""


# ---- learned ----------------------------------------------------------------------------------------------------


KEPT = 0.02
"""Of what Thompson sampling knew, when the world has changed."""


class Measures:
    """What a learned policy has measured, of each layout log(measured / predicted) as a normal number.

    Attributes:
        weights, means: layout -> precision and mean. odd: measurements in a row that were further off than chance is.
        fade: of what is known, per decision. surprise: standard deviations that count as off.
    """

    weights: dict[str, float]
    means: dict[str, float]
    odd: int
    fade: float
    surprise: float

    def learn(self, situation: Situation, kept: float) -> bool:
        """Take in what the last steps took; whether the world has changed, and only `kept` of what is known counts."""
        here, turned = situation.arm(situation.current), False
        assert situation.seconds is not None
        value, variance = math.log(situation.seconds / here.predicted), max(situation.spread, 0.01) ** 2
        for name in self.weights:
            self.weights[name] *= self.fade
        if here.name in self.weights:
            apart = abs(value - self.means[here.name]) / math.sqrt(variance + 1 / self.weights[here.name])
            self.odd = self.odd + 1 if apart > self.surprise else 0
            if self.odd == 2:  # once may be chance
                self.weights = {name: weight * kept for name, weight in self.weights.items()}
                self.odd, turned = 0, True
        weight, old = 1 / variance, self.weights.get(here.name, 0.0)
        self.means[here.name] = (old * self.means.get(here.name, 0.0) + weight * value) / (old + weight)
        # No layout is ever known better than to a percent: what a step takes drifts.
        self.weights[here.name] = min(old + weight, 1e4)
        return turned


@dataclass
class ThompsonPolicy(Measures):
    """Thompson sampling (Thompson 1933; Russo et al., arXiv 1707.02038) over layouts, the planner as prior.

    log(measured / predicted) of the arms is one normal vector: an error that all share (`shared`, how wrong the machine
    is described), one per family (`alike`) and one of each arm's own (`own`), so a measurement of one layout tells
    about the others. Every decision draws one vector from what is known and looks at the arm that would end the phase
    first in it. It is tried when that pays on average over everything that is possible: what is won if it is faster,
    for the steps that are left, against both changes and the steps of the trial if it is not. What is known fades by
    `fade` per decision, and at once when a measurement lies `surprise` standard deviations away: things have changed.

    Args:
        belief: how many measured layouts `alike` and `own` are worth, before what is measured scales them.
        trial: steps after which a layout is known. horizon: most steps that a trial may count on.
    """

    shared: float = 3.0
    alike: float = 0.1
    own: float = 0.12
    fade: float = 0.995
    surprise: float = 6.0
    dwell: int = 10
    least: float = 0.02
    belief: float = 2.0
    trial: int = 10
    horizon: int = 2000
    seed: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    """Arm -> precision of what was measured. means: arm -> mean of log(measured / predicted)."""
    means: dict[str, float] = field(default_factory=dict)
    condition: object = None
    odd: int = 0

    def __post_init__(self) -> None:
        self._draws = np.random.default_rng(self.seed)

    def decide(self, situation: Situation) -> Verdict:
        """See the class."""
        if situation.condition != self.condition:
            self.weights, self.means, self.condition = {}, {}, situation.condition
        if situation.seconds is not None:
            self.learn(situation, KEPT)
        mean, covariance = self.posterior(situation.arms)
        predicted = np.array([arm.predicted for arm in situation.arms])
        spread = np.sqrt(np.diag(covariance))
        names = [arm.name for arm in situation.arms]
        here = names.index(situation.current)
        expected = predicted * np.exp(mean)
        if situation.since < self.dwell and not situation.urgent:
            return self._stay(names[here], f"{situation.since} steps after the last change", float(expected[here]))
        left = min(situation.remaining, self.horizon)
        costs = np.array([0.0 if name == names[here] else situation.cost(name) for name in names])
        drawn = predicted * np.exp(self._draws.multivariate_normal(mean, covariance, method="eigh"))
        best, now = int(np.argmin(drawn * left + costs)), float(expected[here])
        if best == here:
            return self._stay(names[here], "nothing seems faster", now)
        apart = covariance[best, best] + covariance[here, here] - 2 * covariance[best, here]
        won, lost, wrong = sides(now - float(expected[best]), now * math.sqrt(max(apart, 1e-12)))
        value = (left - self.trial) * won - self.trial * lost - costs[best] - wrong * situation.cost(names[here])
        if value <= 0 or won < self.least * now:
            return self._stay(names[here], f"trying {names[best]!r} would not pay: {left} steps are left", now)
        known = names[best] in self.weights
        reason = (
            f"{'measured' if known else 'predicted'} {expected[best]:.4g} s per step (within {spread[best]:.0%}) "
            f"instead of {now:.4g}; {left} steps count, the change takes {situation.cost(names[best]):.3g} s"
        )
        return Verdict(names[best], reason, float(expected[best]), now)

    def posterior(self, arms: Sequence[Arm]) -> tuple[Array, Array]:
        """Mean and covariance of log(measured / predicted) of the arms, given what was measured."""
        seen = [index for index, arm in enumerate(arms) if arm.name in self.weights]
        if not seen:
            return np.zeros(len(arms)), self._prior(arms, 1.0)
        noise = np.diag([1 / self.weights[arms[index].name] for index in seen])
        told = np.array([self.means[arms[index].name] for index in seen])
        known = self._prior(arms, 1.0)[np.ix_(seen, seen)] + noise
        # How far the predictions of the layouts seen lie apart tells how far those of the others may.
        scale = (self.belief + told @ np.linalg.solve(known, told)) / (self.belief + len(seen))
        prior = self._prior(arms, float(np.clip(scale, 0.25, 16.0)))
        gain = np.linalg.solve(prior[np.ix_(seen, seen)] + noise, prior[seen]).T
        return gain @ told, prior - gain @ prior[seen]

    def _prior(self, arms: Sequence[Arm], scale: float) -> Array:
        alike = np.array([[likeness(a.family, b.family) for b in arms] for a in arms])
        return np.asarray(self.shared**2 + scale * (self.alike**2 * alike + self.own**2 * np.eye(len(arms))))

    def learned(self) -> dict[str, Any]:
        """See `Learner`; the draws to come are part of it."""
        known = {"weights": dict(self.weights), "means": dict(self.means), "condition": self.condition}
        return {**known, "odd": self.odd, "draws": self._draws.bit_generator.state}

    def recall(self, values: dict[str, Any]) -> None:
        """See `Learner`."""
        self.weights, self.means = dict(values["weights"]), dict(values["means"])
        self.condition, self.odd = frozen(values["condition"]), values["odd"]
        self._draws.bit_generator.state = values["draws"]

    def _stay(self, name: str, reason: str, now: float) -> Verdict:
        return Verdict(name, reason, now, now)


def sides(mean: float, deviation: float) -> tuple[float, float, float]:
    """Of a normal number: the mean of its positive part, of its negative part, and how likely it is below zero."""
    z = mean / deviation
    density, below = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erfc(z / math.sqrt(2)) / 2
    won = mean * (1 - below) + deviation * density
    return won, won - mean, below


def frozen(value: Any) -> Any:
    """Lists as the tuples that they were before a journey through JSON."""
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def likeness(one: Sequence[str], other: Sequence[str]) -> float:
    """Part of the words that both have in common."""
    both = set(one) | set(other)
    return len(set(one) & set(other)) / len(both) if both else 1.0


def _knowledge() -> Policy:
    from fms_parallel.dynamic.knowledge import KnowledgePolicy

    return KnowledgePolicy()


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "knowledge": _knowledge,
    "thompson": ThompsonPolicy,
    "rules": RulePolicy,
}
"""By the name that a command line has for them."""


def get_policy(policy: str | Policy) -> Policy:
    """A policy by name, or the given one.

    Raises:
        ConfigError: an unknown name.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ConfigError(unknown("policy", policy, POLICIES))
    return POLICIES[policy]()
