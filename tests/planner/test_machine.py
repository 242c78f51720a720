"""The machine at hand: names that CUDA gives against the device files, and the first layout that can be run."""

from __future__ import annotations

import pytest

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.planner import Space, Workload
from fms_parallel.planner.api import Estimate, Planner, search_with
from fms_parallel.planner.hardware import load_devices
from fms_parallel.planner.machine import choose, machine_at_hand, recognise

KNOWN = load_devices()
PLANNER = Planner.of("llama:micro", "a100:8", Workload(16, 256))


@pytest.mark.parametrize(
    ("name", "memory", "device"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100"),
        ("NVIDIA H200", 139.8, "h200"),
    ],
)
def test_names_of_cuda_are_recognised_with_their_own_memory(name: str, memory: float, device: str) -> None:
    found = recognise(name, memory, KNOWN)
    assert (found.name, found.memory_gb) == (device, memory)


@pytest.mark.parametrize(
    ("name", "memory", "words"),
    [
        ("NVIDIA GeForce RTX 4090", 23.6, "unknown GPU 'NVIDIA GeForce RTX 4090'.* --gpus"),
        ("NVIDIA A10G", 22.0, "unknown GPU"),
        ("Tesla V100-SXM2-16GB", 15.8, "has 15.8 GiB; the device files know v100 with 32 GiB"),
    ],
)
def test_an_unknown_gpu_is_never_another_one(name: str, memory: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recognise(name, memory, KNOWN)


def test_processors_share_the_memory_of_their_node() -> None:
    alone = machine_at_hand("cpu", 1, 1, 0, KNOWN)
    four = machine_at_hand("cpu", 8, 4, 3, KNOWN)
    assert (four.gpus, four.device.per_node, str(four)) == (8, 4, "cpu:8")
    assert four.device.memory_gb == pytest.approx(alone.device.memory_gb / 4)


def test_the_fastest_layout_that_can_be_run_is_chosen() -> None:
    def no_data_parallelism(estimate: Estimate) -> None:
        if estimate.layout.data_parallel > 1:
            raise LayoutError("no data parallelism here")

    ranking = search_with(PLANNER, Space(), 512).results
    assert ranking[0].layout.data_parallel > 1
    best, _ = choose(PLANNER, Space(), no_data_parallelism)
    assert best == next(e for e in ranking if e.layout.data_parallel == 1)


def test_when_nothing_can_be_run_a_reason_is_given() -> None:
    def nothing(estimate: Estimate) -> None:
        raise LayoutError(f"not with {estimate.layout.tp} parts")

    with pytest.raises(ConfigError, match=r"can be run; .* not with"):
        choose(PLANNER, Space(), nothing)
