"""`scripts/train_hf_pipeline.py` in one process: every kind of model, and what is wrong with a command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.errors import ConfigError
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
        (["--model", "vit", "--dataset_path", __file__], "bytes for a model of picture"),
    ],
)
def test_a_mistake_is_said(words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=sentence):
        start(monkeypatch, *words)
