"""Offload over ranks: in every family of layouts, bitwise the losses and weights of the same layout without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.training import offload
from fms_parallel.training.loop import Trainer
from fms_parallel.training.options import TrainOptions
from tests.distributed.test_training import DROPPING
from tests.poison import poisoned_memory
from tests.training.runs import OPTIONS, rows, tiny

SMALLEST = offload.ALIGN * 2 * 8
BASE = OPTIONS | {"max_grad_norm": 0.5, "grad_accum_steps": 2, "lr_schedule": "constant"}

Run = tuple[list[float], dict[str, Tensor]]
"""Losses of every step, and what this rank holds of the weights at the end."""


def run(layout: str, mode: str, **options: Any) -> Run:
    told: list[float] = []
    with poisoned_memory():
        model = tiny(f"{layout},offload={mode}", **(DROPPING | {"layers": 4}))
        bucket = {"offload_bucket_bytes": SMALLEST} if mode in offload.MODES else {}
        settings = TrainOptions(**(BASE | bucket | options))
        trainer = Trainer(model, rows(), settings, on_step=lambda numbers: told.append(numbers["loss"]))
        trainer.run()
    if mode in offload.MODES:
        check_state(trainer.optimizer)
    return told, {name: local_tensor(p).clone() for name, p in model.named_parameters()}


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """It is cut as the weights are, and lies in memory of its own."""
    for parameter, state in optimizer.state.items():
        for kind in offload.STATE:
            assert isinstance(state[kind], DTensor) == isinstance(parameter, DTensor), (
                type(state[kind]),
                type(parameter),
            )
            assert not isinstance(parameter, DTensor) or state[kind].placements == parameter.placements
            local, weight = local_tensor(state[kind]), local_tensor(parameter)
            assert local.shape == weight.shape
            assert local.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() or not local.numel()


def differing(found: Run, expected: Run) -> list[str]:
    """What is not bitwise the same."""
    losses = [] if found[0] == expected[0][-len(found[0]) :] else [f"losses {found[0]}, not {expected[0]}"]
    names = found[1].keys() ^ expected[1].keys()
    return [*losses, *names, *(n for n, w in expected[1].items() if not torch.equal(found[1][n], w))]


def compare(layout: str, modes: list[str]) -> list[str]:
    expected = run(layout, "none", steps=3)
    return [f"{mode}: {word}" for mode in modes for word in differing(run(layout, mode, steps=3), expected)]


@pytest.mark.parametrize(
    "layout",
    ["fsdp=2", "dp=2", "tp=2,sp", "pp=2", "cp=2", "fsdp=2,tp=2", "pp=2,fsdp=2,schedule=interleaved1f1b,precision=bf16"],
)
def test_a_run_is_bitwise_that_without_offload(layout: str) -> None:
    parsed = ParallelLayout.parse(layout)
    modes = [*offload.MODES, *(["params"] if parsed.fsdp > 1 else [])]
    assert run_ranks(compare, parsed.world_size, layout, modes) == [[]] * parsed.world_size


def resumed(folder: str) -> list[str]:
    """Each checkpoint is gone on with by the next kind of offload."""
    layout, expected, found = "fsdp=2,tp=2,sp", run("fsdp=2,tp=2,sp", "none"), []
    for mode, steps in (
        ("optimizer_state", 2),
        ("none", 3),
        ("optimizer_step", 4),
        ("params", 5),
        ("optimizer_state", 6),
    ):
        last = run(layout, mode, output_path=folder, resume="auto", steps=steps)
        found += last[0]
    return differing((found, last[1]), expected)


def test_a_checkpoint_goes_on_with_and_without_offload_bitwise(tmp_path: Path) -> None:
    assert run_ranks(resumed, 4, str(tmp_path)) == [[]] * 4


def moved(layout: str, mode: str, folder: str, steps: int) -> list[float]:
    return run(layout, mode, output_path=folder, resume="auto", steps=steps)[0]


def test_a_checkpoint_moves_to_another_layout_with_offload(tmp_path: Path) -> None:
    """Up to rounding, as without: tp=2 -> pp=2 -> one more kind."""
    expected = run_ranks(moved, 2, "tp=2,precision=fp64", "none", str(tmp_path / "whole"), 6)[0]
    found = run_ranks(moved, 2, "tp=2,precision=fp64", "optimizer_step", str(tmp_path / "moved"), 2)[0]
    found += run_ranks(moved, 2, "pp=2,precision=fp64", "optimizer_state", str(tmp_path / "moved"), 4)[0]
    found += run_ranks(moved, 2, "fsdp=2,precision=fp64", "params", str(tmp_path / "moved"), 6)[0]
    assert found == pytest.approx(expected, rel=1e-11)
