"""Reading clusters and devices: what is written comes out, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.planner.hardware import Cluster, load_devices, read_json


def test_cluster_text_gives_its_numbers() -> None:
    cluster = Cluster.parse("h100:64/4")
    assert (cluster.gpus, cluster.device.per_node, cluster.device.name) == (64, 4, "h100")
    assert cluster.price_per_hour == pytest.approx(64 * load_devices()["h100"].price_per_hour)


def test_mixed_cluster_is_as_slow_as_its_slowest_part() -> None:
    devices = load_devices()
    mixed = Cluster.parse("a100:8,a40:4")
    assert mixed.gpus == 12
    assert mixed.device.memory_gb == devices["a40"].memory_gb
    assert mixed.device.peak("bf16") == devices["a40"].peak("bf16")
    assert mixed.device.inter.gb_s == devices["a40"].inter.gb_s


@pytest.mark.parametrize(
    ("text", "words"),
    [("h10:8", "Did you mean 'h100'"), ("h100", "h100:64"), ("h100:0", "whole number"), ("h100:8/x", "whole number")],
)
def test_wrong_cluster_says_what_would_be_right(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Cluster.parse(text)


def test_precision_that_a_device_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"fp8.*bf16"):
        load_devices()["a100"].peak("fp8")


def test_own_device_file_adds_and_replaces(tmp_path: Path) -> None:
    table = {"memory_gb": 1, "tflops": {"bf16": 1}, "vector_tflops": 1, "memory_gb_s": 1}
    table |= {"intra": {"gb_s": 1, "latency_us": 1}, "inter": {"gb_s": 1, "latency_us": 1}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"Mine": table}))
    assert Cluster.parse("mine:2", load_devices(path)).device.memory_gb == 1
    path.write_text(json.dumps({"mine": {**table, "memry": 3}}))
    with pytest.raises(ConfigError, match=r"own.json: mine: unknown field 'memry'"):
        load_devices(path)
    del table["inter"]
    path.write_text(json.dumps({"mine": table}))
    with pytest.raises(ConfigError, match="inter"):
        load_devices(path)


def test_malformed_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{\n"a": 1,\n oops}')
    with pytest.raises(ConfigError, match=r"bad.json:3: not JSON"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="needs an object"):
        read_json(path)
