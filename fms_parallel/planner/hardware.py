"""Devices, links and clusters as plain values, read from `data/devices.json` or from a person's own file.

It knows what a datasheet and a price list know; it knows nothing of models, layouts or time.

    "h100:64"         64 devices of one kind, nodes as the data file says
    "h100:64/4"       the same in nodes of four
    "a100:32,a40:16"  two kinds: every stage waits for the slowest, so the slowest device and link count
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError, unknown

GIB = float(1 << 30)


@dataclass(frozen=True)
class Link:
    """One kind of wire.

    Attributes:
        gb_s: 1e9 bytes per second, per device and direction. latency_us: one hop of a ring. tree_us: one level of a
            tree, there and back. efficiency: part of `gb_s` that a collective reaches when 1, 2, ... of its members
            sit behind the same switch and drive one wire each; the last number stands for more.
    """

    gb_s: float
    latency_us: float
    tree_us: float = 0.0
    efficiency: tuple[float, ...] = (0.8,)

    def slowest(self, other: Link) -> Link:
        """The worse of both in every respect."""
        wire = min(self, other, key=lambda link: link.gb_s * link.efficiency[-1])
        return replace(
            wire,
            latency_us=max(self.latency_us, other.latency_us),
            tree_us=max(self.tree_us, other.tree_us),
        )


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory_gb: 2^30 bytes. tflops: dense matrix peak by precision. vector_tflops: elementwise peak in 16 bit.
        memory_gb_s: 1e9 bytes per second. sustained: part of `tflops` that power and cooling allow for hours.
        host_gb_s: to and from host memory. per_node: devices in one node. price_per_hour: US dollars.
        intra, inter: links inside and between nodes.
        constants: fitted constants that replace those of `efficiency.Constants`, by name.
    """

    name: str
    memory_gb: float
    tflops: Mapping[str, float]
    vector_tflops: float
    memory_gb_s: float
    intra: Link
    inter: Link
    host_gb_s: float = 25.0
    per_node: int = 8
    price_per_hour: float = 0.0
    sustained: float = 1.0
    constants: Mapping[str, float] = field(default_factory=dict)

    def peak(self, precision: str) -> float:
        """Floating-point operations per second of a matrix product.

        Raises:
            ConfigError: the device has no such precision.
        """
        if precision not in self.tflops:
            raise ConfigError(f"{self.name}: {unknown('precision', precision, self.tflops)}")
        return self.tflops[precision] * 1e12 * self.sustained

    def slowest(self, other: Device) -> Device:
        """The device that a ring or a stage of both has to wait for."""
        slow = min(self, other, key=lambda device: max(device.tflops.values()))
        return replace(
            slow,
            name=f"{self.name}+{other.name}",
            memory_gb=min(self.memory_gb, other.memory_gb),
            memory_gb_s=min(self.memory_gb_s, other.memory_gb_s),
            per_node=min(self.per_node, other.per_node),
            intra=self.intra.slowest(other.intra),
            inter=self.inter.slowest(other.inter),
        )


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes. `groups` holds (device, count); one group is the usual case."""

    groups: tuple[tuple[Device, int], ...]

    @property
    def gpus(self) -> int:
        """Devices in all."""
        return sum(count for _, count in self.groups)

    @property
    def device(self) -> Device:
        """The only device, or the slowest mixture of several kinds."""
        device = self.groups[0][0]
        for other, _ in self.groups[1:]:
            device = device.slowest(other)
        return device

    @property
    def price_per_hour(self) -> float:
        """US dollars for all devices."""
        return sum(device.price_per_hour * count for device, count in self.groups)

    def __str__(self) -> str:
        return ",".join(f"{device.name}:{count}" for device, count in self.groups)

    @classmethod
    def parse(cls, text: str, devices: Mapping[str, Device] | None = None) -> Cluster:
        """Read `"h100:64"`, `"h100:64/4"` (nodes of four) or several, comma-separated; see the top of this file.

        Raises:
            ConfigError: a device that no file describes, or a count that is not a whole number >= 1.
        """
        known = load_devices() if devices is None else devices
        return cls(tuple(_read_group(part.strip(), known) for part in text.split(",")))


def _read_group(text: str, known: Mapping[str, Device]) -> tuple[Device, int]:
    name, _, numbers = text.partition(":")
    count, slash, node = numbers.partition("/")
    if not text:
        raise ConfigError("--gpus: nothing stands before or behind a comma: write device:count, as in h100:64,a100:32.")
    if name.lower() not in known:
        raise ConfigError(unknown("GPU", name, known) + " Give a file with --devices to add one.")
    for number in (count, node) if slash else (count,):
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--gpus {text!r}: needs a whole number >= 1 of devices, as in {name}:64 or {name}:64/8.")
    device = known[name.lower()]
    if slash and int(count) > int(node) and int(count) % int(node):
        fewer = int(count) - int(count) % int(node)
        raise ConfigError(
            f"--gpus {text!r}: {count} devices are no whole number of nodes of {node}: use {fewer} or "
            f"{fewer + int(node)}, or other nodes."
        )
    return (replace(device, per_node=int(node)) if slash else device), int(count)


# ---- reading ------------------------------------------------------------------------------------------------------


def read_data(name: str) -> dict[str, Any]:
    """A JSON file that the package brings along; keys that open with `_` are for people."""
    text = (resources.files("fms_parallel.planner") / "data" / name).read_text(encoding="utf-8")
    return {key: value for key, value in json.loads(text).items() if not key.startswith("_")}


def read_json(path: str | Path) -> dict[str, Any]:
    """A person's JSON object.

    Raises:
        ConfigError: missing, unreadable or not an object; the message names file, line and reason.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read: not a text file.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:1: holds a JSON {type(value).__name__}, needs an object.")
    return value


