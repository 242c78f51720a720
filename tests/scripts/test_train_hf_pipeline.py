"""`scripts/train_hf_pipeline.py` in one process: every kind of model, and what is wrong with a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.errors import ConfigError, TrainingError
from scripts import train_hf_pipeline

pytest.importorskip("transformers")


def start(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_hf_pipeline.py", *words])
    assert train_hf_pipeline.main() == 0


def losses(out: str) -> list[float]:
    return [float(line.split()[3]) for line in out.splitlines() if line.startswith("step")]


@pytest.mark.parametrize("model", ["gpt2", "t5", "whisper", "vit", "bert"])
def test_every_kind_of_model_trains(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    start(monkeypatch, "--model", model, "--steps", "2", "--batch_size", "2", "--seq_len", "8")
    assert len(losses(capsys.readouterr().out)) == 2


def test_a_text_is_learnt_and_the_folder_is_read_again(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40)
    words = ["--dataset_path", str(text), "--batch_size", "4", "--seq_len", "16", "--lr", "1e-2"]
    start(monkeypatch, "--model", "llama", *words, "--steps", "30", "--output_path", str(tmp_path / "out"))
    found = losses(capsys.readouterr().out)
    assert found[-1] < 0.5 * found[0]
    more = ["--lora", "q_proj,v_proj", "--output_path", str(tmp_path / "more"), "--steps", "2"]
    start(monkeypatch, "--model", str(tmp_path / "out"), *words, *more)
    assert losses(capsys.readouterr().out)[0] < 0.7 * found[0]
    assert (tmp_path / "more" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "gpt5"], "unknown architecture 'gpt5'"),
        (["--model", "vit", "--dataset_path", __file__], "is for models of text"),
        (["--dataset_path", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--dataset_path", os.devnull], "no such file"),
        (["--task", "translate"], "unknown task 'translate'"),
        (["--schedule", "1b1f"], "unknown schedule '1b1f'"),
        (["--split", "2,b"], "--split 2,b: write cost, even"),
        (["--split", "0"], "--split 0: write cost, even"),
        (["--microbatches", "0"], "--microbatches 0: must be >= 1"),
        (["--batch_size", "-1"], "--batch_size -1: must be >= 1"),
        (["--seq_len", "0"], "--seq_len 0: must be >= 1"),
        (["--seq_len", "65"], "--seq_len 65: gpt2 has 64 positions"),
        (["--steps", "0"], "--steps 0: must be >= 1"),
        (["--lora_rank", "0"], "--lora_rank 0: must be >= 1"),
        (["--lr", "nan"], "--lr nan: must be a number > 0"),
    ],
)
def test_a_mistake_is_said(words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=sentence):
        start(monkeypatch, *words)


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"step 2: loss nan.*lower --lr"):
        start(monkeypatch, "--lr", "1e30", "--steps", "3", "--batch_size", "2", "--seq_len", "8")
