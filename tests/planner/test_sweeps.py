"""Sweeps, serving, profiles: points against single searches, and physical bounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.inference.cache import KVCache
from fms_parallel.planner import Cluster, Planner, Workload, load_devices
from fms_parallel.planner.cli import main
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.fasop.tables import COLUMNS, load_profiles, profile_name
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.inference import serving
from fms_parallel.planner.profiles import Curve, Measured
from fms_parallel.planner.tpe.search import search
from fms_parallel.planner.tpe.system import find_model, find_system


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[dict[str, float]]]:
    assert main([*words, "--json"]) == 0
    found: dict[str, list[dict[str, float]]] = json.loads(capsys.readouterr().out)
    return found


def test_sweep_over_systems_is_one_search_per_point(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model", "gpt3_1T", "--systems", "A100", "B200", "--domains", "4", "8", "--num-gpus", "512", "2048"]
    plot = tmp_path / "s.png"
    points = run(capsys, "sweep", *words, "--global-batch", "4096", "--plot", str(plot))["points"]
    assert len(points) == 8 and plot.stat().st_size > 1000
    for row in points:
        system = find_system(str(row["system"]), int(row["nvlink_size"]))
        found = search(find_model("gpt3_1T"), system, "1d", int(row["gpus"]), 4096, 1)
        assert row["t"] == (float(found.totals.t[0]) if found.feasible else None)


def test_more_bandwidth_and_capacity_never_hurt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model", "gpt3_1T", "--systems", "A100", "--num-gpus", "2048", "--global-batch", "4096"]
    words += ["--bandwidths", "500", "1555", "--capacities", "10", "80", "160", "--flops", "312", "624"]
    points = run(capsys, "sweep", *words, "--plot", str(tmp_path / "m.svg"))["points"]
    time = {(p["matrix_flops_fp16"], p["hbm_bandwidth"], p["hbm_capacity"]): p["t"] or np.inf for p in points}
    assert len(time) == 12 and np.isinf(time[312, 500, 10])
    for (rate, bandwidth, capacity), seconds in time.items():
        for other, value in time.items():
            if other[0] >= rate and other[1] >= bandwidth and other[2] >= capacity:
                assert value <= seconds * (1 + 1e-12)


def test_serving_is_bounded_by_reading_the_weights() -> None:
    planner = Planner.of("llama:3.1-8b", "h100:4", Workload(8, 1024))
    found = serving(planner, 8, 1024, 128)
    assert [s.tokens_per_s for s in found] == sorted((s.tokens_per_s for s in found), reverse=True)
    weights = 2 * planner.model.parameters()
    for s in found:
        assert s.token_s > weights / (s.layout.tp * 3.35e12)
        assert s.weights_gb * s.layout.tp * s.layout.pp >= 0.99 * weights / GIB
        assert s.kv_gb + s.weights_gb < 80
        flops = planner.model.shape.flops_per_token(1024, training=False) * 8 * 1024
        assert s.ttft_s > flops / (s.layout.tp * 989e12)


@pytest.mark.parametrize("name", ["llama:micro", "llama:3.2-1b", "llama:3.1-8b"])
def test_serving_holds_every_weight_and_the_caches_bytes(name: str) -> None:
    """One rank holds the model's parameters; several hold what our cache takes for their layers and kv heads."""
    planner = Planner.of(name, "h100:2", Workload(4, 64))
    shape = planner.model.shape
    alone = serving(Planner.of(name, "h100:1", Workload(4, 64)), 4, 64, 16)[0]
    assert alone.weights_gb * GIB == 2 * shape.parameters()
    for s in serving(planner, 4, 64, 16):
        cache = KVCache(80)
        heads = max(shape.kv_heads // s.layout.tp, 1)
        for layer in range(-(-shape.layers // s.layout.pp)):
            part = torch.zeros(4, heads, 1, shape.head_width, dtype=torch.bfloat16)
            cache.append(layer, part, part)
        assert s.kv_gb * GIB == cache.memory_bytes


def test_serving_says_which_batch_fits() -> None:
    with pytest.raises(ConfigError, match="a batch of at most"):
        serving(Planner.of("llama:3.1-8b", "h100:1", Workload(999, 8192)), 999, 8192, 128)
    with pytest.raises(ConfigError, match="weights alone"):
        serving(Planner.of("llama:3.1-405b", "h100:4", Workload(1, 128)), 1, 128, 8)


def test_serve_command_shows_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--model", "llama:3.1-8b", "--gpus", "h100:2", "--global-batch", "4"])
    assert "TTFT" in capsys.readouterr().out


def test_profile_is_measured_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "head_width": 16, "ffn_width": 128, "vocab": 100}
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps({**shape, "max_positions": 64}))
    folder = tmp_path / "profiles"
    main(["make-profile", "--model", str(model), "--tp", "1", "2", "--rows", "2", "--seq", "16", "--out", str(folder)])
    assert sorted(p.name for p in folder.iterdir()) == ["tiny_CPU_1.npz", "tiny_CPU_2.npz"]
    data = load_profiles(folder)["tiny", "CPU", 2]
    assert data.shape == (2, len(COLUMNS)) and (data > 0).all()
    main(["show-profile", "--dir", str(folder)])
    assert "tiny on CPU" in capsys.readouterr().out


def test_a_measured_profile_of_any_model_can_be_searched_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "profiles")
    main(["make-profile", "--model", "llama:micro", "--gpu", "A40", "--rows", "1", "--seq", "8", "--out", folder])
    capsys.readouterr()
    words = ["--model-type", "llama:micro", "--profiles", folder, "--gpus", "A40", "1", "--gbs", "2", "--json"]
    main(["search", "--compat", "fasop", *words])
    found = json.loads(capsys.readouterr().out)
    assert found["feasible"] > 0 and found["borrowed_profiles"] == []
    # Embedding, eight modules of each of five layers, head.
    assert {sum(row["partition"]) for row in found["results"]} == {42}
    assert len({profile_name(f"llama:{name}") for name in ("3-8b", "3.1-8b", "3.1-70b", "3.2-1b")}) == 4


