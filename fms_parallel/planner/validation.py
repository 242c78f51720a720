"""Predicted against measured, table by table: what `fms-plan validate` shows. Rows that constants were fitted to do not
count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.fitting import Fit, fit, spread
from fms_parallel.planner.hardware import Device
from fms_parallel.planner.measured import Case, Collective, Table
from fms_parallel.planner.scoring import Predictor, Score, predict_collectives

LARGE = 16e6
"""Bytes from which a collective is scored: below, latency of a shared network decides."""


@dataclass(frozen=True)
class Part:
    """One scored table.

    Attributes:
        score: of the rows that nothing was fitted to. memory: of the measured peaks, if there are any.
        per_model: rank correlation by model size. feasible: rows that are predicted to fit. fit: what was fitted first.
    """

    name: str
    score: Score
    feasible: int
    memory: Score | None = None
    per_model: Mapping[str, float | None] = field(default_factory=dict)
    fit: Fit | None = None
    rows: Sequence[Mapping[str, Any]] = ()


def validate(
    tables: Sequence[Table], devices: Mapping[str, Device], calibrate_rows: int = 0, network: str = "a100-perlmutter"
) -> list[Part]:
    """Score every table.

    Raises:
        ConfigError: an unknown device, or more rows to fit to than leave any to score.
    """
    if network not in devices:
        raise ConfigError(unknown("device", network, devices))
    parts: list[Part] = []
    for table in tables:
        if table.collectives:
            parts += _collectives(table.name, table.collectives, devices[network])
        if table.cases:
            parts.append(_steps(table, Predictor(devices), calibrate_rows))
    return parts


def _collectives(name: str, rows: Sequence[Collective], device: Device) -> list[Part]:
    parts = []
    for title, chosen in (
        (f"{name}, 16 MB and more", [r for r in rows if r.size >= LARGE]),
        (f"{name}, all sizes", rows),
    ):
        if chosen:
            predicted = predict_collectives(chosen, device)
            measured = np.array([row.seconds for row in chosen])
            shown = [_row(f"{r.operation} {r.size:.0f} B {r.nodes}x{r.inside}", m, p)
                     for r, m, p in zip(chosen, measured, predicted, strict=True)]  # fmt: skip
            parts.append(Part(title, Score.of(predicted, measured), len(chosen), rows=shown))
    return parts


def _row(label: str, measured: float, predicted: float) -> dict[str, Any]:
    return {
        "label": label,
        "measured_s": float(measured),
        "predicted_s": float(predicted),
        "error": float(predicted / measured - 1),
    }


def _steps(table: Table, predictor: Predictor, calibrate_rows: int) -> Part:
    cases, fitted = list(table.cases), None
    if calibrate_rows < 0:
        raise ConfigError(f"--calibrate-rows {calibrate_rows}: needs a whole number >= 0.")
    if calibrate_rows and len(cases) > 1:
        if calibrate_rows >= len(cases):
            raise ConfigError(
                f"{table.name}: --calibrate-rows {calibrate_rows} of {len(cases)} rows leaves none to score: use fewer."
            )
        chosen = set(spread(cases, calibrate_rows))
        fitted = fit(predictor, [cases[i] for i in sorted(chosen)])
        predictor = replace(predictor, constants=fitted.constants)
        cases = [case for i, case in enumerate(cases) if i not in chosen]
    predicted = predictor.predict(cases)
    measured = np.array([case.seconds for case in cases])
    weighed = np.array([i for i, case in enumerate(cases) if case.memory_gb], dtype=int)
    peaks = np.array([cases[i].memory_gb for i in weighed], dtype=float)
    return Part(
        name=table.name,
        score=Score.of(predicted.seconds, measured),
        feasible=int(predicted.fits.sum()),
        memory=Score.of(predicted.memory_gb[weighed], peaks) if len(weighed) else None,
        per_model=_per_model(cases, predicted.seconds, measured),
        fit=fitted,
        rows=[_row(case.label, m, p) for case, m, p in zip(cases, measured, predicted.seconds, strict=True)],
    )


def _per_model(cases: Sequence[Case], predicted: Any, measured: Any) -> dict[str, float | None]:
    groups: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(f"{case.shape.width}x{case.shape.layers}", []).append(index)
    return {name: Score.of(predicted[rows], measured[rows]).spearman for name, rows in groups.items() if len(rows) > 2}


def as_json(parts: Sequence[Part], with_rows: bool) -> dict[str, Any]:
    """What `--json` prints; with a single table its numbers stand at the top as well."""
    tables = []
    for part in parts:
        entry: dict[str, Any] = {"name": part.name, **asdict(part.score), "feasible": part.feasible}
        entry["spearman_per_model"] = dict(part.per_model)
        entry["memory"] = asdict(part.memory) if part.memory else None
        entry["fitted_rows"] = part.fit.rows if part.fit else 0
        entry["constants"] = asdict(part.fit.constants) if part.fit else None
        if with_rows:
            entry["rows"] = list(part.rows)
        tables.append(entry)
    top = {key: value for key, value in tables[0].items() if key != "rows"} if tables else {}
    return {**top, "tables": tables}


def as_row(part: Part) -> tuple[str, ...]:
    """One line of the table for a person."""
    s = part.score
    rank = "-" if s.spearman is None else f"{s.spearman:.3f}"
    notes = f" (fitted to {part.fit.rows} other rows)" if part.fit else ""
    notes += f" (memory {part.memory.mape:.1%} off)" if part.memory else ""
    numbers = (str(s.n), f"{s.mape:.2%}", f"{s.signed_median:+.2%}", f"{s.p90:.1%}", rank)
    return (*numbers, f"{part.feasible}/{s.n}", part.name + notes)
