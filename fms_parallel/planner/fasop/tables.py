"""GPUs, models, datasets and profiles of FASOP, read from the package or from a person's folder of NPZ files.

It knows names and numbers; it prices nothing. A profile `{model}_{gpu}_{tp}.npz` holds `data`, (rows, 10) milliseconds
of the forward pass of each module; row i is micro-batch 2^i.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.planner import catalog
from fms_parallel.planner.hardware import read_data

Array = NDArray[Any]

COLUMNS = ("embed", "attn_q", "attn_k", "attn_v", "attn_o", "mlp_gate", "mlp_act_fn", "mlp_up", "mlp_down", "lm_head")
SEQUENCE = 1024
"""Tokens of a sequence of models that the seed does not know, or as many as the model has positions for."""
NAME = re.compile(r"(?P<model>.+)_(?P<gpu>[^_]+)_(?P<tp>\d+)\.npz")


@dataclass(frozen=True)
class Gpu:
    """One kind of node. `send`, `allreduce`: measured GB/s between ranks of a pair, of half a node, of a node."""

    name: str
    inter: float
    intra: float
    memory: float
    price_per_node: float
    send: tuple[float, ...] | None = None
    allreduce: tuple[float, ...] | None = None

    def within(self, a: int, b: int, table: Sequence[float] | None, share: float) -> float:
        """Bits per second between local ranks a and b of one node."""
        if table is None:
            return self.intra / share
        return table[0 if a // 2 == b // 2 else 1 if a // 4 == b // 4 else 2] * 8e9


@dataclass(frozen=True)
class Model:
    """Sizes as FASOP uses them: the feed-forward counts as 4 h."""

    name: str
    width: int
    sequence: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int

    @property
    def columns(self) -> Array:
        """Profile column of every node: embedding, eight per layer, head."""
        return np.array([0, *list(range(1, 9)) * self.layers, 9])


def find_gpu(name: str, pareto: bool = False) -> Gpu:
    """A GPU by name; `pareto` takes the figures that the seed's Pareto runs use.

    Raises:
        ConfigError: unknown, with the known ones.
    """
    tables = read_data("fasop.json")["gpus"]
    if name not in tables:
        raise ConfigError(unknown("GPU", name, tables))
    values = dict(tables[name])
    other = values.pop("pareto", {})
    values |= other if pareto else {}
    pairs = {key: tuple(values[key]) if key in values else None for key in ("send", "allreduce")}
    return Gpu(name, values["inter"], values["intra"], values["memory"], values["price_per_node"], **pairs)


def find_model(name: str) -> Model:
    """A model of the seed by name, or any other that a profile may be measured of.

    Raises:
        ConfigError: unknown, with the known ones.
    """
    tables = read_data("fasop.json")["models"]
    if name in tables:
        return Model(name, **tables[name])
    try:
        found = catalog.find_model(name)
    except ConfigError:
        words = unknown("model type", name, tables)
        raise ConfigError(f"{words} Any arch:variant or JSON file that make-profile has measured works, too.") from None
    shape = found.shape
    sizes = (shape.width, min(shape.max_positions, SEQUENCE), shape.layers, shape.vocab, shape.heads, shape.kv_heads)
    return Model(profile_name(found.name), *sizes)


def profile_name(model: str) -> str:
    """A model's name in the names of its profiles."""
    return Path(model).stem.replace(":", "-") if model.endswith(".json") else model.replace(":", "-")


def samples_of(dataset: str) -> int:
    """Samples of a dataset.

    Raises:
        ConfigError: unknown, with the known ones.
    """
    tables: Mapping[str, int] = read_data("fasop.json")["datasets"]
    if dataset not in tables:
        raise ConfigError(unknown("dataset", dataset, tables))
    return tables[dataset]


def load_profiles(folder: str | Path | None = None) -> dict[tuple[str, str, int], Array]:
    """(model, gpu, tp) -> (rows, 10) milliseconds, of the package or of a folder.

    Raises:
        ConfigError: no such folder, or a file that is not a profile (named, with the reason).
    """
    place = resources.files("fms_parallel.planner") / "data" / "profiles" if folder is None else Path(folder)
    if not place.is_dir():
        raise ConfigError(f"{place}: no such folder of profiles.")
    found = {}
    for path in sorted(place.iterdir(), key=lambda p: p.name):
        match = NAME.fullmatch(path.name)
        if match:
            with path.open("rb") as file:
                found[match["model"], match["gpu"], int(match["tp"])] = _read(file, str(path))
    return found


def _read(file: Any, name: str) -> Array:
    try:
        with np.load(file, allow_pickle=False) as content:
            data = np.asarray(content["data"], dtype=float)
    except KeyError:
        raise ConfigError(f"{name}: not a profile: it has no array `data`.") from None
    except (ValueError, OSError, zipfile.BadZipFile):
        raise ConfigError(f"{name}: not a profile, not even an NPZ file; `fms-plan make-profile` writes one.") from None
    if data.ndim != 2 or data.shape[1] != len(COLUMNS) or not len(data):
        raise ConfigError(f"{name}: data is {data.shape}, needs (rows, {len(COLUMNS)}): {', '.join(COLUMNS)}.")
    if not (np.isfinite(data).all() and (data >= 0).all()):
        raise ConfigError(f"{name}: data holds a time that is negative or not a number.")
    return data


def known_profiles(profiles: Mapping[tuple[str, str, int], Array]) -> str:
    """`llama70b on A40 (tp 1, 2, 4, 8)`, for messages."""
    groups: dict[tuple[str, str], list[int]] = {}
    for model, gpu, tp in profiles:
        groups.setdefault((model, gpu), []).append(tp)
    return "; ".join(f"{m} on {g} (tp {', '.join(map(str, sorted(tps)))})" for (m, g), tps in groups.items()) or "none"
