"""`scripts/train_hf_pipeline.py` as torchrun starts it, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.test_scripts import finish, start

pytest.importorskip("transformers")


def losses(out: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step +\d+  loss ([\d.]+)", out, flags=re.MULTILINE)]


def test_two_stages_print_what_one_process_prints(tmp_path: Path) -> None:
    words = ["--model", "gpt2", "--steps", "3", "--batch_size", "4", "--seq_len", "8"]
    script = "scripts/train_hf_pipeline.py"
    found = {}
    for layout in ("pp=2", "fsdp=2"):
        code, out, err = finish(start(script, *words, "--distributed", layout, "--output_path", str(tmp_path / layout)))
        assert code == 0, err
        found[layout] = losses(out)
        assert (tmp_path / layout / "config.json").is_file()
    assert len(found["pp=2"]) == 3
    assert found["pp=2"] == pytest.approx(found["fsdp=2"], abs=2e-4)


def test_a_layout_that_the_model_cannot_have_is_one_sentence() -> None:
    code, _, err = finish(
        start("scripts/train_hf_pipeline.py", "--model", "t5", "--distributed", "pp=2", "--split", "4,1")
    )
    assert code != 0 and "2 stages need 2 numbers >= 1 that add up to 4 blocks" in err
    assert "error: " in err
