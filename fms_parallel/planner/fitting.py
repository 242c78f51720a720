"""Fitting the constants of `efficiency.Constants` to few measured steps, and choosing which rows to fit to.

It knows least squares on logarithms with a prior: a constant that the rows say nothing about stays where it was. It is
given the rows it may see; `validate` scores the others only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.efficiency import Constants
from fms_parallel.planner.measured import Case
from fms_parallel.planner.scoring import Predictor

Array = NDArray[Any]

PRIOR: Mapping[str, float] = {
    "best": 0.15,
    "half": 0.4,
    "wave": 0.5,
    "stream": 0.2,
    "kernel_us": 1.0,
    "host_us": 1.0,
    "host_backward": 0.7,
    "micro_us": 1.5,
    "step_us": 1.5,
    "inner": 0.5,
    "network": 0.3,
}
"""Constant -> how far (in logarithms) it may reasonably be from its start."""

START = {"micro_us": 200.0}
"""A start for what is zero by default: a logarithm needs one."""

NOISE = 0.05
"""Relative error of one measurement; larger ones count less and less (Huber)."""


@dataclass(frozen=True)
class Fit:
    """Fitted constants, and how far the rows were off before and after."""

    constants: Constants
    rows: int
    before: float
    after: float


def spread(cases: Sequence[Case], count: int) -> list[int]:
    """Indices of `count` rows that differ in layout and size as much as the table does, always the same ones."""
    order = sorted(range(len(cases)), key=lambda i: _features(cases[i]))
    if count >= len(order):
        return sorted(order)
    step = len(order) / count
    return sorted(order[int((i + 0.5) * step)] for i in range(count))


def _features(case: Case) -> tuple[Any, ...]:
    settings = case.settings
    return (
        tuple(settings.get(name, 1) for name in ("tp", "pp", "dp")),
        settings.get("micro", 0),
        case.shape.width,
        case.shape.layers,
        case.global_batch,
    )


def fit(predictor: Predictor, cases: Sequence[Case], rounds: int = 12) -> Fit:
    """Constants that predict these cases best without leaving the prior."""
    start = replace(predictor.constants, **{n: v for n, v in START.items() if not getattr(predictor.constants, n)})
    measured = np.log([case.seconds for case in cases])

    def residuals(x: Array) -> Array:
        constants = _at(start, x)
        return np.asarray(np.log(replace(predictor, constants=constants).predict(cases).seconds) - measured)

    best = _gauss_newton(residuals, np.zeros(len(PRIOR)), np.array(list(PRIOR.values())), rounds)
    before = residuals(np.zeros(len(PRIOR)))
    return Fit(_at(start, best), len(cases), float(np.abs(before).mean()), float(np.abs(residuals(best)).mean()))


def _at(start: Constants, x: Array) -> Constants:
    return replace(start, **{name: getattr(start, name) * float(np.exp(v)) for name, v in zip(PRIOR, x, strict=True)})


def _gauss_newton(residuals: Callable[[Array], Array], x: Array, widths: Array, rounds: int) -> Array:
    """Least squares with a Gaussian prior of these widths around zero and Huber weights."""

    def loss(r: Array, x: Array) -> float:
        size = np.abs(r) / NOISE
        return float(np.where(size < 1, size**2, 2 * size - 1).sum() + ((x / widths) ** 2).sum())

    current, damping = residuals(x), 1e-2
    for _ in range(rounds):
        jacobian = np.stack([(residuals(x + e) - current) / 1e-3 for e in np.eye(len(x)) * 1e-3], axis=1)
        weight = np.minimum(1.0, NOISE / np.maximum(np.abs(current), 1e-12))[:, None] / NOISE**2
        left = jacobian.T @ (jacobian * weight) + np.diag(1 / widths**2)
        right = jacobian.T @ (current[:, None] * weight)[:, 0] + x / widths**2
        for _ in range(6):
            step = np.linalg.solve(left + damping * np.diag(np.diag(left)), right)
            tried = residuals(x - step)
            if loss(tried, x - step) < loss(current, x):
                x, current, damping = x - step, tried, damping / 3
                break
            damping *= 4
        else:
            return x
    return x
