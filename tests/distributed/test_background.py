"""Checkpoints written while training goes on. Oracles: bits of that moment, counts of descriptors."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.checkpoint import background
from fms_parallel.checkpoint.background import BackgroundSaver
from fms_parallel.checkpoint.manifest import FileMark
from fms_parallel.checkpoint.training_state import latest_training_state, load_training_state, save_training_state
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import CheckpointError, ConfigError
from fms_parallel.training import train as run_training
from fms_parallel.training.options import TrainOptions
from tests.checkpoint.llamas import TIED, TINY, build
from tests.distributed.test_checkpoint import adam, digests, train
from tests.training.runs import OPTIONS, rows, tiny

LAYOUTS = [("", 1), ("fsdp=2", 2), ("tp=2,sp", 2), ("pp=2", 2), ("cp=2", 2), ("fsdp=2,tp=2", 4)]
WAIT = 30.0


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    go, write = threading.Event(), background.write_out

    def later(*arguments: Any) -> Path:
        assert go.wait(WAIT)
        return write(*arguments)

    with patch.object(background, "write_out", later):
        yield go


def start(layout: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(TIED, layout, seed=seed)
    return model, adam(model)


# ---- what is saved ----------------------------------------------------------------------------------------------


def save_and_train_on(layout: str, folder: str) -> dict[str, Any]:
    model, optimizer = start(layout)
    for step in range(2):
        train(model, optimizer, step)
    then = digests(model, optimizer)
    with held_back() as go, BackgroundSaver() as saver:
        saver.save(Path(folder), step=2, model=model, optimizer=optimizer, numbers={"a": 1})
        early = latest_training_state(Path(folder))
        third = train(model, optimizer, 2)
        now = digests(model, optimizer)
        go.set()
        saved = saver.wait()
    again, fresh = start(layout, seed=1)
    assert saved is not None
    numbers = load_training_state(saved, again, fresh)
    found = digests(again, fresh)
    return {"then": then, "now": now, "found": found, "numbers": numbers, "early": early, "saved": saved} | {
        "losses": (third, train(again, fresh, 2))
    }


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_bits_are_those_of_the_moment_of_saving(tmp_path: Path, layout: str, ranks: int) -> None:
    record = run_ranks(save_and_train_on, ranks, layout, str(tmp_path))[0]
    assert record["found"] == record["then"] and record["now"] != record["then"]
    assert record["losses"][0] == record["losses"][1]
    assert record["numbers"] == {"a": 1, "step": 2}
    assert (record["early"], record["saved"]) == (None, tmp_path / "step-00000002")


def save_both_ways(folder: str) -> None:
    model, optimizer = start("fsdp=2")
    train(model, optimizer, 0)
    state: dict[str, Any] = {"step": 1, "model": model, "optimizer": optimizer, "numbers": {}}
    save_training_state(Path(folder, "waited"), **state)
    with BackgroundSaver() as saver:
        saver.save(Path(folder, "behind"), **state)


def test_files_are_those_of_saving_at_once(tmp_path: Path) -> None:
    run_ranks(save_both_ways, 2, str(tmp_path))
    waited, behind = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-00000001").glob("*.distcp")}
        for name in ("waited", "behind")
    )
    assert len(waited) == 2 and waited == behind


# ---- one after the other ----------------------------------------------------------------------------------------


def save_twice(folder: str) -> list[Any]:
    """The second `save` must wait for the first: only the first lets it go on."""
    model, optimizer = start("fsdp=2")
    seen: list[Any] = []
    with held_back() as go, BackgroundSaver() as saver:
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "numbers": {}}
        saver.save(Path(folder), step=1, **state)
        threading.Timer(0.3, go.set).start()
        saver.save(Path(folder), step=2, **state)
        seen.append(latest_training_state(Path(folder)))
    return [*seen, latest_training_state(Path(folder))]


def test_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    for first, second in run_ranks(save_twice, 2, str(tmp_path)):
        assert first == tmp_path / "step-00000001" or first == tmp_path / "step-00000002"
        assert second == tmp_path / "step-00000002"


def resources() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def save_many(folder: str) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    model, optimizer = start("fsdp=2")
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "numbers": {}, "keep": 2}
    with BackgroundSaver() as saver:  # torch's own first-time costs
        saver.save(Path(folder), step=0, **state)
    before, counts = resources(), []
    for first in (1, 13):
        with BackgroundSaver() as saver:
            for step in range(first, first + 12):
                saver.save(Path(folder), step=step, **state)
                saver.wait()
                counts.append(resources())
    return counts, before, resources()


def test_many_saves_leak_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    for counts, before, after in run_ranks(save_many, 2, str(tmp_path)):
        assert len(set(counts)) == 1
        assert after == before
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000023", "step-00000024"]


# ---- failures ---------------------------------------------------------------------------------------------------


def full_disk(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def fail_on_rank_1(folder: str) -> tuple[str, Path | None]:
    """The error of the save before comes out of the next one, on every rank; the saver works on."""
    model, optimizer = start("fsdp=2")
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "numbers": {}}
    message = ""
    with BackgroundSaver() as saver:
        with patch.object(FileMark, "of", full_disk if dist.get_rank() == 1 else FileMark.of):
            saver.save(Path(folder), step=1, **state)
            assert saver._thread is not None
            saver._thread.join(WAIT)
        try:
            saver.save(Path(folder), step=2, **state)
        except CheckpointError as error:
            message = str(error)
        saver.save(Path(folder), step=3, **state)
    return message, latest_training_state(Path(folder))


def test_failure_on_one_rank_is_raised_on_all_by_the_next_save(tmp_path: Path) -> None:
    for message, latest in run_ranks(fail_on_rank_1, 2, str(tmp_path)):
        assert "No space left" in message
        assert latest == tmp_path / "step-00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def fail_elsewhere(folder: str) -> Path | None:
    """The run fails while a checkpoint is being written, and does not wait for ever."""
    model, optimizer = start("fsdp=2")
    with patch.object(background, "PATIENCE", 0.2), held_back() as go:
        with pytest.raises(ZeroDivisionError), BackgroundSaver() as saver:
            saver.save(Path(folder), step=1, model=model, optimizer=optimizer, numbers={})
            raise ZeroDivisionError
        left = latest_training_state(Path(folder))
        go.set()
        assert saver._thread is not None
        saver._thread.join(WAIT)
    return left


def test_run_that_fails_leaves_an_unfinished_checkpoint_unread(tmp_path: Path) -> None:
    assert run_ranks(fail_elsewhere, 2, str(tmp_path)) == [None, None]


def die_while_writing(folder: str) -> None:
    model, optimizer = build(TINY, "fsdp=2"), None
    optimizer = adam(model)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "numbers": {}}
    with BackgroundSaver() as saver:
        saver.save(Path(folder), step=1, **state)
        saver.wait()
        with patch.object(FileMark, "of", lambda *_: os._exit(3) if dist.get_rank() == 1 else FileMark(0, "")):
            saver.save(Path(folder), step=2, **state)
            saver.wait()


def test_rank_that_dies_while_its_thread_writes_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank"):
        run_ranks(die_while_writing, 2, str(tmp_path))
    assert latest_training_state(tmp_path) == tmp_path / "step-00000001"


# ---- in a run ---------------------------------------------------------------------------------------------------


def run(layout: str | None, folder: str, **options: Any) -> tuple[list[float], str | None]:
    losses: list[float] = []
    outcome = run_training(
        tiny(layout), rows(), on_step=lambda n: losses.append(n["loss"]), output_path=folder, **(OPTIONS | options)
    )
    return losses, str(outcome.checkpoint)


@pytest.mark.parametrize(("layout", "ranks"), [(None, 1), ("fsdp=2", 2), ("pp=2", 2)])
def test_run_that_saves_behind_goes_on_as_one_that_waits(tmp_path: Path, layout: str | None, ranks: int) -> None:
    def at(folder: str, **options: Any) -> tuple[list[float], str | None]:
        return run_ranks(run_options, ranks, layout, str(tmp_path / folder), options)[0]  # type: ignore[no-any-return]

    waited, _ = at("waited", checkpoint_steps=2)
    losses, last = at("behind", checkpoint_steps=2, checkpoint_async=True)
    assert losses == waited and last == str(tmp_path / "behind/checkpoints/step-00000006")
    more, _ = at("behind", steps=8, resume="auto", checkpoint_async=True, lr_schedule="constant", warmup_steps=0)
    assert len(more) == 2


def run_options(layout: str | None, folder: str, options: dict[str, Any]) -> tuple[list[float], str | None]:
    return run(layout, folder, **options)


def stop_at_three(folder: str) -> tuple[int, str | None]:
    """Asked to stop, by a signal to the second rank only, while the checkpoint of step 2 may still be being written."""

    def told(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    more: dict[str, Any] = {"output_path": folder, "checkpoint_steps": 2, "checkpoint_async": True}
    outcome = run_training(tiny("fsdp=2"), rows(), on_step=told, **(OPTIONS | more))
    assert outcome.interrupted is not None
    return outcome.step, str(outcome.checkpoint)


def test_signal_waits_for_the_last_checkpoint(tmp_path: Path) -> None:
    for step, checkpoint in run_ranks(stop_at_three, 2, str(tmp_path)):
        assert step < 6
        assert checkpoint == str(latest_training_state(tmp_path / "checkpoints"))
        assert checkpoint.endswith(f"step-{step:08d}")
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_option_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint_async without output_path"):
        TrainOptions(checkpoint_async=True)
