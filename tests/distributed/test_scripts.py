"""The commands as torchrun starts them: one sentence for a mistake, a killed rank, an interrupt, and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fms_parallel.training.metrics import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = [
    *("--override", "width=32", "--override", "layers=1", "--override", "ffn_width=48"),
    *("--seq_len", "16", "--batch_size", "4", "--report_steps", "1"),
]


def start(script: str, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, *script.split(), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    return file


def said(err: str) -> list[str]:
    """The scripts' own messages; torchrun adds its report of who failed."""
    return re.findall(r"^(?:\[rank \d+\] )?error: .*$", err, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--distributed tp=2 --override heads=3", "error: tp=2 does not divide 3 heads"),
        ("", "error: 2 ranks were started but --distributed says nothing: choose a layout, such as fsdp=2."),
        ("--distributed tp=2 --dataset_path /nowhere.txt", "/nowhere.txt"),
    ],
)
def test_a_mistake_is_said_once_and_every_rank_ends(words: str, sentence: str) -> None:
    code, _, err = finish(start("scripts/train_causal.py", *words.split(), "--steps", "2"))
    assert code != 0
    assert len(said(err)) == 1 and sentence in said(err)[0], err
    assert err.count("Traceback") == 1  # torchrun's own


def test_an_interrupted_run_goes_on_in_another_layout(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*SMALL, "--dataset_path", str(text), "--output_path", str(folder), "--steps", "400"]
    process = start("scripts/train_causal.py", *words, "--distributed", "tp=2,sp")
    wait_for_steps(folder, 3)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code != 0 and "interrupted at step" in out, err
    stopped = len(read_metrics(folder / METRICS))
    assert 3 <= stopped < 400
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    more = [*words[:-1], str(400), "--resume", "auto", "--distributed", "fsdp=2"]
    process = start("scripts/train_causal.py", *more)
    wait_for_steps(folder, stopped + 2)
    process.send_signal(signal.SIGTERM)
    assert "interrupted at step" in finish(process)[1]
    steps = [line["step"] for line in read_metrics(folder / METRICS)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped + 2


def test_a_killed_rank_ends_the_job_with_whole_checkpoints_only(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*SMALL, "--dataset_path", str(text), "--output_path", str(folder), "--steps", "400"]
    process = start("scripts/train_causal.py", *words, "--distributed", "tp=2", "--checkpoint_steps", "2")
    wait_for_steps(folder, 5)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0 and "Signal 9" in err
    whole = [path for path in (folder / "checkpoints").iterdir() if not path.name.endswith(".partial")]
    assert whole and all((path / "manifest.json").is_file() for path in whole)
    assert not ranks_of(process)


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        file = folder / METRICS
        if file.exists() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps within 90 s")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that a launcher runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []


def test_verify_command_proves_a_layout() -> None:
    words = (
        "--factory fms_parallel.models:get_model --architecture llama --variant micro --layers 1 --dtype fp64 --json"
    )
    code, out, err = finish(start("-m fms_parallel.verify", *words.split(), "--distributed", "tp=2,sp"))
    report = json.loads(out)
    assert code == 0 and report["exact"] and report["worst"] <= 1e-12, err
    assert report["tensors"] == 12 and report["layout"] == "tp=2,sp,precision=fp64"
