"""The command in one process: every part prints its lines, all caches agree, mistakes are one sentence."""

from __future__ import annotations

import sys

import pytest

from benchmarks import continuous_batching
from fms_parallel.errors import ConfigError
from scripts import benchmark_inference

SMALL = [
    *("--override", "width=32", "--override", "layers=1", "--override", "heads=2", "--override", "ffn_width=48"),
    *("--seq_len", "9", "--max_new_tokens", "5", "--default_dtype", "fp64"),
]


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["benchmark_inference.py", *SMALL, *flags])
    assert benchmark_inference.main() == 0
    return capsys.readouterr().out


def test_every_cache_is_timed_unless_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(monkeypatch, capsys, "--skip_nokvcache_runs", "--skip_single_token_runs")
    assert [line.split()[0] for line in out.splitlines() if "ms per token" in line] == [
        "cache=internal",
        "cache=manager",
        "cache=paged",
    ]
    assert "Single token" not in out


def test_serving_mode_keeps_the_cache_and_batch_mode_frees_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(monkeypatch, capsys, "--skip_eager_runs", "--num-requests", "2", "--use-kv-manager")
    rows = [line.split() for line in out.splitlines() if "cache freed" in line or "cache kept" in line]
    cache = 2 * 14 * 2 * 32 * 8 / 2**20  # rows, tokens, keys and values, K * D, bytes
    assert [row[3] for row in rows] == ["+0.0"] * 2 + [f"{cache:+.1f}"] * 2
    assert rows[2][5:] == ["cache", "kept"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be >= 1"),
        (["--num_requests", "-1"], "--num_requests -1: must be >= 0"),
        (["--use_kv_cache", "--use_kv_manager"], "each name a cache: drop one"),
        (["--compile_mode", "default", "--skip_compile_runs"], "contradict each other"),
        (["--seq_len", "2000"], "max_seq_len=2005 is beyond max_positions=1024"),
    ],
)
def test_impossible_command_is_one_sentence(
    flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        said(monkeypatch, capsys, *flags)
    assert sentence in str(error.value)


def test_continuous_batches_need_fewer_steps_and_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--size", "tiny", "--scale", "50", "--rounds", "1", "--rows", "4"]
    monkeypatch.setattr(sys, "argv", ["continuous_batching.py", *flags])
    assert continuous_batching.main() == 0  # it fails when tokens differ
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = {line[0]: int(line[1]) for line in lines if line and line[0] in ("continuous", "static", "leaving")}
    assert steps["continuous"] < min(steps["static"], steps["leaving"])
    assert len(steps) == 3
