"""Calibration: fits against made-up machines, and one real measurement whose file the search takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fms_parallel.layout import ParallelLayout
from fms_parallel.planner import Cluster, Planner, Workload, load_devices, plan
from fms_parallel.planner.cli import main
from fms_parallel.planner.measure import COLLECTIVES, MATMULS, STREAM, UPDATED, device_of, predicted_block

HOST, KERNELS, UPDATE, COPY = 20e-6, 34, 3.0, 0.5e-9
"""Seconds of the host per kernel, kernels of the measured block, the optimizer's factor, seconds per copied byte."""


def made_up(ranks: int, rate: float, half: float, hop: float, wire: float, block: float) -> list[dict[str, object]]:
    """What ranks would measure on a machine with these numbers."""
    sizes = np.array(MATMULS, dtype=float)
    matmuls = 2 * sizes.prod(axis=1) / (rate * sizes[:, 2] / (sizes[:, 2] + half))
    ring = {size: (ranks - 1) * hop + size * (ranks - 1) / ranks / wire for size in COLLECTIVES}
    one = {
        "matmuls": matmuls.tolist(),
        "stream": 2 * STREAM / 20e9,
        "small": 2e-6,
        "host": HOST * KERNELS,
        "block": block,
        "passes": 1e-9,
        "update": UPDATE * UPDATED * 32 / 20e9,
        "copy": 2 * STREAM * COPY,
        "allgather": ring,
        "reducescatter": ring,
        "allreduce": {size: 2 * seconds for size, seconds in ring.items()},
        "pair": {size: hop + size / wire for size in COLLECTIVES},
    }
    return [dict(one) for _ in range(ranks)]


def test_fit_recovers_a_made_up_machine() -> None:
    device = device_of("made", made_up(4, 1e11, 20.0, 1e-4, 1e9, 1e-9), 8.0)
    assert device.peak("fp32") * device.constants["best"] == pytest.approx(1e11, rel=0.02)
    assert device.constants["half"] == pytest.approx(20, rel=0.1)
    assert device.memory_gb_s == pytest.approx(20)
    assert device.intra.latency_us == pytest.approx(100, rel=0.01)
    assert device.intra.gb_s == pytest.approx(1.0, rel=0.01)
    assert device.constants["host_us"] == pytest.approx(20)
    assert device.constants["copy_ns"] == pytest.approx(0.5)
    assert device.constants["update"] * device.constants["stream"] ** -1 == pytest.approx(UPDATE)


def test_a_slower_block_slows_the_model_down_to_it() -> None:
    quick = device_of("made", made_up(2, 1e11, 20.0, 1e-4, 1e9, 1e-9), 8.0)
    slow = device_of("made", made_up(2, 1e11, 20.0, 1e-4, 1e9, 3 * predicted_block(quick)), 8.0)
    assert predicted_block(slow) == pytest.approx(3 * predicted_block(quick), rel=0.02)


def test_ranks_that_share_cores_lose_no_idle_time() -> None:
    layout, job = ParallelLayout.parse("pp=2,microbatches=2"), Workload(8, 128, "fp32")
    found = []
    for cores in (None, 2, 1):
        device = device_of("made", made_up(2, 1e11, 20.0, 1e-4, 1e9, 1e-9), 64.0, cores)
        found.append(Planner.of("llama:micro", Cluster(((device, 2),)), job).estimate(layout).breakdown["bubble"])
    assert found[0] == found[1] > 0 and found[2] == 0


def test_nothing_hides_where_processors_move_the_bytes() -> None:
    device = device_of("made", made_up(2, 1e11, 20.0, 1e-4, 1e9, 1e-9), 64.0)
    planner = Planner.of("llama:micro", Cluster(((device, 2),)), Workload(8, 128, "fp32"))
    size = planner.model.shape.parameters() * 4
    found = planner.estimate(ParallelLayout.parse("dp=2")).breakdown["dp"]
    ring, copies = 2 * (1e-4 + size / 2 / 1e9), 2 * size * COPY  # over two ranks, all of it waited for
    assert found == pytest.approx(ring + copies, rel=0.05)


def test_measured_file_is_taken_by_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    assert main(["calibrate", "--ranks", "1", "--repeats", "2", "--out", str(path)]) == 0
    assert "written to" in capsys.readouterr().out
    device = load_devices(path)["cpu"]
    assert device.peak("fp32") > 1e9 and device.memory_gb > 0.1
    assert json.loads(path.read_text())["cpu"]["per_node"] == 1
    found = plan("llama:3.2-1b", Cluster(((device, 1),)), Workload(1, 32, "fp32"))
    assert not found or found[0].step_time_s > 0
