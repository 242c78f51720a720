"""Training over ranks against training in one process: losses, resuming in another layout, stopping together."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import RankFailed
from fms_parallel.layout import ParallelLayout
from fms_parallel.training import evaluate, train
from fms_parallel.training.metrics import METRICS, read_metrics
from tests.poison import poisoned_memory
from tests.training.runs import OPTIONS, rows, tiny

EXACT = {**OPTIONS, "max_grad_norm": 0.5}
DROPPING: dict[str, Any] = {"dropout": 0.2, "attention_bias": True, "tied": True}


def run(layout: str | None, options: dict[str, Any]) -> list[float]:
    """Losses of a run in fp64."""
    told: list[float] = []
    with poisoned_memory():
        words = f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64")
        model = tiny(words, **DROPPING)  # type: ignore[arg-type]
        train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **(EXACT | options))
    return told


@pytest.mark.parametrize(("layout", "ranks"), [("tp=2,sp", 2), ("fsdp=2", 2), ("dp=2", 2), ("fsdp=2,tp=2,sp", 4)])
def test_losses_of_a_run_match_one_process(layout: str, ranks: int) -> None:
    expected = run(None, {})
    for found in run_ranks(run, ranks, layout, {"grad_accum_steps": 2}):
        assert found == pytest.approx(expected, rel=1e-11)


def test_a_run_moves_between_layouts(tmp_path: Path) -> None:
    """tp=2,sp -> fsdp=2 -> one process, two steps each."""
    expected = run(None, {})
    folder = {"output_path": str(tmp_path), "checkpoint_steps": 2}
    found = run_ranks(run_until, 2, "tp=2,sp", folder, 2)[0]
    found += run_ranks(run_until, 2, "fsdp=2", folder | {"resume": "auto"}, 4)[0]
    found += run(None, folder | {"resume": "auto"})
    assert found == pytest.approx(expected, rel=1e-11)
    assert [line["loss"] for line in read_metrics(tmp_path / METRICS)] == found


def run_until(layout: str, options: dict[str, Any], last: int) -> list[float]:
    """A run of 6 steps that is asked to stop at step `last`, by a signal to its second rank only."""
    told: list[float] = []

    def stop(numbers: dict[str, Any]) -> None:
        told.append(numbers["loss"])
        if numbers["step"] == last - 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(tiny(f"{layout},precision=fp64", **DROPPING), rows(), on_step=stop, **(EXACT | options))
    assert outcome.interrupted is not None and outcome.step == last
    return told


def validation_loss(layout: str | None, count: int) -> float:
    model = tiny(f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64"))  # type: ignore[arg-type]
    return evaluate(model, rows(count), batch_size=8)


@pytest.mark.parametrize("layout", ["tp=2,sp", "fsdp=2"])
def test_validation_counts_every_row_once(layout: str) -> None:
    assert run_ranks(validation_loss, 2, layout, 11) == pytest.approx([validation_loss(None, 11)] * 2, rel=1e-12)


def initial_pieces(layout: str, config: dict[str, Any]) -> dict[str, tuple[Any, Tensor]]:
    with poisoned_memory():
        model = tiny(layout, **config)
        return {name: (local_box(p), local_tensor(p).detach().clone()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["tp=2,sp", "fsdp=2", "dp=2", "tp=4", "fsdp=2,tp=2", "dp=2,fsdp=2,tp=2,sp"])
def test_a_seed_gives_bitwise_the_same_weights_in_every_layout(layout: str) -> None:
    config = {"kv_heads": 1, "fused": True, "attention_bias": True}
    whole = dict(tiny(None, **config).named_parameters())
    for pieces in run_ranks(initial_pieces, ParallelLayout.parse(layout).world_size, layout, config):
        assert pieces.keys() == whole.keys()
        for name, (box, piece) in pieces.items():
            assert torch.equal(piece, whole[name].detach()[box.slices]), name


def bf16_losses(layout: str | None) -> list[float]:
    told: list[float] = []
    words = f"{layout},precision=bf16" if layout else ParallelLayout(precision="bf16")
    model = tiny(words)  # type: ignore[arg-type]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **OPTIONS)
    return told


@pytest.mark.parametrize("layout", [None, "tp=2,sp", "fsdp=2", "dp=2"])
def test_bf16_keeps_fp32_weights_and_stays_near_fp32(layout: str | None) -> None:
    exact: list[float] = []
    train(tiny(), rows(), on_step=lambda numbers: exact.append(numbers["loss"]), **OPTIONS)
    found = bf16_losses(None) if layout is None else run_ranks(bf16_losses, 2, layout)[0]
    assert found == pytest.approx(exact, rel=1e-2)
    assert found != exact  # or nothing was computed in bf16


def die_in_the_middle() -> None:
    def die(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(tiny("tp=2,sp"), rows(), on_step=die, **OPTIONS)


def test_a_dead_rank_ends_the_job() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 of 2 died"):
        run_ranks(die_in_the_middle, 2, timeout=30.0)
