"""Options say what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
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
    ],
)
def test_what_cannot_be_is_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainOptions.of(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_options_are_read_without_torch() -> None:
    code = "import sys, fms_parallel.training.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