def test_shipped_profile_is_the_originals(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example: A40, tp 1, micro-batch 8: layer 94.27 ms, total 203.76 ms."""
    main(["show-profile"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "8", "0.89", "94.27", "108.60", "203.76"] in lines


def test_measured_curves_interpolate_in_log_size_and_flag_extrapolation() -> None:
    planner = Planner.of("llama:3.1-8b", "a100:1", Workload(4, 2048))
    roofline = planner.costs.time_source
    columns = Columns.of([{"micro": m} for m in (1, 2, 4)])
    up = next(op for op in planner.costs.block_operators(columns) if op.name == "up")
    curve = Curve(up.flops[[0, 2]], np.array([1e-3, 4e-3]), np.array([2e-3, 8e-3]))
    source = Measured({"up": curve}, roofline)
    forward, backward = source.operator(up)
    assert forward.tolist() == pytest.approx([1e-3, 2e-3, 4e-3]) and backward.tolist() == pytest.approx(
        [2e-3, 4e-3, 8e-3]
    )
    assert not source.extrapolated
    bigger = next(op for op in planner.costs.block_operators(Columns.of([{"micro": 8}])) if op.name == "up")
    assert source.operator(bigger)[0].tolist() == pytest.approx([8e-3])
    assert source.extrapolated == {"up"}
    with pytest.raises(ConfigError, match="increasing"):
        Curve(np.array([2.0, 1.0]), np.ones(2), np.ones(2))


def test_measured_source_drives_the_cost_model() -> None:
    planner = Planner.of("llama:3.1-8b", "a100:1", Workload(4, 2048))
    columns = Columns.of([{"micro": 1}, {"micro": 2}])
    sizes = next(op for op in planner.costs.block_operators(columns) if op.name == "up").flops
    slow = Curve(sizes, np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    model = replace(planner.costs, source=Measured({"up": slow}, planner.costs.time_source))
    assert model.evaluate(columns).times.compute[0] > 32 * 3.0


def test_mixed_cluster_is_planned_with_its_slowest_device() -> None:
    devices = load_devices()
    both = Planner.of("llama:3.2-1b", Cluster.parse("a100:4,a40:4", devices), Workload(8, 1024))
    slow = Planner.of("llama:3.2-1b", Cluster.parse("a40:8", devices), Workload(8, 1024))
    columns = Columns.of([{"fsdp": 8}])
    assert both.costs.evaluate(columns).times.compute[0] == pytest.approx(slow.costs.evaluate(columns).times.compute[0])
