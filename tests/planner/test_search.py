"""Searching against brute force, pins against their meaning, and what a search says when nothing works."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.models.build import get_shape
from fms_parallel.planner import Cluster, Workload, plan, search
from fms_parallel.planner.api import Planner, search_with
from fms_parallel.planner.cli import main
from fms_parallel.planner.columns import SCHEDULES, Columns
from fms_parallel.planner.space import Space, candidates, rejections

JOB = ["--model", "llama:3.1-8b", "--gpus", "h100:16", "--global-batch", "64", "--seq", "4096"]


def test_every_factorisation_is_there_once() -> None:
    columns = candidates(12, 24, Space(schedules=("1f1b",), recompute=("none",)))
    found = {tuple(row) for row in zip(columns.pp, columns.dp, columns.fsdp, columns.cp, columns.tp, columns.sp,
                                        columns.micro, strict=True)}  # fmt: skip
    assert len(found) == len(columns)
    expected = set()
    for pp, dp, fsdp, cp, tp in product(range(1, 13), repeat=5):
        if pp * dp * fsdp * cp * tp == 12 and 24 % (dp * fsdp) == 0:
            share = 24 // (dp * fsdp)
            expected |= {(pp, dp, fsdp, cp, tp, sp, m) for m in range(1, share + 1) if share % m == 0
                         for sp in ((0, 1) if tp > 1 else (0,))}  # fmt: skip
    assert found == expected


def test_best_of_search_is_best_of_brute_force() -> None:
    space = Space(schedules=("1f1b",), keep_gathered=(0,))
    workload = Workload(32, 2048)
    planner = Planner.of("llama:3.1-8b", "a100:8", workload)
    best = None
    columns = candidates(8, 32, space)
    for row in range(len(columns)):
        one = columns.take(np.array([row]))
        if any(mask[0] for mask in rejections(one, planner.model.shape, 2048, space).values()):
            continue
        costs = planner.costs.evaluate(one)
        if costs.memory.total[0] <= planner.cluster.device.memory_gb * 2**30:
            best = min(best or np.inf, float(costs.times.total[0]))
    found = plan("llama:3.1-8b", "a100:8", workload, space=space, top=3)
    assert found[0].step_time_s == pytest.approx(best, rel=1e-12)
    assert [e.step_time_s for e in found] == sorted(e.step_time_s for e in found)


def test_counts_add_up_and_results_are_real_layouts() -> None:
    result = search("llama:3.1-70b", Cluster.parse("h100:64"), Workload(256, 8192), top=20)
    assert result.considered == result.feasible + sum(result.rejected.values())
    for estimate in result.results:
        layout = estimate.layout
        assert ParallelLayout.parse(str(layout)) == layout
        assert layout.world_size == 64
        layout.validate(result.model.shape)
        replicas = layout.data_parallel
        assert replicas * estimate.micro_batch * estimate.micro_batches == 256
        assert estimate.memory_gb <= 80
        assert sum(estimate.breakdown.values()) == pytest.approx(estimate.step_time_s)
        assert sum(estimate.memory_breakdown.values()) == pytest.approx(estimate.memory_gb)


def test_estimate_of_a_found_layout_is_what_the_search_said() -> None:
    workload = Workload(64, 4096)
    for estimate in plan("llama:3.1-8b", "h100:16", workload, top=15):
        again = Planner.of("llama:3.1-8b", "h100:16", workload).estimate(estimate.layout, estimate.micro_batch)
        assert again.step_time_s == pytest.approx(estimate.step_time_s, rel=1e-9)
        assert again.memory_gb == pytest.approx(estimate.memory_gb, rel=1e-9)


@pytest.mark.parametrize(
    ("pin", "holds"),
    [
        ("tp<=2", lambda c: (c.tp <= 2).all()),
        ("pp=4", lambda c: (c.pp == 4).all()),
        ("fsdp!=1", lambda c: (c.fsdp != 1).all()),
        ("recompute=full", lambda c: (c.recompute == 2).all()),
        ("schedule=zbv", lambda c: (c.schedule[c.pp > 1] == 5).all()),
        ("micro_batch>=2", lambda c: (c.micro >= 2).all()),
        ("tp_parts=attention", lambda c: ((c.tp_parts == 1) & (c.sp == 1)).all()),
        ("tp_parts=all", lambda c: (c.tp_parts == 0).all()),
    ],
)
def test_pins_hold(pin: str, holds: object) -> None:
    space = Space(pins=(pin,))
    columns = candidates(16, 64, space)
    mask = rejections(columns, Planner.of("llama:3.1-8b", "h100:16", Workload(64, 2048)).model.shape, 2048, space)[
        f"pin {pin}"
    ]
    kept = columns.take(~mask)
    assert len(kept) and holds(kept)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("pin", "words"),
    [
        ("virtal<=2", "Did you mean 'virtual'"),
        ("tp=x", "whole number"),
        ("tp", "tp<=8"),
        ("schedule=1f", "Did you mean '1f1b'"),
        ("tp_parts=attn", "Did you mean 'attention'"),
    ],
)
def test_wrong_pins_are_named(pin: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search("llama:3.1-8b", "h100:8", Workload(8, 2048), space=Space(pins=(pin,)))


def test_excluded_axes_and_words_do_not_appear() -> None:
    found = plan("llama:3.1-8b", "h100:16", Workload(64, 2048), space=Space(exclude=("tp", "cp", "full")), top=50)
    assert found and all(e.layout.tp == e.layout.cp == 1 and e.layout.recompute != "full" for e in found)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["search", *words]) == 0
    return capsys.readouterr().out


def test_json_has_the_promised_words(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, *JOB, "--top", "3", "--json"))
    assert {"configurations_considered", "feasible", "seconds", "results"} <= found.keys()
    assert len(found["results"]) == 3
    for entry in found["results"]:
        assert {"layout", "step_time_s", "memory_gb", "throughput", "breakdown"} <= entry.keys()
        assert entry["throughput"] == pytest.approx(64 / entry["step_time_s"])


def test_table_shows_layouts_reasons_and_the_line_that_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *JOB)
    assert "torchrun --nnodes=2 --nproc_per_node=8" in out and "--distributed" in out
    assert "does not fit in memory" in out
    assert "MFU" in out and "activations" in out


def test_flags_of_the_readme_together(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pin", "tp<=4", "fsdp>=2", "--max-micro-batch", "2", "--exclude", "pp", "cp", "--top", "50", "--json"]
    found = json.loads(run(capsys, *JOB, *words))["results"]
    assert found
    for entry in found:
        layout = ParallelLayout.parse(entry["layout"])
        assert layout.tp <= 4 and layout.fsdp >= 2 and layout.pp == layout.cp == 1 and entry["micro_batch"] <= 2


def test_deadline_and_budget_reject_what_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads(run(capsys, *JOB, "--json"))["results"][0]
    hours = best["step_time_s"] * 1.1 * 1000 / 3600
    found = json.loads(run(capsys, *JOB, "--json", "--steps", "1000", "--deadline", str(hours), "--top", "99"))
    assert found["results"] and all(r["step_time_s"] <= best["step_time_s"] * 1.1 for r in found["results"])
    with pytest.raises(ConfigError, match="smallest that works"):
        main(["search", *JOB, "--steps", "1000", "--deadline", str(hours / 1.5)])
    with pytest.raises(ConfigError, match="--steps"):
        main(["search", *JOB, "--budget", "5"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llama:3.1-70b", "--gpus", "h100:2", "--global-batch", "8"], "h100:16 .*smallest"),
        (["--model", "llama:3.1-7b", "--gpus", "h100:2", "--global-batch", "8"], "Did you mean 'llama:3.1-70b'"),
        (["--model", "gpt3", "--gpus", "h100:8", "--global-batch", "3", "--exclude", "tp", "--exclude", "pp",
          "--exclude", "cp"], "multiple of the replicas, as 8"),
        (["--gpus", "h100:8", "--global-batch", "3"], "--model is needed"),
    ],
)  # fmt: skip
def test_impossible_jobs_say_what_would_work(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["search", *words])


def test_help_needs_neither_torch_nor_numpy() -> None:
    code = "import sys\nfrom fms_parallel.planner import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_planning_never_imports_torch() -> None:
    code = "import sys\nfrom fms_parallel.planner.cli import main\n"
    code += f"main(['search', *{JOB!r}])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_layout_columns_round_trip() -> None:
    layout = ParallelLayout.parse("pp=2,fsdp=2,tp=2,sp,tp_parts=attention,microbatches=4,recompute=full,precision=bf16")
    assert Columns.of_layout(layout, 64).layout(0, "bf16") == layout


def test_every_layout_of_a_ranking_is_one_that_the_layouts_own_rules_allow() -> None:
    for name, gpus, batch in (("llama:3.1-8b", "a100:16", 48), ("llama:3.2-1b", "h100:12", 24)):
        planner = Planner.of(name, gpus, Workload(batch, 2048))
        everything = Space(schedules=tuple(SCHEDULES), recompute=("none", "selective", "full", "every=3"))
        results = search_with(planner, everything, 4000).results
        assert len(results) > 1000
        assert len({e.layout.schedule for e in results}) == len(SCHEDULES)
        for estimate in results:
            estimate.layout.validate(planner.model.shape)


def test_feed_forwards_are_left_whole_where_that_is_faster_and_fits_and_nowhere_else() -> None:
    """Long rows, of which there are too few for replicas: each layout is weighed against itself without the word."""
    for sequence, proposed in ((131072, True), (4096, False)):
        planner = Planner.of("llama:3.2-1b", "h100:8", Workload(1, sequence))
        results = search_with(planner, Space(), 50).results
        whole = [estimate for estimate in results if estimate.layout.tp_parts == "attention"]
        assert bool(whole) == proposed
        assert not proposed or results[0] is whole[0]
        for estimate in whole:
            without = planner.estimate(replace(estimate.layout, tp_parts="all"), estimate.micro_batch)
            assert estimate.step_time_s < without.step_time_s
            assert estimate.memory_gb <= planner.cluster.device.memory_gb
        assert all(e.layout.tp_parts == "all" for e in search_with(planner, Space(exclude=("attention",)), 50).results)


def test_experts_are_never_left_whole() -> None:
    planner = Planner.of("mixtral:8x7b", "h100:64", Workload(8, 131072))
    assert all(estimate.layout.tp_parts == "all" for estimate in search_with(planner, Space(), 200).results)
    with pytest.raises(LayoutError, match=r"tp_parts=attention with 8 experts: .* drop it"):
        planner.estimate(ParallelLayout.parse("fsdp=8,tp=8,sp,tp_parts=attention"))
    with pytest.raises(LayoutError, match="tp_parts=attention with 8 experts"):
        ParallelLayout.parse("tp=8,sp,tp_parts=attention").validate(get_shape("mixtral", "8x7b"))
