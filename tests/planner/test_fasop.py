"""FASOP's own numbers, from runs of the unmodified original, and its partitions against brute force.

The original computes in fp32; times agree to 2e-6, partitions, memory and feasibility exactly.
"""

from __future__ import annotations

import csv
import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.planner.cli import main
from fms_parallel.planner.fasop import output
from fms_parallel.planner.fasop.integer_program import integer_program
from fms_parallel.planner.fasop.partition import brute_force, dynamic, even, minmax, stage_seconds
from fms_parallel.planner.fasop.pipeline import stage_ends
from fms_parallel.planner.fasop.search import Options, jobs, price
from fms_parallel.planner.fasop.tables import find_gpu, find_model, load_profiles

FLOAT32 = 2e-6

# work per stage, send on, send back, micro-batches -> end of the first stage
SCHEDULES = [
    ([0.131, 0.0877], [0.01, 0], [0, 0.012], 1, 0.24070000000000003),
    ([0.2127, 0.0681], [0.01, 0], [0, 0.012], 4, 0.9088),
    ([0.184, 0.1414, 0.0645], [0.01, 0.01, 0], [0, 0.012, 0.012], 2, 0.5685666666666667),
    ([0.1769, 0.0594, 0.1584, 0.0675], [0.01, 0, 0, 0], [0, 0, 0, 0.012], 4, 0.9444),
    ([0.0727, 0.1561, 0.2567, 0.081], [0.01, 0.01, 0.01, 0], [0, 0.012, 0.012, 0.012], 8, 2.5043999999999995),
    ([0.254, 0.0952, 0.1954, 0.2097, 0.1431, 0.1869, 0.0657, 0.0649], [0.01, *[0] * 7], [*[0] * 7, 0.012], 32,
     8.567266666666665),
    ([0.1492, 0.2941, 0.0616, 0.2646, 0.1224, 0.0861, 0.0794, 0.1271], [0] * 8, [0] * 8, 4, 1.7742),
]  # fmt: skip

CHAIN = [0.0896, 0.0962, 0.0236, 0.0259, 0.0309, 0.031, 0.0536, 0.063, 0.0336, 0.0104, 0.0477, 0.0432]
SENDS = [
    [0.0057, 0.0095, 0.0069], [0.0052, 0.0062, 0.0068], [0.0005, 0.009, 0.0078], [0.0087, 0.008, 0.0039],
    [0.004, 0.001, 0.0063], [0.0006, 0.0007, 0.0021], [0.0016, 0.0034, 0.0005], [0.0, 0.0015, 0.001],
    [0.0036, 0.0003, 0.0087], [0.0061, 0.0015, 0.0025], [0.0035, 0.0036, 0.0012], [0.0085, 0.0099, 0.0047],
]  # fmt: skip

# nodes, GPUs per node, batch, tp, dp, pp, mbs -> step s, reported GB, too large, stages
ROWS = [
    (8, 4, 32, 1, 1, 32, 1, 6.8192100525, 61.896484375, True,
     [21, 20, 21, 20, 20, 20, 22, 20, 20, 20, 20, 21, 19, 21, 20, 22, 18, 22, 20, 21, 18, 22, 20, 20, 19, 21, 20, 20,
      19, 21, 20, 14]),
    (8, 4, 32, 4, 1, 8, 2, 6.9001450539, 51.9921875, True, [89, 88, 80, 88, 88, 88, 80, 41]),
    (8, 4, 32, 4, 1, 8, 32, 7.513589859, 53.0374031067, True, [97, 80, 80, 80, 80, 80, 80, 65]),
    (8, 4, 32, 4, 4, 2, 2, 16.270410537719727, 175.3092803955078, True, [345, 297]),
    (8, 4, 32, 2, 4, 4, 2, 12.122578620910645, 180.2216796875, True, [169, 160, 168, 145]),
    (8, 4, 32, 1, 32, 1, 1, 27.591463088989258, 1461.2039794921875, True, [642]),
    (8, 8, 16, 4, 1, 16, 1, 3.6990110874, 28.359375, False,
     [41, 40, 40, 48, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 33]),
    (8, 8, 16, 4, 1, 16, 2, 3.8796031475, 28.359375, False,
     [41, 48, 40, 48, 40, 48, 40, 48, 40, 32, 40, 40, 40, 40, 40, 17]),
    (7, 8, 32, 4, 1, 14, 2, 5.1782393456, 36.859375, False, [49, 48, 48, 56, 48, 48, 48, 48, 48, 48, 48, 48, 48, 9]),
]  # fmt: skip


