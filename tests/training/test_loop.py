"""A run: resumed it equals one that was never interrupted; what it writes; what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.data.feed import Feed
from fms_parallel.errors import ConfigError, TrainingError
from fms_parallel.phases import Phase
from fms_parallel.training import evaluate, train
from fms_parallel.training.loop import CHECKPOINTS, SAMPLES
from fms_parallel.training.metrics import METRICS, read_metrics
from fms_parallel.training.step import model_loss
from tests.training.runs import OPTIONS, rows, tiny


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / METRICS)]


def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, halves = tiny(dropout=0.2), tiny(dropout=0.2)
    train(whole, rows(), output_path=str(tmp_path / "a"), **OPTIONS)
    stopped = {"output_path": str(tmp_path / "b"), "checkpoint_steps": 1, **OPTIONS}

    def stop_at_3(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(halves, rows(), on_step=stop_at_3, **stopped)
    assert outcome.interrupted is not None and outcome.interrupted.exit_code == 128 + signal.SIGTERM
    assert outcome.step < 6
    fresh = tiny(dropout=0.2, seed=99)  # other weights: all must come from the checkpoint
    outcome = train(fresh, rows(), resume="auto", **stopped)
    assert outcome.step == 6 and outcome.interrupted is None
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_every_step_is_one_line_with_all_numbers(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    train(tiny(), rows(), on_step=told.append, output_path=str(tmp_path), **OPTIONS)
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    needed = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "peak_memory_bytes"}
    assert all(needed <= line.keys() for line in lines)
    assert lines[2]["tokens"] == 8 * 13 and lines[2]["total_tokens"] == 3 * 8 * 13
    assert told == lines


def test_accumulation_changes_no_loss() -> None:
    found = []
    for pieces in (1, 2, 8):
        told: list[dict[str, Any]] = []
        options = OPTIONS | {"grad_accum_steps": pieces}
        train(tiny(data_type="fp64", dropout=0.2), rows(), on_step=told.append, **options)
        found.append([numbers["loss"] for numbers in told])
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-12)


def test_epochs_read_every_row(tmp_path: Path) -> None:
    outcome = train(tiny(), rows(40), epochs=2, batch_size=8)
    assert outcome.steps == outcome.step == 10
    feed = Feed(rows(40), global_batch=8, seed=0)
    assert sorted(row for step in range(5) for row in feed.rows(step)) == list(range(40))


def test_a_run_resumed_within_a_phase_is_bitwise_the_whole_one(tmp_path: Path) -> None:
    phases = [Phase(0, seq_len=5), Phase(2, seq_len=13), Phase(4, batch_size=4)]
    told: list[int] = []
    run: dict[str, Any] = {**OPTIONS, "phases": phases, "checkpoint_steps": 3}
    train(tiny(), rows(), on_step=lambda n: told.append(n["tokens"]), output_path=str(tmp_path / "a"), **run)
    assert told == [8 * 5, 8 * 5, 8 * 13, 8 * 13, 4 * 13, 4 * 13]
    train(tiny(), rows(), output_path=str(tmp_path / "b"), **run)
    shutil.rmtree(tmp_path / "b" / CHECKPOINTS / "step-00000006")
    train(tiny(seed=99), rows(), output_path=str(tmp_path / "b"), resume="auto", **run)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    told.clear()
    train(tiny(), rows(40), on_step=lambda n: told.append(n["tokens"]), epochs=1, batch_size=8, phases=phases)
    assert sum(tokens // (5 if step < 2 else 13) for step, tokens in enumerate(told)) == 40


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([Phase(6, batch_size=4)], "step 6 comes after the last of 6 steps"),
        ([Phase(2, seq_len=14)], "14 tokens, but the dataset's have 13"),
        ([Phase(2, batch_size=3)], "3 does not divide"),
    ],
)
def test_phases_that_cannot_be_are_refused_before_the_first_step(phases: list[Phase], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(
            tiny(),
            rows(),
            on_step=lambda _: pytest.fail("a step was done"),
            phases=phases,
            **OPTIONS,
            grad_accum_steps=2,
        )


def test_a_checkpoint_goes_on_with_the_phases_that_it_has_seen(tmp_path: Path) -> None:
    run: dict[str, Any] = {**OPTIONS, "output_path": str(tmp_path), "resume": "auto"}
    train(tiny(), rows(), phases=[Phase(3, seq_len=5)], **run)
    with pytest.raises(TrainingError, match=r"phases: \[\[0, 13, 8\], \[3, 5, 8\]\] then, None now"):
        train(tiny(), rows(), **run | {"steps": 9})
    later = [Phase(3, seq_len=5), Phase(7, seq_len=13)]
    assert train(tiny(), rows(), phases=later, **run | {"steps": 9}).step == 9


def test_validation_matches_the_mean_over_all_rows(tmp_path: Path) -> None:
    held = rows(11)
    told: list[dict[str, Any]] = []
    model = tiny(data_type="fp64")
    options = OPTIONS | {"steps": 3}
    train(model, rows(), validation=held, validate_steps=2, validation_rows=11, on_step=told.append, **options)
    assert ["validation_loss" in numbers for numbers in told] == [False, True, True]
    ids, labels = (torch.stack(part) for part in zip(*(held.row(index) for index in range(11)), strict=True))
    with torch.no_grad():
        mean = model.eval()(ids, labels=labels) / labels.numel()
    assert told[-1]["validation_loss"] == pytest.approx(float(mean), rel=1e-12)
    for batch_size in (1, 3, 64):
        assert evaluate(model, held, batch_size=batch_size) == pytest.approx(float(mean), rel=1e-12)
    assert not model.training


def test_samples_are_written_when_they_are_due(tmp_path: Path) -> None:
    options = OPTIONS | {"steps": 5, "sample_steps": 2}
    train(tiny(), rows(), sample=lambda model: "hello", output_path=str(tmp_path), **options)
    steps = [2, 4, 5]
    assert (tmp_path / SAMPLES).read_text() == "".join(f"---- step {step}\nhello\n" for step in steps)


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    train(tiny(), rows(), output_path=str(tmp_path), checkpoint_steps=2, keep_checkpoints=2, **OPTIONS)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["step-00000004", "step-00000006"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny(), rows(), output_path=str(tmp_path), **OPTIONS)
    with pytest.raises(ConfigError, match=r"holds a run already.*resume=auto"):
        train(tiny(), rows(), output_path=str(tmp_path), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"), [({"batch_size": 4}, "batch_size: 8 then, 4 now"), ({"seed": 7}, "seed: 0 then, 7 now")]
)
def test_other_data_order_is_not_resumed(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    train(tiny(), rows(), output_path=str(tmp_path), **OPTIONS)
    with pytest.raises(TrainingError, match=words):
        train(tiny(), rows(), output_path=str(tmp_path), resume="auto", **(OPTIONS | {"steps": 9} | change))


def test_a_killed_step_leaves_the_last_checkpoint_usable(tmp_path: Path) -> None:
    options = {"output_path": str(tmp_path), "checkpoint_steps": 2, **OPTIONS}

    def die(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny(), rows(), on_step=die, **options)
    whole = train(model := tiny(), rows(), resume="auto", **options)
    train(never := tiny(), rows(), **OPTIONS)
    assert whole.step == 6 and [row["step"] for row in read_metrics(tmp_path / METRICS)] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), never.parameters(), strict=True))


def test_options_and_keywords_together_are_refused() -> None:
    from fms_parallel.training import TrainOptions

    with pytest.raises(ConfigError, match="not both"):
        train(tiny(), rows(), options=TrainOptions(), lr=1.0)
    with pytest.raises(ConfigError, match="without validation data"):
        train(tiny(), rows(), validate_steps=2, steps=2)
    with pytest.raises(ConfigError, match=r"batch_size=8|global_batch=8"):
        train(tiny(), rows(), grad_accum_steps=3, **OPTIONS)


def test_loss_function_is_asked() -> None:
    calls = []

    def watched(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments))
        return model_loss(*arguments)

    train(tiny(), rows(), loss_function=watched, **(OPTIONS | {"steps": 2}))
    assert calls == [3, 3]


def test_layouts_of_steps_that_never_come_are_refused() -> None:
    from fms_parallel.dynamic.schedule import LayoutSchedule

    schedule = LayoutSchedule({6: "tp=1"}, lambda layout, **_: tiny())
    with pytest.raises(ConfigError, match=r"step 6 for layout 'tp=1' comes after the last of 6 steps"):
        train(tiny(), rows(), between_steps=schedule, **OPTIONS)


def test_a_warm_up_longer_than_all_epochs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps=6 is longer than the run of 5 steps"):
        train(tiny(), rows(40), batch_size=8, epochs=1, warmup_steps=6)
