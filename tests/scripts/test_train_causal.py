"""The training command in one process: a whole run, and one sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.errors import CheckpointError, ConfigError, FmsError
from fms_parallel.training.metrics import METRICS, read_metrics
from scripts import inference, train_causal

SMALL = [
    *("--override", "width=32", "--override", "layers=1", "--override", "ffn_width=48"),
    *("--seq_len", "16", "--batch_size", "4", "--steps", "3"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return file


def command(monkeypatch: pytest.MonkeyPatch, script: Any, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    code: int = script.main()
    return code


def test_a_run_leaves_what_inference_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ["--dataset_path", str(text), "--output_path", str(folder), "--validate_steps", "2", "--sample_steps", "2"]
    assert command(monkeypatch, train_causal, *SMALL, *words, "--validation_fraction", "0.2") == 0
    assert len(read_metrics(folder / METRICS)) == 3
    assert (folder / "loss.png").stat().st_size > 1000
    assert "---- step 3" in (folder / "samples.txt").read_text()
    assert "step      3  loss" in capsys.readouterr().out
    ask = ["--run_folder", str(folder), "--prompt", "The ", "--max_new_tokens", "5", "--json"]
    assert command(monkeypatch, inference, *ask) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "The "
    drawn = []
    for _ in range(2):
        assert command(monkeypatch, inference, *ask, "--temperature", "2", "--seed", "-1") == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]
    with pytest.raises(ConfigError, match=r"--variant is what --run_folder .* says itself: drop it"):
        command(monkeypatch, inference, *ask, "--variant", "7b")
    (folder / "run.json").write_text('{"architecture": "llama"}')
    with pytest.raises(CheckpointError, match=r"run\.json is not what a training run wrote \(KeyError\('variant'\)\)"):
        command(monkeypatch, inference, *ask)


def test_a_sentencepiece_tokenizer_is_trained_on_the_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    folder = tmp_path / "run"
    words = ["--dataset_path", str(text), "--output_path", str(folder), "--tokenizer", "sentencepiece:300"]
    assert command(monkeypatch, train_causal, *SMALL, *words) == 0
    known = json.loads((folder / "run.json").read_text())
    assert known["overrides"]["vocab_size"] == 300 and Path(known["tokenizer"]).is_file()
    moved = folder.rename(tmp_path / "moved")
    ask = ["--run_folder", str(moved), "--prompt", "The ", "--max_new_tokens", "2", "--json"]
    assert command(monkeypatch, inference, *ask) == 0


BAD: list[tuple[list[str], list[str]]] = [
    (["--variant", "9b"], ["'9b'", "Known", "7b"]),
    (["--architecture", "lama"], ["'lama'", "'llama'"]),
    (["--override", "widht=3"], ["'widht'", "'width'"]),
    (["--override", "width"], ["--override", "name=value"]),
    (["--override", "heads=5"], ["192", "5"]),
    (["--override", "heads=0"], ["'heads': 0", "at least 1"]),
    (["--timeout", "-1"], ["-1", "more than 0 seconds"]),
    (["--distributed", "tp=2,spp"], ["'spp'", "'sp'"]),
    (["--distributed", "tp=2"], ["2 ranks", "job has 1", "--nproc_per_node=2"]),
    (["--distributed", "pp=2"], ["2 ranks", "job has 1"]),
    (["--distributed", "precision=fp64", "--default_dtype", "fp32"], ["fp32", "fp64", "contradict"]),
    (["--tokenizer", "nowhere.model"], ["'nowhere.model'"]),
    (["--tokenizer", "sentencepiece:x"], ["sentencepiece:N"]),
    (["--dataset_path", "nowhere.txt"], ["nowhere.txt"]),
    (["--dataset_style", "txt"], ["'txt'", "'text'"]),
    (["--dataset_option", "max_byte=3"], ["'max_byte'", "'max_bytes'"]),
    (["--override", "vocab_size=100"], ["256", "100", "vocabulary"]),
    (["--seq_len", "5000"], ["5000", "max_positions=1024"]),
    (["--batch_size", "6", "--grad_accum_steps", "4"], ["6", "4"]),
    (["--model_path", "nowhere"], ["nowhere", "no such file"]),
    (["--checkpoint_format", "hf"], ["model_path"]),
    (["--steps", "3", "--epochs", "2"], ["steps=3", "epochs=2"]),
    (["--lr", "-1"], ["lr=-1.0", "> 0"]),
    (["--resume", "auto"], ["resume=auto", "output_path"]),
    (["--dynamic", "--relayout", "2:tp=2"], ["--dynamic", "--relayout", "drop one"]),
    (["--policy", "rules"], ["--policy belongs to --dynamic"]),
    (["--phases", "seq_len=8"], ["write STEP:SIZE=N"]),
    (["--phases", "4:seq_len=8,4:batch_size=2"], ["step 4 is given twice"]),
    (["--phases", "4:lr=1"], ["unknown size of a phase 'lr'", "seq_len"]),
    (["--phases", "4:seq_len=0"], ["seq_len=0 at step 4", "whole number >= 1"]),
    (["--phases", "4:seq_len=5000"], ["5000", "max_positions=1024"]),
    (["--phases", "4:batch_size=6", "--grad_accum_steps", "4"], ["--phases: from step 4 on", "6", "multiple of 4"]),
    (["--phases", "4:batch_size=6", "--steps", "3"], ["step 4 comes after the last of 3 steps"]),
    (["--relayout", "3:tp=1", "--steps", "3"], ["--relayout 3:tp=1", "after the last of 3 steps"]),
    (["--steps", "3", "--warmup_steps", "4"], ["warmup_steps=4", "run of 3 steps", "at most 3"]),
    (["--warmup_steps", "4000"], ["warmup_steps=4000", "longer than the run", "train longer"]),
    (["--validation_fraction", "0.1"], ["--validation_fraction belongs to --validate_steps"]),
    (["--sample_tokens", "5"], ["--sample_tokens belongs to --sample_steps"]),
    (["--sample_steps", "1", "--sample_tokens", "0", "--output_path", "OUT"], ["--sample_tokens 0", "at least one"]),
    (
        ["--sample_steps", "1", "--sample_tokens", "1021", "--output_path", "OUT"],
        ["prompt of 5 tokens", "at most 1019"],
    ),
    (["--silence", "5"], ["--silence belongs to --elastic"]),
    (["--elastic", "--silence", "0"], ["--silence 0.0", "more than 0 seconds"]),
    (["--elastic", "--buddy_every", "0"], ["--buddy_every 0", ">= 1"]),
    (["--elastic", "--replacements", "-1"], ["--replacements -1", ">= 0"]),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_bad_command_gets_a_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, words: list[str], said: list[str]
) -> None:
    words = [str(tmp_path / "run") if word == "OUT" else word for word in words]
    given = ["--dataset_path", str(text)] if not any("dataset_style" in word for word in words) else []
    with pytest.raises(FmsError) as caught:
        command(monkeypatch, train_causal, *given, *words)
    assert all(word in str(caught.value) for word in said), str(caught.value)


def test_an_empty_dataset_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FmsError, match=r"empty\.txt"):
        command(monkeypatch, train_causal, *SMALL, "--dataset_path", str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("script", ["train_causal", "inference"])
def test_help_needs_no_torch(script: str) -> None:
    code = (
        f"import sys, contextlib, io; from scripts import {script}\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        f"    {script}.build_parser().parse_args(['--help'])\n"
        "sys.exit('torch' in sys.modules or '--distributed' not in out.getvalue())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("script", [train_causal, inference])
def test_no_flag_is_swallowed_by_torchrun(script: Any) -> None:
    """torchrun takes a script's flag for its own when it abbreviates one of them."""
    from torch.distributed.run import get_args_parser

    theirs = {word for action in get_args_parser()._actions for word in action.option_strings}
    ours = {
        word for action in script.build_parser()._actions for word in action.option_strings if word.startswith("--")
    }
    assert not [word for word in ours - {"--help"} if any(other.startswith(word) for other in theirs)]