@pytest.mark.parametrize(("work", "on", "back", "micros", "end"), SCHEDULES)
def test_pipeline_ends_when_the_originals_does(
    work: list[float], on: list[float], back: list[float], micros: int, end: float
) -> None:
    assert max(stage_ends(work, on, back, micros)) == pytest.approx(end, rel=1e-12)


def test_partitions_of_the_original() -> None:
    e, c = np.array(CHAIN), np.array(SENDS)
    found = minmax(12, 4, lambda part: stage_seconds(part, e.astype(np.float32), c, 0))
    # The original undoes a step it never made and keeps the times from before.
    assert (found.counts, found.timed) == ([3, 4, 3, 2], [2, 4, 3, 3])
    assert dynamic(e, c, 4, 8, compat=True) == [2, 3, 3, 4]
    assert integer_program(e, c, 4, 8) == [1, 3, 4, 4]
    assert brute_force(e, 4) == [1, 4, 3, 4]
    assert even(642, 4) == [160, 161, 160, 161]


@pytest.mark.parametrize(("count", "per_node", "gbs", "tp", "dp", "pp", "mbs", "step", "memory", "oom", "stages"), ROWS)
def test_rows_of_the_original(
    count: int, per_node: int, gbs: int, tp: int, dp: int, pp: int, mbs: int, step: float, memory: float, oom: bool,
    stages: list[int],
) -> None:  # fmt: skip
    options = Options(find_model("llama70b"), "squad", 10334, gbs, per_node)
    every = jobs([find_gpu("A40")] * count, options, load_profiles())
    job = next(j for j in every if (j.tp, j.dp, j.pp, j.mbs) == (tp, dp, pp, mbs))
    row = price(job, options)
    assert row.counts == stages
    assert row.step == pytest.approx(step, rel=FLOAT32)
    assert (row.memory, row.is_oom) == (pytest.approx(memory, rel=1e-6), oom)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["search", "--compat", "fasop", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_ranked_table_of_the_original(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    found = run(capsys, "--gpus", "A40", "8", "--gbs", "32", "--dataset", "squad", "--csv", str(path))
    assert (found["configurations_considered"], found["feasible"]) == (59, 0)
    best = found["results"][0]  # type: ignore[index]
    assert (best["cost($)"], best["total_time(s)"], best["iterations"]) == (
        pytest.approx(39.7388405043, rel=FLOAT32), pytest.approx(2195.7856369019, rel=FLOAT32), 322)  # fmt: skip
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert ",".join(table[0]) == (
        "index,gbs,mbs,tp,dp,pp,node_type,gpu_cluster,partition,partition_layers,step_time(s),throughput(samples/s),"
        "price_per_step($),is_oom,oom_gpumem(GB),iterations,total_time(s),total_time(h),cost($),rank"
    )
    assert [row["rank"] for row in table] == [str(i) for i in range(1, 60)]
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_pareto_over_subsets_and_its_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, plot, again = tmp_path / "p.csv", tmp_path / "p.svg", tmp_path / "again.svg"
    words = ["--gpus", "A40", "8", "--pareto", "--dataset", "squad", "--csv", str(table), "--make-pareto", str(plot)]
    found = run(capsys, *words)
    assert (found["configurations_considered"], found["feasible"]) == (482, 54)
    by_rank = {row["rank"]: row for row in found["results"]}  # type: ignore[union-attr,attr-defined]
    line = [by_rank[rank] for rank in found["pareto"]]  # type: ignore[attr-defined]
    for a, b in pairwise(line):
        assert a["cost($)"] < b["cost($)"] and a["throughput"] < b["throughput"]
    fitting = [row for row in by_rank.values() if not row["is_oom"]]
    for row in fitting:
        assert any(p["cost($)"] <= row["cost($)"] and p["throughput"] >= row["throughput"] for p in line)
    assert main(["pareto-plot", str(table), str(again)]) == 0
    assert plot.read_text().lstrip().startswith("<?xml") and again.stat().st_size > 1000
    assert [r[output.COST] for r in output.skyline(output.read_csv(table)) if not r["is_oom"]]


def test_json_lines_of_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example: 53 configurations of 4 nodes, the first one 9.85 s and too large."""
    main(["search", "--compat", "fasop", "--gpus", "A40", "4", "--gbs", "32", "--parsing"])
    meta, first, *rest = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert meta == {"type": "meta", "total_count": 53, "gbs": 32, "cluster": {"A40": 4}}
    assert (first["index"], first["tp"], first["dp"], first["pp"], len(rest)) == (1, 1, 1, 16, 52)
    assert first["step_time"] == pytest.approx(9.85014533996582, rel=FLOAT32)
    assert first["oom_gpumem"] == pytest.approx(104.48711395263672, rel=1e-6)
    assert first["partition"] == [41, 41, 42, 41, 40, 40, 40, 40, 40, 41, 40, 41, 40, 41, 40, 34]


def test_json_lines_in_a_file_are_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("old\n")
    main(["search", "--compat", "fasop", "--gpus", "A40", "4", "--gbs", "32", "--parsing-file", str(path)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 54 and lines[0]["type"] == "meta"


def test_the_originals_output_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, log = tmp_path / "a.csv", tmp_path / "a.log"
    small = ("--gpus", "A40", "8", "--gpu-per-node", "8", "--gbs", "32")
    words = ["search", "--compat", "fasop", *small, "--add-exp-name", "second", "--verbose"]
    assert main([*words, "--csv", str(table), "--log-file", str(log), "--make-pareto"]) == 0
    shown = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_second.csv", "a_second.log", "a_second.png"]
    written = (tmp_path / "a_second.log").read_text()
    assert sorted(written.splitlines()) == sorted((shown.out + shown.err).splitlines())
    main(
        ["search", "--compat", "fasop", "--only-make-pareto", str(tmp_path / "a_second.csv"), "--add-exp-name", "again"]
    )
    assert (tmp_path / "a_second_again.png").stat().st_size > 1000
    assert main([*words, "--no-save-csv"]) == 0
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ConfigError, match=r"--no-save-csv and --csv .* contradict"):
        main([*words, "--csv", str(table), "--no-save-csv"])
    with pytest.raises(ConfigError, match="--make-pareto has no place to write to"):
        main([*words, "--make-pareto"])


def test_verbose_traces_each_partition(capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", "--compat", "fasop", "--gpus", "A40", "4", "--gbs", "32", "--verbose"])
    trace = capsys.readouterr().err.splitlines()
    assert len(trace) == 53 and "imbal=19.94% b=2 | step=9.8501s" in trace[0]


def test_exhaustive_prices_what_is_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    monkeypatch.setattr("sys.stdin", StringIO("4 8 1 2\n"))
    found = run(capsys, "--gpus", "A40", "8", "--exhaustive")
    assert found["results"][0]["step_time_s"] == pytest.approx(6.9001450539, rel=FLOAT32)  # type: ignore[index]
    monkeypatch.setattr("sys.stdin", StringIO("3 8 1 2\n"))
    with pytest.raises(ConfigError, match="tp pp dp mbs"):
        main(["search", "--compat", "fasop", "--gpus", "A40", "8", "--exhaustive"])


def test_mixed_cluster_borrows_loudly_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", "--compat", "fasop", "--gpus", "A40", "3", "A100", "1", "--gbs", "8", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["borrowed_profiles"] == ["A100"]
    assert "no profile of llama70b on A100" in said.err
    with pytest.raises(ConfigError, match=r"no profile of llama70b on A100.*A40 \(tp 1, 2, 4, 8\)"):
        main(["search", "--compat", "fasop", "--gpus", "A40", "3", "A100", "1", "--gbs", "8", "--no-borrow"])


def test_corrected_ranks_what_fits_first(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus", "A40", "8", "--gbs", "32", "--gpu-per-node", "8", "--corrected"]
    rows = run(capsys, *words)["results"]
    flags = [row["is_oom"] for row in rows]  # type: ignore[attr-defined]
    assert flags == sorted(flags) and not flags[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "A41", "8"], "Did you mean 'A40'"),
        (["--gpus", "A40"], "pairs of a type"),
        (["--gpus", "A40", "8", "--dataset", "squat"], "Did you mean 'squad'"),
        (["--gpus", "A40", "8", "--model-type", "llama70"], "Did you mean 'llama70b'"),
        (["--gpus", "A100", "4"], "no profile of llama70b on A100"),
        (["--gpus", "A40", "8", "--profiles", "/nowhere"], "no such folder"),
    ],
)
def test_impossible_searches_say_why(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["search", "--compat", "fasop", *words])


def test_broken_profiles_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "llama70b_A40_1.npz", data=np.ones((2, 9)))
    with pytest.raises(ConfigError, match=r"llama70b_A40_1.npz: data is \(2, 9\)"):
        load_profiles(tmp_path)
    (tmp_path / "llama70b_A40_1.npz").write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match="not a profile"):
        load_profiles(tmp_path)


# ---- partitions against every partition -----------------------------------------------------------------------------


def every(n: int, stages: int) -> list[list[int]]:
    return [[b - a for a, b in pairwise((0, *cuts, n))] for cuts in combinations(range(1, n), stages - 1)]


@pytest.mark.parametrize("seed", range(6))
def test_dynamic_and_integer_program_are_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, stages, micros = 11, int(rng.integers(2, 6)), int(rng.integers(2, 9))
    e, c = rng.random(n), rng.random((n, stages - 1)) * 0.3

    def loads(part: list[int], out: bool) -> list[float]:
        edges = [0, *np.cumsum(part).tolist()]
        found = []
        for i, (a, b) in enumerate(pairwise(edges)):
            middle = 0 < i < stages - 1
            wait = (c[a - 1][i - 1] if i else 0) if out else (c[a][i - 1] if middle else 0)
            found.append(e[a:b].sum() + wait + (c[b - 1][i] if out and i < stages - 1 else 0))
        return found

    largest = min(max(loads(part, True)) for part in every(n, stages))
    assert max(loads(dynamic(e, c, stages, micros), True)) == pytest.approx(largest)
    whole = min((micros - 1) * max(loads(part, False)) + sum(loads(part, False)) for part in every(n, stages))
    answer = loads(integer_program(e, c, stages, micros), False)
    assert (micros - 1) * max(answer) + sum(answer) == pytest.approx(whole, rel=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_highs_alone_is_optimal(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the dynamic program's bisection everything is left to HiGHS."""
    from fms_parallel.planner.fasop import integer_program as module

    rng = np.random.default_rng(seed)
    e, c = rng.random(10), rng.random((10, 3)) * 0.5
    exact = integer_program(e, c, 4, 5)
    monkeypatch.setattr(module, "BISECTIONS", 0)
    chain = module._Chain(e, c, 4, 5)
    assert chain.objective(integer_program(e, c, 4, 5)) == pytest.approx(chain.objective(exact), rel=2e-4)


def test_one_micro_batch_minimises_the_sum() -> None:
    e, c = np.ones(6), np.zeros((6, 2))
    c[:, 0] = [9, 9, 1, 9, 9, 9]
    assert dynamic(e, c, 3, 1)[0] == 3
    assert sum(integer_program(e, c, 3, 1)) == 6


def test_chain_of_llama70b_in_32_stages_is_cut_by_every_exact_method(capsys: pytest.CaptureFixture[str]) -> None:
    steps = {}
    for method in ("dp", "ilp"):
        options = Options(find_model("llama70b"), "squad", 10334, 32, 4, method)
        job = next(
            j for j in jobs([find_gpu("A40")] * 8, options, load_profiles()) if (j.tp, j.pp, j.mbs) == (1, 32, 1)
        )
        row = price(job, options)
        assert sum(row.counts) == 642 and len(row.counts) == 32
        steps[method] = row.step
    assert max(steps.values()) < 6.82  # the original's minmax


def test_bruteforce_says_when_there_are_too_many() -> None:
    with pytest.raises(ConfigError, match="use --pp-partition-method dp"):
        brute_force(np.ones(642), 32)