def load_devices(path: str | Path | None = None) -> dict[str, Device]:
    """Devices by lower-case name: those of the package, and those of a file of the same form over them.

    Raises:
        ConfigError: a file that is malformed, or a field that no device has.
    """
    tables = read_data("devices.json")
    own = read_json(path) if path is not None else {}
    devices = {name: _read_device(name, table, "devices.json") for name, table in tables.items()}
    for name, table in own.items():
        if not name.startswith("_"):
            devices[name.lower()] = _read_device(name, table, str(path))
    return devices


def _read_device(name: str, table: Any, source: str) -> Device:
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: {name}: needs an object of the fields of a device.")
    known = [f.name for f in fields(Device)]
    for key in table:
        if key not in known:
            raise ConfigError(f"{source}: {name}: {unknown('field', key, known)}")
    values = dict(table)
    where = f"{source}: {name}"
    needed = ("memory_gb", "tflops", "vector_tflops", "memory_gb_s", "intra", "inter")
    for field_name in needed:
        if field_name not in table:
            raise ConfigError(f"{where}: no {field_name}; a device needs {', '.join(needed)}.")
    for key in ("intra", "inter"):
        values[key] = _read_link(table[key], f"{where}: {key}")
    _check_numbers(table, where, "memory_gb", "vector_tflops", "memory_gb_s", "host_gb_s", "per_node", "sustained")
    _check_numbers(table, where, "price_per_hour", zero=True)
    for key in ("tflops", "constants"):
        if not isinstance(table.get(key, {}), dict) or (key == "tflops" and not table[key]):
            raise ConfigError(f"{where}: {key}: needs an object with a number for each name.")
        _check_numbers(table.get(key, {}), f"{where}: {key}", *table.get(key, {}), zero=key == "constants")
    return Device(name=name, **{key: value for key, value in values.items() if key != "name"})


def _read_link(table: Any, where: str) -> Link:
    known = [f.name for f in fields(Link)]
    if not isinstance(table, dict) or not {"gb_s", "latency_us"} <= table.keys():
        raise ConfigError(f"{where}: needs an object with gb_s and latency_us.")
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: {unknown('field', key, known)}")
    _check_numbers(table, where, "gb_s")
    _check_numbers(table, where, "latency_us", "tree_us", zero=True)
    parts = table.get("efficiency", (0.8,))
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ConfigError(f"{where}: efficiency: needs a list of numbers, as in [0.8].")
    numbered = {f"efficiency {i}": part for i, part in enumerate(parts, 1)}
    _check_numbers(numbered, where, *numbered)
    return Link(**{**table, "efficiency": tuple(parts)})


def _check_numbers(table: Mapping[str, Any], where: str, *names: str, zero: bool = False) -> None:
    """Raises ConfigError for a field that is there and no number > 0, or >= 0 where `zero` may be."""
    for name in names:
        value = table.get(name, 1)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value >= 0 if zero else value > 0) or value == float("inf"):
            raise ConfigError(f"{where}: {name}={value!r}: needs a number {'>=' if zero else '>'} 0.")
