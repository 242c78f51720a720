"""`scripts/train_hf_pipeline.py`: once as torchrun starts it, the rest in ranks that have everything loaded."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from fms_parallel.cli import run
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import LayoutError
from scripts.train_hf_pipeline import build_parser, main, train
from tests.distributed.test_scripts import finish, start

pytest.importorskip("transformers")

WORDS = ["--model", "gpt2", "--steps", "3", "--batch_size", "4", "--seq_len", "8"]


def losses(out: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step +\d+  loss ([\d.]+)", out, flags=re.MULTILINE)]


def in_two_ranks(words: list[str]) -> tuple[str, str]:
    """(what it printed in another layout, what it says of a split that the model cannot have)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train(build_parser().parse_args([*words, "--distributed", "fsdp=2"]))
    try:
        train(build_parser().parse_args(["--model", "t5", "--distributed", "pp=2", "--split", "4,1"]))
    except LayoutError as error:
        return out.getvalue(), str(error)
    return out.getvalue(), "nothing"


def test_two_stages_print_what_two_shards_print(tmp_path: Path) -> None:
    words = [*WORDS, "--output_path", str(tmp_path / "stages")]
    code, out, err = finish(start("scripts/train_hf_pipeline.py", *words, "--distributed", "pp=2"))
    assert code == 0, err
    assert (tmp_path / "stages" / "config.json").is_file()
    first, second = run_ranks(in_two_ranks, 2, [*WORDS, "--output_path", str(tmp_path / "shards")])
    assert (tmp_path / "shards" / "config.json").is_file()
    assert len(losses(out)) == 3
    assert losses(out) == pytest.approx(losses(first[0]), abs=2e-4)
    assert second[0] == ""
    for _, said in (first, second):
        assert "2 stages need 2 numbers >= 1 that add up to 4 blocks" in said


def test_a_mistake_is_one_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_hf_pipeline.py", "--model", "gpt2", "--distributed", "pp=2"])
    with pytest.raises(SystemExit) as exit:
        run(main)
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
