"""Systems, models and collective times of transformer-perf-estimates. It knows two kinds of wire and no layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner.hardware import read_data, read_json

Array = NDArray[Any]

CORRECTIONS: Mapping[str, str] = {
    "slow pipeline links": "links between NVLink domains cost what the slow wire costs; the original computes zero",
    "layer norm of 2D SUMMA": "shards the width e over tp1; the original shards the sequence length in its place",
    "all-reduce": "two rings everywhere; the original doubles only when fast and slow wires mix",
    "exposed memory time of SUMMA": "what exceeds the arithmetic; the original subtracts the communication",
    "bubble": "without the sends, which the pipeline fills anyway; the original counts them again",
    "biases": "shard like the tensor that they are added to; the original runs two of them unsharded",
}
"""What `compat=False` does differently, and why."""


@dataclass(frozen=True)
class System:
    """One system. Rates in TFLOP/s, GB/s; capacity in GB; latencies in seconds; per device and direction."""

    name: str
    matrix_flops_fp16: float
    vector_flops_fp16: float
    hbm_bandwidth: float
    hbm_capacity: float
    nvlink_bandwidth: float
    nvlink_eff: float
    nvlink_latency: float
    ib_bandwidth: float
    ib_eff: float
    ib_latency: float
    nvlink_size: int
    nic_factor: float = 1.0

    @property
    def fast(self) -> float:
        """GB/s inside an NVLink domain."""
        return self.nvlink_bandwidth * self.nvlink_eff

    @property
    def slow(self) -> float:
        """GB/s between domains."""
        return self.ib_bandwidth * self.ib_eff


@dataclass(frozen=True)
class Model:
    """Sizes: l sequence, e width, h heads, f feed-forward width, depth blocks."""

    name: str
    l: int  # noqa: E741 - the paper's letter
    e: int
    h: int
    depth: int
    f: int


def find_system(name: str, nvlink_size: int | None = None) -> System:
    """A system of the seed by name, or a JSON file with the same fields; another NVLink domain size if given.

    Raises:
        ConfigError: unknown (the known ones are listed), or a file with unknown or missing fields.
    """
    table = read_json(name) if name.endswith(".json") else read_data("tpe.json")["systems"].get(name)
    if table is None:
        raise ConfigError(unknown("system", name, read_data("tpe.json")["systems"]))
    known = [f.name for f in fields(System)]
    own = {key: value for key, value in table.items() if key in known and key != "name"}
    _check_positive(name, own, whole=("nvlink_size",))
    try:
        system = System(name=name, **own)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}; a system needs {', '.join(known[1:-1])}.") from None
    return system if nvlink_size is None else replace(system, nvlink_size=nvlink_size)


def find_model(name: str) -> Model:
    """A model of the seed by name (gpt3, gpt3_1T, vit_era5), or a JSON file with l, e, h, depth and optionally f.

    Raises:
        ConfigError: unknown, or a file that misses a size.
    """
    table = read_json(name) if name.endswith(".json") else read_data("tpe.json")["models"].get(name)
    if table is None:
        raise ConfigError(unknown("model", name, read_data("tpe.json")["models"]))
    sizes = ("l", "e", "h", "depth", "f")
    _check_positive(name, {key: value for key, value in table.items() if key in sizes}, whole=sizes)
    try:
        return Model(name, table["l"], table["e"], table["h"], table["depth"], table.get("f", 4 * table["e"]))
    except KeyError as error:
        raise ConfigError(f"{name}: no {error}; a model needs l, e, h and depth.") from None


def _check_positive(name: str, values: Mapping[str, Any], whole: Sequence[str]) -> None:
    """Raises ConfigError for a value that is no number above 0, or no whole one where it has to be."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int if key in whole else (int, float)) or not value > 0:
            raise ConfigError(f"{name}: {key}={value!r}: needs a {'whole ' * (key in whole)}number > 0.")


def collective(system: System, kind: str, volume: Any, n: Any, top: Any, compat: bool) -> Array:
    """Seconds of a collective of `volume` GB (gathered) over `n` members, `top` of them in one NVLink domain.

    Raises:
        ConfigError: more members in a domain than it has.
    """
    volume, n, top = np.broadcast_arrays(np.asarray(volume, dtype=float), np.asarray(n), np.asarray(top))
    if (top > system.nvlink_size).any():
        raise ConfigError(f"{int(top.max())} members in an NVLink domain of {system.nvlink_size}.")
    fast, slow = system.nvlink_latency, system.ib_latency
    if kind == "p2p":
        time = np.where(top == 1, slow + volume / system.slow, fast + volume / system.fast)
        return np.where(volume == 0, 0.0, time)
    part = np.ones_like(volume) if kind in ("broadcast", "reduce") else (n - 1) / n
    nodes = n // top
    twice = 2.0 if kind == "allreduce" else 1.0
    outside = slow * (n - 1) + part * volume / system.slow * (1.0 if compat else twice)
    inside = fast * (n - 1) + part * volume / system.fast * (1.0 if compat else twice)
    rate = np.minimum(system.nic_factor * top * system.slow, system.fast)
    mixed = twice * part * volume / rate + slow * (nodes - 1) + fast * (n - nodes)
    time = np.where(top == 1, outside, np.where(nodes == 1, inside, mixed))
    return np.where((volume == 0) | (n == 1), 0.0, time)
