"""The search of transformer-perf-estimates: its candidates, in its order, and the best of them.

It knows which configurations the seed tries; seconds come from `totals`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner.tpe.layers import BLOCKS, Grid, timed
from fms_parallel.planner.tpe.system import Model, System
from fms_parallel.planner.tpe.totals import Configurations, Totals, totals

Array = NDArray[Any]

SMALLEST = 128
"""Rows and columns of a shard below which the seed does not look."""
LARGEST = 1 << 16
"""Devices up to which a larger cluster is tried."""
PANEL = 512
"""Columns of a SUMMA panel below which the seed does not look."""


@dataclass(frozen=True)
class Found:
    """A search: counts, seconds it took, and the best configurations with their totals, best first."""

    considered: int
    feasible: int
    seconds: float
    configurations: Configurations
    totals: Totals
    strategy: str
    batch: int

    def rows(self) -> list[dict[str, Any]]:
        """Plain dictionaries: `dp tp pp mbs` (and `tp1 tp2 nb`), `t`, `mem`, `throughput`, the parts."""
        return [self._row(i) for i in range(len(self.configurations))]

    def _row(self, i: int) -> dict[str, Any]:
        c = {f.name: int(getattr(self.configurations, f.name)[i]) for f in fields(Configurations)}
        row: dict[str, Any] = {"dp": c["dp"], "tp": c["tp1"] * c["tp2"], "pp": c["pp"], "mbs": c["mbs"]}
        row["micros"] = self.batch // c["dp"] // c["mbs"]
        if self.strategy != "1d":
            row |= {"tp1": c["tp1"], "tp2": c["tp2"]}
        if self.strategy == "2d-summa":
            row["nb"] = c["nb"]
        placed = {"nv_tp": c["nv1"]} if self.strategy == "1d" else {"nv_tp1": c["nv1"], "nv_tp2": c["nv2"]}
        row |= {f.name: float(getattr(self.totals, f.name)[i]) for f in fields(Totals)}
        row |= {f"{part}_frac": row[f"t_{part}"] / row["t"] for part in ("comp", "mem", "bubble")}
        row |= {f"{part}_comm_frac": row[f"t_{part}_comm"] / row["t"] for part in ("tp", "dp", "pp")}
        return {**row, **placed, "nv_dp": c["nv_dp"], "nv_pp": c["nv_pp"]}


def search(
    model: Model, system: System, strategy: str, gpus: int, batch: int, top: int = 10, compat: bool = True
) -> Found:
    """The `top` fastest configurations that fit, best first; ties in the order of enumeration.

    Raises:
        ConfigError: an unknown strategy, or no candidate at all.
    """
    if strategy not in BLOCKS:
        raise ConfigError(unknown("tensor parallelism", strategy, BLOCKS))
    began = time.perf_counter()
    every = candidates(model, system, strategy, gpus, batch)
    if not len(every):
        raise _nothing_divides(model, system, strategy, gpus, batch)
    found = totals(model, system, strategy, batch, every, compat)
    fits = np.flatnonzero(found.mem <= system.hbm_capacity)
    best = fits[np.argsort(-found.throughput[fits], kind="stable")[:top]]
    chosen = Totals(**{f.name: getattr(found, f.name)[best] for f in fields(Totals)})
    return Found(len(every), len(fits), time.perf_counter() - began, every.take(best), chosen, strategy, batch)


def _nothing_divides(model: Model, system: System, strategy: str, gpus: int, batch: int) -> ConfigError:
    """The error for a number of devices that no configuration can have: a smaller one, batch or domain that can."""
    job = f"{model.name} on {gpus} devices with a batch of {batch}"
    domain = next((d for d in range(system.nvlink_size, 0, -1) if _any(model, d, strategy, gpus, batch)), None)
    if domain is not None:
        return ConfigError(
            f"{job}: no degrees fill NVLink domains of {system.nvlink_size}; domains of {domain} would be filled."
        )
    fewer = next(n for n in range(gpus, 0, -1) if _any(model, 1, strategy, n, batch))
    return ConfigError(
        f"{job}: no dp x tp x pp is {gpus} where tp divides {model.h} heads and width {model.e}, pp {model.depth} "
        f"blocks, and dp the batch: {fewer} devices would work, or a batch that is a multiple of {gpus}."
    )


def _any(model: Model, domain: int, strategy: str, gpus: int, batch: int) -> bool:
    """Whether there is a configuration, with so many devices in a domain."""
    for tp1, tp2 in _grids(model, strategy, gpus):
        rest = gpus // (tp1 * tp2)
        for pp in (d for d in _divisors(min(rest, model.depth)) if rest % d == 0 and model.depth % d == 0):
            if batch % (rest // pp) == 0 and len(_placements(domain, (tp1, tp2, rest // pp, pp), strategy == "1d")):
                return True
    return False


def candidates(model: Model, system: System, strategy: str, gpus: int, batch: int) -> Configurations:
    """Every configuration that the seed tries."""
    columns: list[Array] = []
    for tp1, tp2 in _grids(model, strategy, gpus):
        rest = gpus // (tp1 * tp2)
        panels = _panels(model, max(tp1, tp2)) if strategy == "2d-summa" else [1]
        unit = {"1d": tp1, "2d-summa": tp2, "2d-seqp": tp1 * tp2}[strategy]
        for pp in (d for d in _divisors(min(rest, model.depth)) if rest % d == 0 and model.depth % d == 0):
            dp = rest // pp
            if batch % dp:
                continue
            micros = [m for m in _divisors(batch // dp) if m * model.l % unit == 0]
            places = _placements(system.nvlink_size, (tp1, tp2, dp, pp), strategy == "1d")
            columns.append(_product(dp, tp1, tp2, pp, micros, panels, places))
    if not columns:
        return Configurations(*(np.zeros(0, dtype=np.int64) for _ in fields(Configurations)))
    return Configurations(*np.concatenate(columns, axis=1))


def _grids(model: Model, strategy: str, gpus: int) -> Iterator[tuple[int, int]]:
    for tp1 in _divisors(gpus):
        if model.h % tp1 or model.e % tp1:
            continue
        if strategy == "1d":
            if 3 * model.e // tp1 >= SMALLEST:
                yield tp1, 1
            continue
        for tp2 in _divisors(gpus // tp1):
            if strategy == "2d-summa" and model.e % tp2:
                continue
            if model.e // tp1 >= SMALLEST and model.l // tp2 >= SMALLEST:
                yield tp1, tp2


def _panels(model: Model, start: int) -> list[int]:
    if model.e // start < PANEL:
        return [start]
    doubled = [start * 2**k for k in range(int(np.log2(model.e // start)) + 1) if k < np.log2(model.e // start)]
    return [nb for nb in doubled if model.e % nb == 0 and model.e // nb >= PANEL]


def _product(dp: int, tp1: int, tp2: int, pp: int, micros: list[int], panels: list[int], places: Array) -> Array:
    """All rows of one set of degrees, as columns in the order of `Configurations`."""
    mbs, nb = np.repeat(micros, len(panels)), np.tile(panels, len(micros))
    rows = len(mbs) * len(places)
    out = np.empty((10, rows), dtype=np.int64)
    out[:4] = np.array([dp, tp1, tp2, pp])[:, None]
    out[4], out[5] = np.repeat(mbs, len(places)), np.repeat(nb, len(places))
    out[6:] = np.tile(places.T, len(mbs))
    return out


@lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


@lru_cache(maxsize=65536)
def _placements(domain: int, degrees: tuple[int, int, int, int], flat: bool) -> Array:
    """Members of (tp1, tp2, dp, pp) in one NVLink domain: everything if it fits, else every way to fill the domain."""
    if int(np.prod(degrees)) <= domain:
        return np.array([degrees])
    free = (degrees[0], 1, *degrees[2:]) if flat else degrees
    rows = [
        (a, b, c, domain // (a * b * c))
        for a in _divisors(domain)
        for b in _divisors(domain // a)
        for c in _divisors(domain // (a * b))
        if not (free[0] % a or free[1] % b or free[2] % c or free[3] % (domain // (a * b * c)))
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def nothing_fits(model: Model, system: System, strategy: str, gpus: int, batch: int) -> ConfigError:
    """The error for a model that fits in no configuration: the smallest cluster that would hold it."""
    larger = gpus
    while larger < LARGEST:
        larger *= 2
        every = candidates(model, system, strategy, larger, batch)
        if len(every) and (totals(model, system, strategy, batch, every, True).mem <= system.hbm_capacity).any():
            return ConfigError(
                f"{model.name} fits on {gpus} {system.name} in no configuration: it would on --num-gpus {larger} "
                f"(the smallest that works when doubling)."
            )
    return ConfigError(
        f"{model.name} fits on {gpus} {system.name} in no configuration, nor on up to {LARGEST} of them with a batch "
        f"of {batch}: take a system with more than {system.hbm_capacity} GB."
    )


def layer_rows(model: Model, system: System, strategy: str, found: Found, compat: bool) -> list[dict[str, Any]]:
    """Every layer of the best configuration: seconds by direction and kind, TFLOP, GB."""
    c = found.configurations.take(slice(0, 1))
    rows = []
    for layer in BLOCKS[strategy](model, system, Grid(c.tp1, c.tp2, c.nv1, c.nv2, c.mbs, c.nb), compat):
        row: dict[str, Any] = {"name": layer.name}
        for word, backward in (("fwd", False), ("bwd", True)):
            one = timed(layer, system, backward, compat)
            seconds = {"": one.total, "_comp": one.compute, "_mem": one.memory, "_comm": one.exchange}
            row |= {f"t_{word}{kind}": _number(value) for kind, value in seconds.items()}
            row[f"flops_{word}"] = _number(layer.flops[backward]) * 1e-12
        row |= {"weights_mem": _number(layer.weights), "activation_buffer": _number(layer.buffer)}
        rows.append(row)
    return rows


def _number(value: Any) -> float:
    return float(np.asarray(value, dtype=float).reshape(-1)[0])


def layout_of(row: Mapping[str, Any]) -> str:
    """The nearest layout of this library: tp2 of the sequence form is cp, ZeRO-1 over dp is fsdp."""
    tp, cp = (row["tp1"], row["tp2"]) if "tp1" in row and "nb" not in row else (row["tp"], 1)
    micros = {"microbatches": row["micros"]} if row["pp"] > 1 else {}
    return str(ParallelLayout(pp=row["pp"], fsdp=row["dp"], cp=cp, tp=tp, sp=tp > 1, precision="bf16", **micros))


def parts(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step by the seed's own names."""
    names = ("t_comp", "t_mem", "t_tp_comm", "t_dp_comm", "t_pp_comm", "t_bubble")
    return {name: row[name] for name in names}
