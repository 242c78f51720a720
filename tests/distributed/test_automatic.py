"""`--distributed auto` as torchrun starts it; in ranks that have everything loaded it goes on; and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_config
from fms_parallel.planner import load_devices
from fms_parallel.training.metrics import METRICS, read_metrics
from scripts import automatic, common, train_causal, train_masked
from tests.distributed.test_scripts import SMALL, finish, start, text

__all__ = ["text"]


def in_ranks(words: list[str]) -> str:
    """What `train_causal.py` prints on this rank."""
    sys.argv, out = ["train_causal.py", *words], io.StringIO()
    with contextlib.redirect_stdout(out):
        assert train_causal.main() == 0
    return out.getvalue()


def test_two_ranks_train_as_one_process_and_go_on(text: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--dataset_path", str(text), "--default_dtype", "fp64", "--lr_schedule", "constant"]
    auto = [*words, "--distributed", "auto", "--output_path", str(tmp_path / "auto")]
    code, out, err = finish(start("scripts/train_causal.py", *auto, "--steps", "3"))
    assert code == 0, err
    run = json.loads((tmp_path / "auto" / "run.json").read_text())
    layout = ParallelLayout.parse(run["layout"])
    assert layout.world_size == 2
    assert f"planned for cpu:2 (this machine, the constants that the library brings along): {layout}, " in out
    assert run["planned"]["cluster"] == "cpu:2" and run["planned"]["step_time_s"] > 0
    run_ranks(in_ranks, 1, [*words, "--output_path", str(tmp_path / "one"), "--steps", "5"])
    first, _ = run_ranks(in_ranks, 2, [*auto, "--steps", "5", "--resume", "auto"])
    assert "planned for cpu:2" in first
    ours, theirs = read_metrics(tmp_path / "auto" / METRICS), read_metrics(tmp_path / "one" / METRICS)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4, 5]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-12), name


def settle(script: Any, *words: str) -> tuple[Any, ParallelLayout, dict[str, Any]]:
    args = script.build_parser().parse_args(["--distributed", "auto", *words])
    args.architecture = args.architecture or "roberta"
    config = get_config(args.architecture, args.variant)
    return automatic.settle(args, common.read_options(args), common.read_layout(args), config)


@pytest.fixture
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("eight_ranks")
def test_an_encoder_is_planned_for_like_a_decoder() -> None:
    """A batch of two rows leaves little to replicate: the rest of eight ranks is cp, pp or tp."""
    words = ("--batch_size", "2", "--gpus", "h100:8", "--seq_len", "64")
    _, layout, planned = settle(train_masked, *words)
    assert layout.world_size == 8 and layout.data_parallel <= 2
    assert planned["planned"]["cluster"] == "h100:8"
    refuse = automatic.runnable(
        train_masked.build_parser().parse_args(["--architecture", "roberta"]), get_config("roberta")
    )
    for word in ("pp=2,microbatches=2", "cp=2", "tp=2,sp"):
        refuse(ParallelLayout.parse(word))
    with pytest.raises(LayoutError, match="heads"):
        refuse(ParallelLayout.parse("tp=7"))


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpus", "h100:16"), "are 16 devices but the job has 8 ranks"),
        (("--gpus", "h1000:8"), "unknown GPU 'h1000'. Did you mean 'h100'"),
        (("--devices", "FILE"), "describes other, this machine is a cpu"),
        (("--grad_accum_steps", "3"), "--batch_size 8 does not divide into --grad_accum_steps 3"),
    ],
)
def test_what_cannot_be_planned_is_said(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    device = {key: value for key, value in asdict(load_devices()["h100"]).items() if key != "name"}
    (tmp_path / "other.json").write_text(json.dumps({"other": device}))
    words = tuple(word.replace("FILE", str(tmp_path / "other.json")) for word in words)
    with pytest.raises(ConfigError, match=sentence):
        settle(train_causal, *words)


def test_words_of_auto_without_auto_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_causal.py", "--gpus", "h100:1"])
    with pytest.raises(ConfigError, match="--gpus describes what --distributed auto plans for"):
        train_causal.main()


@pytest.mark.usefixtures("eight_ranks")
def test_accumulation_is_what_memory_needs_or_what_a_person_asks_for(tmp_path: Path) -> None:
    device = {key: value for key, value in asdict(load_devices()["h100"]).items() if key != "name"}
    (tmp_path / "small.json").write_text(json.dumps({"small": {**device, "memory_gb": 2.05}}))
    words = ("--batch_size", "64", "--seq_len", "1024", "--devices", str(tmp_path / "small.json"), "--gpus", "small:8")
    options, layout, planned = settle(train_causal, *words)
    assert options.grad_accum_steps > 1 and layout.pp == 1
    rows = planned["planned"]["micro_batch"]
    assert rows * options.grad_accum_steps * layout.data_parallel == 64
    options, layout, planned = settle(train_causal, "--batch_size", "64", "--gpus", "h100:8", "--grad_accum_steps", "4")
    assert options.grad_accum_steps == 4
    assert planned["planned"]["micro_batch"] * layout.data_parallel * 4 == 64
