"""`train_masked.py` as torchrun starts it: the losses of one process, dropout and dynamic masking included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fms_parallel.training.metrics import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--override", "width=32", "--override", "layers=1", "--override", "heads=2", "--override", "ffn_width=48"),
    *("--seq_len", "15", "--batch_size", "4", "--steps", "3", "--validate_steps", "3", "--validation_fraction", "0.3"),
    *("--default_dtype", "fp64"),
]


def losses(folder: Path, ranks: int, *words: str) -> list[float]:
    """Training losses of the steps, then the validation loss."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [*(torchrun if ranks > 1 else [sys.executable]), str(ROOT / "scripts" / "train_masked.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*script, *SMALL, *words, "--output_path", str(folder)],
        env=environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(folder / METRICS)
    return [row["loss"] for row in rows] + [rows[-1]["validation_loss"]]


def data_of(task: str, folder: Path) -> list[str]:
    file = folder / ("rows.jsonl" if task == "classification" else "text.txt")
    if task == "masked":
        file.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    else:
        rows = [{"text": "fine " * (index % 5 + 1), "label": index % 3} for index in range(30)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", task, "--dataset_path", str(file)]


@pytest.mark.parametrize("task", ["masked", "classification"])
def test_losses_are_those_of_one_process(task: str, tmp_path: Path) -> None:
    words = data_of(task, tmp_path)
    expected = losses(tmp_path / "one", 1, *words)
    for layout in ("tp=2,sp", "fsdp=2", "dp=2"):
        found = losses(tmp_path / layout, 2, *words, "--distributed", layout)
        assert found == pytest.approx(expected, rel=1e-11), layout
    accumulated = losses(tmp_path / "accumulated", 1, *words, "--grad_accum_steps", "2")
    assert accumulated == pytest.approx(expected, rel=1e-11)
