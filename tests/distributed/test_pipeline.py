"""Pipeline stages against one process: every schedule, with every way of sharding inside the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.data.feed import Batch
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import RankFailed
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.strategy.base import repeated_blocks
from fms_parallel.training import evaluate, train
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import train_step
from fms_parallel.verify import TOLERANCE, Report, verify
from tests.distributed.comparison import Together, check
from tests.distributed.test_layouts import BIASED, ONE_KV, TINY, ranks_of, shaken_llama
from tests.distributed.test_training import DROPPING, EXACT
from tests.poison import poisoned_memory
from tests.training.runs import OPTIONS, rows, tiny

DEEP = TINY | {"layers": 4}
TIED = {"tied": True}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("pp=2", ONE_KV),
    ("pp=2,schedule=gpipe,microbatches=4", TIED),
    ("pp=2,schedule=interleaved1f1b", {"dropout": 0.2}),
    ("pp=2,schedule=looped_bfs,microbatches=4", {"dropout": 0.2, **TIED}),
    ("pp=2,schedule=interleaved_zero_bubble", BIASED),
    ("pp=2,schedule=zbv", TIED),
    ("pp=2,schedule=dualpipev", BIASED),
    ("pp=2,stage_split=3,1,microbatches=3", TIED),
    ("pp=2,recompute=full,schedule=zbv", {"dropout": 0.2}),
    ("pp=4,microbatches=5", TIED),
    ("pp=2,tp=2", TIED),
    ("pp=2,tp=2,sp,schedule=interleaved1f1b", {"dropout": 0.2, **TIED}),
    ("pp=2,tp=2,sp,schedule=zbv", {}),
    ("pp=2,tp=2,sp,tp_parts=attention,schedule=zbv", BIASED),
    ("pp=2,fsdp=2", TIED),
    ("pp=2,fsdp=2,schedule=interleaved1f1b,microbatches=4,recompute=full", {}),
    ("pp=2,fsdp=2,schedule=interleaved_zero_bubble", {}),
    ("pp=2,fsdp=2,schedule=zbv", {}),
    ("pp=2,dp=2,schedule=dualpipev", {}),
    ("pp=2,dp=2", TIED),
    ("pp=2,fsdp=2,tp=2,sp,schedule=interleaved1f1b", {"dropout": 0.2, **TIED}),
]


def compare(layout: str, config: dict[str, Any], dtype: str, pieces: int) -> Report:
    with poisoned_memory():
        parsed = ParallelLayout.parse(layout)
        return verify(
            shaken_llama, parsed, dtype=dtype, seq_len=13, grad_accum_steps=pieces, steps=3, **(DEEP | config)
        )


COMPARED = Together(
    compare,
    [(layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1) for layout, config in CASES],
    lambda layout, *more: ranks_of(layout),
)


@pytest.mark.parametrize(("layout", "config"), CASES, ids=[f"{layout}-{'-'.join(config)}" for layout, config in CASES])
def test_fp64_matches_one_process(layout: str, config: dict[str, Any]) -> None:
    check(COMPARED(layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1))


def test_fp32_matches_one_process() -> None:
    reports = run_ranks(compare, 4, "pp=2,fsdp=2", BIASED, "fp32", 2)
    assert all(report.worst <= TOLERANCE["fp32"] for report in reports), reports[0]


def piped(layout: str, options: dict[str, Any], length: int = 13) -> tuple[list[float], float]:
    """Losses of a run in fp64, and the validation loss after it, over rows whose number divides by nothing."""
    told: list[float] = []
    with poisoned_memory():
        model = tiny(f"{layout},precision=fp64", **DROPPING)
        train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **(EXACT | options))
        return told, evaluate(model, rows(11), batch_size=4)


@pytest.mark.parametrize(("layout", "ranks"), [("pp=2", 2), ("pp=2,tp=2,sp", 4)])
def test_a_run_matches_one_process(layout: str, ranks: int, tmp_path: Path) -> None:
    told: list[float] = []
    model = tiny(ParallelLayout(precision="fp64"), **DROPPING)  # type: ignore[arg-type]
    train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **EXACT)
    expected = evaluate(model, rows(11), batch_size=4)
    for losses, validation in run_ranks(piped, ranks, layout, {"grad_accum_steps": 2}):
        assert losses == pytest.approx(told, rel=1e-11)
        assert validation == pytest.approx(expected, rel=1e-11)


def part_of_a_run(layout: str, folder: str, steps: int) -> list[float]:
    told: list[float] = []
    options = {"output_path": folder, "resume": "auto", "lr_schedule": "constant", "warmup_steps": 0}
    model = tiny(f"{layout},precision=fp64", **DROPPING)
    train(model, rows(), on_step=lambda n: told.append(n["loss"]), **(OPTIONS | options | {"steps": steps}))
    return told


def test_a_run_moves_between_pipeline_and_other_layouts(tmp_path: Path) -> None:
    told: list[float] = []
    model = tiny(ParallelLayout(precision="fp64"), **DROPPING)  # type: ignore[arg-type]
    options = OPTIONS | {"lr_schedule": "constant", "warmup_steps": 0}
    train(model, rows(), on_step=lambda numbers: told.append(numbers["loss"]), **options)
    found = run_ranks(part_of_a_run, 2, "pp=2", str(tmp_path), 2)[0]
    found += run_ranks(part_of_a_run, 2, "tp=2,sp", str(tmp_path), 4)[0]
    found += run_ranks(part_of_a_run, 4, "pp=2,fsdp=2", str(tmp_path), 6)[0]
    assert found == pytest.approx(told, rel=1e-11)


def lengths(layout: str) -> list[float]:
    """Losses of steps whose rows have other lengths each time."""
    import torch

    from fms_parallel.data.feed import Batch
    from fms_parallel.training.optimizer import make_optimizer
    from fms_parallel.training.options import TrainOptions
    from fms_parallel.training.step import train_step

    words = f"{layout},precision=fp64" if layout else ParallelLayout(precision="fp64")
    model = tiny(words, layers=4)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, TrainOptions())
    found = []
    for step, length in enumerate((5, 9, 5, 3)):
        tokens = torch.randint(61, (3, length + 1), generator=torch.Generator().manual_seed(step))
        found.append(train_step(model, optimizer, [Batch(tokens[:, :-1], tokens[:, 1:])]).loss)
    return found


@pytest.mark.parametrize(
    ("layout", "ranks"), [("pp=2", 2), ("pp=2,fsdp=2,schedule=interleaved1f1b", 4), ("pp=2,tp=2,sp,schedule=zbv", 4)]
)
def test_sequence_length_may_change_between_steps(layout: str, ranks: int) -> None:
    for losses in run_ranks(lengths, ranks, layout):
        assert losses == pytest.approx(lengths(""), rel=1e-12)


def forgetful(layout: str) -> None:
    """A run whose last stage has a parameter that no loss depends on."""
    from torch import nn

    model = tiny(layout, layers=4)
    if model.parallel.pipeline.is_last:
        model.norm.register_parameter("forgotten", nn.Parameter(next(model.norm.parameters()).detach().clone()))
    train(model, rows(), **OPTIONS)


def test_a_parameter_without_a_gradient_stops_the_run() -> None:
    with pytest.raises(RankFailed, match=r"TrainingError: 1 trainable parameters got no gradient \(norm.forgotten\)"):
        run_ranks(forgetful, 2, "pp=2,schedule=interleaved1f1b", timeout=60.0)


def failing() -> None:
    model = tiny("pp=2")
    stage = model.parallel.pipeline.stages[0]
    if stage.is_last:
        stage.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    train(model, rows(), **OPTIONS)


def test_a_failing_stage_is_named() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(failing, 2, timeout=60.0)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.endswith("TrainingError: pipeline stage 1, micro-batch 0: ZeroDivisionError: division by zero")


def refused(layout: str, config: dict[str, Any]) -> str:
    from fms_parallel.errors import LayoutError

    try:
        model = tiny(layout, **config)
        model(torch.tensor([[1, 2]]))
    except LayoutError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("layout", "ranks", "config", "words"),
    [
        ("pp=2", 2, {}, "cannot be called by itself"),
        ("pp=2,fsdp=2,schedule=zbv", 4, {"layers": 4, **TIED}, "share embedding and head"),
    ],
)
def test_what_stages_cannot_do_is_said(layout: str, ranks: int, config: dict[str, Any], words: str) -> None:
    assert all(words in said for said in run_ranks(refused, ranks, layout, config))


def block_forwards(layout: str) -> list[int]:
    """How often each of this rank's blocks computes in one step."""
    model = get_model("llama", "micro", distributed_strategy=layout, **DEEP)
    counts: list[int] = []
    for number, (_, block) in enumerate(repeated_blocks(model)):
        counts.append(0)
        block.attention.register_forward_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    train_step(model, make_optimizer(model, TrainOptions()), [Batch(tokens, tokens)])
    return counts


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_recompute_runs_each_block_once_more_per_micro_batch(schedule: str) -> None:
    """Also where the backward pass asks for inputs first and for each group of weights later."""
    for counts in run_ranks(block_forwards, 2, f"pp=2,schedule={schedule},microbatches=4,recompute=full"):
        assert counts == [4 * 2] * len(counts)
