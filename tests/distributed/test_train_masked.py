"""`train_masked.py` on several ranks: the losses of one process, dropout, dynamic masking and padded rows included."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.training.metrics import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--override", "width=32", "--override", "layers=2", "--override", "heads=2", "--override", "ffn_width=48"]
SMALL = [
    *("--seq_len", "15", "--batch_size", "4", "--steps", "3", "--validate_steps", "3", "--validation_fraction", "0.3"),
    *("--default_dtype", "fp64"),
]


def numbers(folder: Path, said: str) -> list[float]:
    """Training losses of the steps, then the validation loss and the share of held-out labels that were right."""
    rows = read_metrics(folder / METRICS)
    share = float(said.partition("held out: ")[2].partition("%")[0])
    return [row["loss"] for row in rows] + [rows[-1]["validation_loss"], share]


def runs(folder: str, many: Sequence[Sequence[str]]) -> list[list[float]]:
    """On every rank: the script with each list of words, one after the other. The first rank's numbers."""
    from scripts import train_masked

    found = []
    for number, words in enumerate(many):
        place = Path(folder) / str(number)
        sys.argv = ["train_masked.py", *SMALL, *words, "--output_path", str(place)]
        with redirect_stdout(io.StringIO()) as said:
            assert train_masked.main() == 0
        found.append(numbers(place, said.getvalue()) if os.environ["RANK"] == "0" else [])
    return found


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
    words = [*data_of(task, tmp_path), *TINY]
    alone = run_ranks(runs, 1, str(tmp_path / "one"), [words, [*words, "--grad_accum_steps", "2"]])[0]
    layouts = ["tp=2,sp", "fsdp=2", "dp=2", "pp=2", "cp=2"]
    many = [[*words, "--distributed", layout] for layout in layouts]
    found = run_ranks(runs, 2, str(tmp_path / "two"), many)[0]
    for losses, what in zip([alone[1], *found], ["accumulated", *layouts], strict=True):
        assert losses == pytest.approx(alone[0], rel=1e-11), what


def test_a_body_trained_over_stages_is_tuned_over_shared_rows(tmp_path: Path) -> None:
    """pp exports, cp and pp read the body and draw the same new head."""
    body = ["--export_path", str(tmp_path / "body"), "--distributed", "pp=2"]
    run_ranks(runs, 2, str(tmp_path / "first"), [[*data_of("masked", tmp_path), *TINY, *body]])
    tuned = [*data_of("classification", tmp_path), "--architecture", "hf_pretrained"]
    tuned += ["--model_path", str(tmp_path / "body")]
    many = [[*tuned, "--distributed", layout] for layout in ("tp=2", "pp=2", "cp=2")]
    expected, *found = run_ranks(runs, 2, str(tmp_path / "second"), many)[0]
    for losses in found:
        assert losses == pytest.approx(expected, rel=1e-11)


def test_torchrun_starts_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [*torchrun, str(ROOT / "scripts" / "train_masked.py"), *SMALL, *TINY, *data_of("masked", tmp_path)]
    done = subprocess.run(
        [*script, "--distributed", "cp=2", "--output_path", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(numbers(folder, done.stdout)) == 5
