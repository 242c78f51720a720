"""A hostile user's words and files: every message names the thing, the rule and a way out, and nothing is written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.planner.cli import main

JOB = ["--model", "llama:3.1-8b", "--gpus", "h100:8", "--global-batch", "8"]
LINK = {"gb_s": 100, "latency_us": 5}
DEVICE = {"memory_gb": 80, "tflops": {"bf16": 900}, "vector_tflops": 100, "memory_gb_s": 3000, "intra": LINK,
          "inter": LINK}  # fmt: skip
SIZES = {"layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "head_width": 16, "ffn_width": 128, "vocab": 99,
         "max_positions": 128}  # fmt: skip
TPE = ["search", "--compat", "tpe", "--model", "gpt3", "--system", "B200"]
SWEEP = ["sweep", "--model", "gpt3", "--systems", "B200", "--num-gpus", "64", "--global-batch", "64"]
ROW = {"hidden": 3072, "layers": 30, "heads": 32, "gpus": 64, "gbs": 512, "mbs": 8, "tp": 1, "dp": 64, "pp": 1,
       "seq": 2048, "iter_ms": 3566.5}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", *JOB, "--gpus", "h100:8,"], "nothing stands before or behind a comma"),
        (["search", *JOB, "--gpus", "h100:8/3"], "no whole number of nodes of 3: use 6 or 9"),
        (["search", *JOB, "--gpus", "h100:1000"], "What would: --gpus h100:512"),
        (["search", *JOB, "--recompute", "budget=2"], "0 <= part < 1"),
        (["search", *JOB, "--recompute", "ful"], "unknown recompute policy 'ful'. Did you mean 'full'"),
        (["search", *JOB, "--steps", "-5", "--deadline", "1"], "--steps -5: needs a number > 0"),
        (["search", *JOB, "--steps", "5", "--budget", "0"], "--budget 0: needs a number > 0"),
        (["search", *JOB, "--steps", "100000", "--deadline", "0.1"], r"a limit of 0.\d+ s per step on this cluster"),
        (["search", *JOB, "--html", "/nonexistent/x.html"], "no folder /nonexistent: make it first"),
        (["search", *JOB, "--html", "/"], "is a folder: give the name of a file"),
        (["simulate", "pp=8", *JOB, "--plot", "x.foo"], r"ends with one of .png, .svg, .pdf"),
        (["simulate", "pp=8", *JOB, "--trace", "/nonexistent/x.json"], "no folder /nonexistent"),
        (["explain", "tp=8", "fsdp=8", *JOB, "--micro-batch", "3"], "use a divisor of 8"),
        (["calibrate", "--out", "/nonexistent/x.json"], "no folder /nonexistent"),
        (["search", "--compat", "fasop", "--gpus", "A40", "8", "--csv", "/nonexistent/x"], "no folder /nonexistent"),
        (["search", "--compat", "fasop", "--gpus", "A40", "8", "--top", "0"], "--top and --pareto-gbs-max"),
        (
            ["search", "--compat", "fasop", "--gpus", "A40", "8", "--model-type", "llama7b"],
            "that make-profile has measured",
        ),
        (["search", "--compat", "tpf"], "unknown --compat 'tpf'. Did you mean 'tpe'"),
        (["search", "--compat=fasp"], "unknown --compat 'fasp'. Did you mean 'fasop'"),
        (["search", "--compat"], "Known: fasop, tpe"),
        (["serch"], "unknown command 'serch'. Did you mean 'search'"),
        ([*TPE, "--num-gpus", "64", "--global-batch", "64", "--nvlink-domain", "3"], "domains of 2 would be filled"),
        ([*TPE, "--num-gpus", "4099", "--global-batch", "4096"], "4096 devices would work, or a batch .* of 4099"),
        ([*SWEEP, "--bandwidths", "-1"], "--bandwidths, --capacities, --flops: need numbers > 0"),
        ([*SWEEP, "--flops", "nan"], "--bandwidths, --capacities, --flops: need numbers > 0"),
        (["calibrate", "--out", "x.json", "--memory-gb", "nan"], "--memory-gb nan: needs a number > 0"),
        (["pareto-plot", "x.csv", "x.txt"], r"^x.txt: a picture's name ends with"),
        (["pareto-plot", "/nonexistent/x.csv", "x.png"], "cannot be read: No such file or directory.$"),
    ],
)
def test_words_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(words)


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--devices", {"x": {**DEVICE, "memory_gb": "80"}}, "x: memory_gb='80': needs a number > 0"),
        ("--devices", {"x": {**DEVICE, "inter": {**LINK, "gb_s": 0}}}, "x: inter: gb_s=0: needs a number > 0"),
        ("--devices", {"x": {**DEVICE, "intra": {"gb_s": 1}}}, "x: intra: needs an object with gb_s and latency_us"),
        ("--devices", {"x": {**DEVICE, "intra": {**LINK, "lag": 1}}}, "x: intra: unknown field 'lag'"),
        ("--devices", {"x": {**DEVICE, "inter": {**LINK, "efficiency": []}}}, "efficiency: needs a list of numbers"),
        ("--devices", {"x": {**DEVICE, "tflops": {}}}, "x: tflops: needs an object with a number"),
        ("--devices", {"x": {"memory_gb": 80}}, "x: no tflops; a device needs memory_gb, tflops"),
        ("--constants", {"constants": {"best": "x"}}, "constant best='x': needs a number >= 0"),
        ("--constants", {"constants": [1]}, "constants: needs an object"),
        ("--constants", {"cpu": DEVICE}, "describes devices, as `calibrate` writes them: give it to --devices"),
        ("--model", {**SIZES, "heads": "x"}, "heads='x': needs a whole number >= 1"),
        ("--model", {**SIZES, "layers": -4}, "layers=-4: needs a whole number >= 1"),
        ("--model", {**SIZES, "kv_heads": 3}, "4 heads over 3 kv heads"),
        ("--model", {**SIZES, "tied": 1}, "tied=1: is on or off"),
        ("--model", {"num_hidden_layers": 2}, "no hidden_size or n_embd"),
        ("--model", {"num_hidden_layers": 2, "hidden_size": 0}, "hidden_size or n_embd: 0 is no whole number >= 1"),
    ],
)
def test_files_of_a_job(tmp_path: Path, flag: str, content: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as error:
        main(["search", *JOB, flag, str(path)])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"multi": [{**ROW, "iter_ms": 0}]}, "multi row 0: iter_ms=0: needs a number > 0"),
        ({"multi": [ROW, {**ROW, "mbs": 0}]}, "multi row 1: mbs=0"),
        ({"multi": [{**ROW, "heads": True}]}, "heads=True"),
        ({"multi": [{**ROW, "mbs": "8"}]}, "multi row 0: mbs='8': needs a number > 0"),
        ({"multi": [1]}, "multi row 0: is 1, needs an object"),
        ({"tables": [{"caption": "x"}]}, "none of 1 in a form that is read"),
        ({"tables": {"a": 1}}, "tables: needs a list of objects"),
        ({"rows": [{"op": "sum", "size": 1, "num_nodes": 2, "gpus_per_node": 4, "time-o": 5}]}, "collective 'sum'"),
    ],
)
def test_measurements(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        main(["validate", "--measured", str(path)])


def test_numbers_of_rows_to_fit_to(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"multi": [ROW, ROW]}))
    with pytest.raises(ConfigError, match="--calibrate-rows -1: needs a whole number >= 0"):
        main(["validate", "--measured", str(path), "--calibrate-rows", "-1"])


def test_profiles(tmp_path: Path) -> None:
    path = tmp_path / "llama70b_A40_1.npz"
    words = ["search", "--compat", "fasop", "--gpus", "A40", "8", "--profiles", str(tmp_path)]
    path.write_text("garbage")
    with pytest.raises(ConfigError, match="not even an NPZ file; `fms-plan make-profile` writes one"):
        main(words)
    np.savez(path, other=np.ones((3, 10)))
    with pytest.raises(ConfigError, match="no array `data`"):
        main(words)


def test_a_path_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is a file: name a folder"):
        main(["make-profile", "--model", "llama1b", "--out", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--model", {"l": "2048", "e": 4096, "h": 32, "depth": 32}, "l='2048': needs a whole number > 0"),
        ("--model", {"l": 2048, "e": 4096, "h": 0, "depth": 32}, "h=0: needs a whole number > 0"),
        ("--model", {"l": 2048, "e": 4096, "depth": 32}, "no 'h'; a model needs l, e, h and depth"),
        ("--system", {"matrix_flops_fp16": "x"}, "matrix_flops_fp16='x': needs a number > 0"),
        ("--system", {"matrix_flops_fp16": 1}, "missing .* arguments: .*; a system needs"),
    ],
)
def test_files_of_transformer_perf_estimates(tmp_path: Path, flag: str, content: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as error:
        main([*TPE, "--num-gpus", "8", "--global-batch", "8", flag, str(path)])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("False,abc,1.0,A40:8", "x.csv:3: could not convert string to float: 'abc'; .* need numbers"),
        ("no,1.0,1.0,A40:8", "x.csv:3: is_oom is 'no': needs True or False"),
        ("False,1.0", "x.csv:3: the line ends early"),
    ],
)
def test_tables_to_plot_again(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.csv"
    head = "is_oom,cost($),throughput(samples/s),gpu_cluster"
    path.write_text(f"{head}\nFalse,1.0,1.0,A40:8\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        main(["pareto-plot", str(path), str(tmp_path / "x.png")])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(
        ConfigError, match=r"x.csv:2: no column cost\(\$\), throughput\(samples/s\), is_oom, gpu_cluster"
    ):
        main(["pareto-plot", str(path), str(tmp_path / "x.png")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


def test_a_profile_that_cannot_be_measured_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["make-profile", "--rows", "1", "--seq", "8", "--out", str(tmp_path / "p"), "--model"]
    with pytest.raises(ConfigError, match="tp=3 does not divide 4 heads"):
        main([*words, "llama:micro", "--tp", "3"])
    with pytest.raises(ConfigError, match=r"largest module needs \d+.\d GiB and the device has \d+.\d: take a larger"):
        main([*words, "llama:3.1-405b", "--rows", "20"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU here"):
        main([*words, "llama:micro", "--device", "cuda"])
    assert not list(tmp_path.iterdir())


def test_no_line_to_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ConfigError, match=r"--exhaustive: no line came; write tp pp dp mbs .*, as 1 32 1 1"):
        main(["search", "--compat", "fasop", "--gpus", "A40", "8", "--exhaustive"])


def test_nothing_is_written_when_a_search_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smallest"):
        main(["search", "--model", "llama:3.1-405b", "--gpus", "a10:8", "--global-batch", "8", "--html",
              str(tmp_path / "x.html")])  # fmt: skip
    assert not list(tmp_path.iterdir())
