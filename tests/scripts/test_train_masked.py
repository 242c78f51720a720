"""The command in one process: hidden tokens, then classification from there, and one sentence for every mistake."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import FmsError
from fms_parallel.models import get_model
from fms_parallel.training.metrics import METRICS, read_metrics
from scripts import train_masked

SMALL = [
    *("--override", "width=32", "--override", "layers=1", "--override", "heads=2", "--override", "ffn_width=48"),
    *("--seq_len", "24", "--batch_size", "8"),
]
WORDS = {"good": ("fine", "lovely", "superb"), "bad": ("dull", "awful", "poor")}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return file


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    file = tmp_path / "reviews.jsonl"
    rows = [{"text": f"a {word} film", "label": label} for label, words in WORDS.items() for word in words] * 4
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr(sys, "argv", [train_masked.__file__, *map(str, words)])
    return train_masked.main()


def test_hidden_tokens_then_classification_from_that_body(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    more = ["--output_path", run, "--validate_steps", "2", "--validation_fraction", "0.2", "--export_path", model]
    assert command(monkeypatch, *SMALL, "--steps", "3", "--dataset_path", text, *more) == 0
    assert len(read_metrics(run / METRICS)) == 3 and (run / "loss.png").stat().st_size > 1000
    assert "of tokens right" in capsys.readouterr().out
    known = json.loads((run / "run.json").read_text())
    assert known["architecture"] == "roberta" and known["overrides"]["width"] == 32
    assert known["overrides"]["padding_id"] == 0xFF

    tuned, small = tmp_path / "tuned", ["--seq_len", "24", "--batch_size", "8"]
    more = ["--task", "classification", "--architecture", "hf_pretrained", "--model_path", model]
    more += ["--export_path", tuned, "--output_path", tmp_path / "second", "--validation_path", reviews]
    words = ["--dataset_path", reviews, "--steps", "60", "--lr", "3e-3", "--validate_steps", "60"]
    assert command(monkeypatch, *small, *words, *more) == 0
    assert "held out: 100.0% of texts right" in capsys.readouterr().out
    assert json.loads((tmp_path / "second" / "run.json").read_text())["labels"] == ["bad", "good"]
    again = get_model("hf_pretrained", model_path=tuned)
    assert again.architecture == "roberta_classification" and again.config.classes == 2


def test_the_body_of_a_checkpoint_is_where_fine_tuning_starts(tmp_path: Path) -> None:
    from fms_parallel.models import save_hf
    from fms_parallel.models.new_head import with_new_head

    masked = get_model("roberta", "micro", seed=3, width=32, layers=1, heads=2, token_types=2)
    save_hf(masked, tmp_path)
    fields, fill = with_new_head("roberta_classification", tmp_path, seed=5, classes=3)
    model = get_model("roberta_classification", fill=fill, **fields)
    drawn = get_model("roberta_classification", seed=5, **fields)
    for name, parameter in model.named_parameters():
        source = drawn if name.startswith("classifier.") else masked
        assert torch.equal(parameter, source.get_parameter(name)), name
    assert model.config.classes == 3 and model.config.token_types == 2


def test_a_tokenizer_without_a_mask_gets_one_id_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    folder = tmp_path / "run"
    words = ["--dataset_path", text, "--output_path", folder, "--tokenizer", "sentencepiece:300", "--steps", "2"]
    assert command(monkeypatch, *SMALL, *words) == 0
    known = json.loads((folder / "run.json").read_text())
    assert known["overrides"]["vocab_size"] == 301 and known["overrides"]["padding_id"] == 3


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"reviews{suffix}"
    with open(file, "w", newline="") as out:
        writer = csv.writer(out, delimiter="," if suffix == ".csv" else "\t")
        writer.writerow(["stars", "review"])
        writer.writerows((index % 3, f"it is, say, {'so ' * index}") for index in range(9))
    words = ["--task", "classification", "--dataset_path", file, "--text_field", "review", "--label_field", "stars"]
    assert command(monkeypatch, *SMALL, *words, "--steps", "2", "--output_path", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["labels"] == ["0", "1", "2"]


BAD: list[tuple[list[str], list[str]]] = [
    (["--architecture", "llama"], ["roberta", "not llama"]),
    (["--task", "classification", "--architecture", "roberta"], ["roberta_classification", "not roberta"]),
    (["--task", "classification", "--mask_id", "3"], ["--mask_id", "classification"]),
    (["--validation_path", "x"], ["--validation_path", "masked"]),
    (["--sample_steps", "3", "--output_path", "x"], ["--sample_steps", "writes no text"]),
    (["--mask_fraction", "1.5"], ["1.5", "0.15"]),
    (["--mask_id", "256"], ["256"]),
    (["--override", "padding_id=7"], ["id 7", "255"]),
    (["--override", "vocab_size=100"], ["256", "100"]),
    (["--seq_len", "5000"], ["5000", "max_positions=1024"]),
    (["--distributed", "pp=2"], ["2 ranks", "job has 1"]),
    (["--task", "classification", "--dataset_path", "nowhere.csv"], ["nowhere.csv"]),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_bad_command_gets_a_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, text: Path, reviews: Path, words: list[str], said: list[str]
) -> None:
    given = ["--dataset_path", reviews if "classification" in words else text, "--steps", "2"]
    with pytest.raises(FmsError) as caught:
        command(monkeypatch, *given, *words)
    assert all(word in str(caught.value) for word in said), str(caught.value)


def test_classification_needs_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FmsError, match=r"--task classification needs --dataset_path"):
        command(monkeypatch, "--task", "classification")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, contextlib, io; from scripts import train_masked\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    train_masked.build_parser().parse_args(['--help'])\n"
        "sys.exit('torch' in sys.modules or '--mask_fraction' not in out.getvalue())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_flag_is_swallowed_by_torchrun() -> None:
    """torchrun takes a script's flag for its own when it abbreviates one of them."""
    from torch.distributed.run import get_args_parser

    theirs = {word for action in get_args_parser()._actions for word in action.option_strings}
    actions = train_masked.build_parser()._actions
    ours = {word for action in actions for word in action.option_strings if word.startswith("--")}
    assert not [word for word in ours - {"--help"} if any(other.startswith(word) for other in theirs)]
