"""The decode benchmark: its sizes, its clocks, and one small case from end to end."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
import torch

from benchmarks import decode
from fms_parallel.errors import ConfigError

transformers = pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")


@pytest.mark.parametrize("name", decode.SIZES)
def test_a_token_reads_every_matrix_of_the_model_once(name: str) -> None:
    size = decode.SIZES[name]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(decode.config_for(size))
    assert sum(p.numel() for p in model.parameters() if p.ndim == 2) == size.matrices
    keys = model.model.layers[0].self_attn.k_proj.weight.shape[0]
    assert size.bytes_read(2, 3, 10, 4) == 2 * size.matrices + 3 * 10 * 2 * size.layers * keys * 4
    assert name != "1b" or 1.2e9 < size.matrices < 1.3e9


def test_a_gpu_that_is_not_there_is_said_before_weights_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode, "weights_for", lambda size: pytest.fail("weights were drawn"))
    monkeypatch.setattr(sys, "argv", ["decode.py", "--device", "cuda"])
    with pytest.raises(ConfigError, match="no CUDA device; use --device cpu"):
        decode.main()


def test_a_stamp_on_a_gpu_waits_for_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(done)))
    clock = decode.clock_of(torch.device("cuda"))
    assert (clock(), clock()) == (1.0, 2.0) and done == ["cuda", "cuda"]


def test_a_small_case_from_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = decode.Size(32, 2, 4, 48, vocab_size=61, max_positions=64, kv_heads=2)
    monkeypatch.setitem(decode.SIZES, "15m", tiny)
    monkeypatch.setattr(decode, "read_bandwidth", lambda device: 1e9)
    flags = "--size 15m --dtype fp32 --rows 2 --threads 1 --prompt 5 --new-tokens 4 --rounds 1 --json"
    monkeypatch.setattr(sys, "argv", ["decode.py", *flags.split(), "--peer", "transformers"])
    before = torch.get_num_threads()
    try:
        assert decode.main() == 0
    finally:
        torch.set_num_threads(before)
    case: dict[str, Any] = json.loads(capsys.readouterr().out)["cases"][0]
    assert (case["device"], case["rows"], case["tokens_agree"]) == ("cpu", 2, 1.0)
    mine = case["contestants"]["ours"]
    assert mine["best_GB_per_s"] * mine["best_token_ms"] * 1e6 == pytest.approx(tiny.bytes_read(4, 2, 7, 4))
    assert case["contestants"]["transformers"]["token_ratio"] > 0 and mine["token_ratio"] == 1
