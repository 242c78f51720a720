"""Options say what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.training.options import TrainOptions


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 3, "epochs": 1}, ["steps=3", "epochs=1", "one of them"]),
        ({"batch_size": 0}, ["batch_size=0", ">= 1"]),
        ({"lr": 0.0}, ["lr=0.0", "> 0"]),
        ({"min_lr": 2.0}, ["min_lr=2.0", "[0, 1]"]),
        ({"beta2": 1.0}, ["beta2=1.0", "[0, 1)"]),
        ({"weight_decay": -1.0}, ["weight_decay=-1.0"]),
        ({"lr_schedule": "cosin"}, ["'cosin'", "'cosine'"]),
        ({"decay_steps": 5}, ["decay_steps=5", "wsd", "cosine"]),
        ({"checkpoint_steps": 5}, ["checkpoint_steps=5", "output_path"]),
        ({"sample_steps": 5}, ["sample_steps=5", "output_path"]),
        ({"resume": "auto"}, ["resume=auto", "output_path"]),
        ({"stepz": 5}, ["'stepz'", "'steps'"]),
        ({"steps": 3, "warmup_steps": 5}, ["warmup_steps=5", "run of 3 steps", "at most 3", "train longer"]),
        (
            {"steps": 9, "warmup_steps": 5, "lr_schedule": "wsd", "decay_steps": 6},
            ["decay_steps=6", "warmup_steps=5", "9 steps", "at most 4"],
        ),
        ({"lr_schedule": "constant", "min_lr": 0.5}, ["min_lr=0.5", "no effect", "lr_schedule=constant"]),
        ({"validation_rows": 5}, ["validation_rows=5", "no effect", "validate_steps"]),
        ({"keep_checkpoints": 5}, ["keep_checkpoints=5", "no effect", "output_path"]),
        ({"lr": float("inf")}, ["lr=inf", "finite"]),
        ({"weight_decay": float("nan")}, ["weight_decay=nan", "finite"]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm=nan", "finite"]),
        ({"steps": 2.5}, ["steps=2.5", "whole number"]),
        ({"batch_size": True}, ["batch_size=True", "whole number"]),
        ({"lr": "3e-4"}, ["lr='3e-4'", "a number"]),
        ({"checkpoint_async": "false", "output_path": "runs/a"}, ["checkpoint_async='false'", "True or False"]),
    ],
)
def test_what_cannot_be_is_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainOptions.of(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_can_be_is_taken(tmp_path: Path) -> None:
    TrainOptions(steps=5, warmup_steps=5, lr=1, output_path=str(tmp_path), keep_checkpoints=None)
    TrainOptions(steps=9, warmup_steps=5, lr_schedule="wsd", decay_steps=4, validate_steps=2, validation_rows=3)


def test_options_are_read_without_torch() -> None:
    code = "import sys, fms_parallel.training.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
