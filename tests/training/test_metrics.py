"""What is written is what is read back; a torn last line and forgotten steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fms_parallel.errors import CheckpointError
from fms_parallel.training.metrics import METRICS, MetricsWriter, peak_memory_bytes, plot_losses, read_metrics


def write(folder: Path, steps: range, from_step: int = 0) -> None:
    writer = MetricsWriter(folder, from_step)
    for step in steps:
        writer.write({"step": step, "loss": 1 / step, "lr": 0.1, "grad_norm": 1.0, "validation_loss": 2 / step})
    writer.close()


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / METRICS)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 10), from_step=4)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == list(range(1, 10))


def test_a_torn_last_line_is_dropped_and_another_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    file = tmp_path / METRICS
    file.write_text(file.read_text() + '{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]
    file.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:1"):
        read_metrics(file)


def test_tensorboard_has_the_same_losses(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    write(tmp_path, range(1, 4))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])


def test_the_loss_curve_is_a_picture_with_lines(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="no matplotlib")
    write(tmp_path, range(1, 30))
    pixels = image.imread(plot_losses(tmp_path / METRICS, tmp_path / "loss.png"))
    coloured = (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)) > 0.3
    assert coloured.mean() > 0.002  # lines, not an empty frame


def test_peak_memory_grows_by_what_is_allocated() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + (16 << 20))  # more than this process ever had
    assert peak_memory_bytes(torch.device("cpu")) >= before + (32 << 20)
    assert held.sum() > 0
