"""transformer-perf-estimates' own numbers, copied from runs of the unmodified original, to 1e-9."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.planner.cli import main
from fms_parallel.planner.tpe.layers import BLOCKS, Grid, timed
from fms_parallel.planner.tpe.search import candidates, search
from fms_parallel.planner.tpe.system import collective, find_model, find_system
from fms_parallel.planner.tpe.totals import Configurations, totals

EXACT = 1e-9

# strategy, model, system, NVLink domain, devices, batch, candidates, feasible, throughputs of the five best
SEARCHES = [
    ("1d", "gpt3_1T", "A100", 4, 2048, 4096, 1810, 77, [30.64085567382263, 30.5007136922228, 30.15542895189943]),
    ("1d", "gpt3_1T", "H200", 64, 4096, 4096, 4032, 540, [193.41101592987596, 192.506304871257]),
    ("1d", "gpt3_175B", "A100", 8, 1024, 1536, 2608, 528, [89.37295986910323, 89.26015308891274]),
    ("2d-seqp", "gpt3_175B", "A100", 4, 64, 256, 2546, 61, [6.137453072555048, 5.294656271652885]),
    ("2d-seqp", "vit_era5", "B200", 8, 1024, 4096, 17815, 1630, [20.95139258906251, 20.898897031702685]),
    ("2d-summa", "vit_era5", "A100", 4, 256, 64, 6772, 648, [0.4290296691908079, 0.41925921773639796]),
]

# strategy, model, system, domain, batch, (dp, tp1, tp2, pp, mbs, nb, nv1, nv2, nv_dp, nv_pp), t, mem, dp, pp, tp, t_mem
POINTS = [
    ("1d", "gpt3_1T", "A100", 4, 4096, (8, 8, 1, 32, 1, 1, 4, 1, 1, 1), 133.67772896431646, 78.69404672,
     0.604172839970319, 0.7720784457142857, 21.802516480000005, 1.0371051869657715),
    ("2d-summa", "vit_era5", "B200", 8, 256, (32, 4, 8, 1, 1, 16, 2, 4, 1, 1), 26.2543014807879, 80.12562335999999,
     0.0034491007428571426, 0, 17.110744038983974, 0.2029126580287434),
    ("2d-seqp", "gpt3_1T", "H200", 8, 1024, (4, 8, 2, 32, 2, 1, 4, 2, 1, 1), 14.091472732868496, 78.69355392,
     0.13155737981714324, 0.09714980571428572, 2.897940967619048, 0.012138388855007483),
]  # fmt: skip

# system, domain, kind, members, members in one domain, GB, seconds
COLLECTIVES = [
    ("A100", 4, "allgather", 2, 1, 10.0, 0.2857192857142857),
    ("A100", 4, "allgather", 2, 2, 0.1, 0.0002405952380952381),
    ("A100", 4, "allgather", 8, 1, 0.001, 8.5e-05),
    ("A100", 4, "allgather", 8, 4, 10.0, 0.12502),
    ("A100", 4, "allgather", 64, 2, 1e-06, 0.00023502812500000002),
]


@pytest.mark.parametrize(("strategy", "model", "system", "domain", "gpus", "batch", "tried", "fit", "best"), SEARCHES)
def test_search_finds_the_originals_best(
    strategy: str, model: str, system: str, domain: int, gpus: int, batch: int, tried: int, fit: int, best: list[float]
) -> None:
    found = search(find_model(model), find_system(system, domain), strategy, gpus, batch, 5)
    assert (found.considered, found.feasible) == (tried, fit)
    assert [row["throughput"] for row in found.rows()][: len(best)] == pytest.approx(best, rel=EXACT)


@pytest.mark.parametrize(
    ("strategy", "model", "system", "domain", "batch", "row", "t", "mem", "dp", "pp", "tp", "t_mem"), POINTS
)
def test_totals_of_fixed_configurations(
    strategy: str, model: str, system: str, domain: int, batch: int, row: tuple[int, ...], t: float, mem: float,
    dp: float, pp: float, tp: float, t_mem: float,
) -> None:  # fmt: skip
    one = Configurations(*(np.array([value]) for value in row))
    found = totals(find_model(model), find_system(system, domain), strategy, batch, one, compat=True)
    got = [float(x[0]) for x in (found.t, found.mem, found.t_dp_comm, found.t_pp_comm, found.t_tp_comm, found.t_mem)]
    assert got == pytest.approx([t, mem, dp, pp, tp, t_mem], rel=EXACT)


@pytest.mark.parametrize(("system", "domain", "kind", "n", "top", "size", "seconds"), COLLECTIVES)
def test_collectives(system: str, domain: int, kind: str, n: int, top: int, size: float, seconds: float) -> None:
    assert float(collective(find_system(system, domain), kind, size, n, top, True)) == pytest.approx(seconds, rel=EXACT)


def test_layers_of_summa() -> None:
    """vit_era5 on B200: tp1 4, tp2 8, 16 panels."""
    grid = Grid(*(np.array([value]) for value in (4, 8, 2, 4, 1, 16)))
    system = find_system("B200", 8)
    layers = {x.name: x for x in BLOCKS["2d-summa"](find_model("vit_era5"), system, grid, True)}
    assert float(layers["fusedla"].flops[1][0]) * 1e-12 == pytest.approx(16.664487204361063, rel=EXACT)
    assert float(layers["ln1"].buffer[0]) == pytest.approx(0.26244, rel=EXACT)
    assert float(timed(layers["fc2"], system, True, True).exchange[0]) == pytest.approx(0.01293216972741486, rel=EXACT)
    assert float(timed(layers["ln2"], system, True, True).memory[0]) == pytest.approx(0.00013822702477876106, rel=EXACT)


def test_blocks_computed_once_equal_blocks_computed_alone() -> None:
    model, system = find_model("gpt3_175B"), find_system("A100", 4)
    every = candidates(model, system, "2d-seqp", 64, 256)
    together = totals(model, system, "2d-seqp", 256, every, True)
    for row in np.random.default_rng(1).choice(len(every), 20, replace=False):
        alone = totals(model, system, "2d-seqp", 256, every.take(np.array([row])), True)
        assert (alone.t[0], alone.mem[0]) == (together.t[row], together.mem[row])


def test_placements_fill_the_domain() -> None:
    every = candidates(find_model("gpt3_1T"), find_system("A100", 4), "1d", 2048, 4096)
    assert set(np.unique(every.nv1 * every.nv2 * every.nv_dp * every.nv_pp)) == {4}
    assert (every.tp1 % every.nv1 == 0).all() and (every.dp % every.nv_dp == 0).all()


def test_corrections_change_what_they_name() -> None:
    system = find_system("A100", 4)
    assert float(collective(system, "allreduce", 1.0, 8, 1, False)) > 1.9 * float(
        collective(system, "allreduce", 1.0, 8, 1, True)
    )
    model = find_model("gpt3_1T")
    row = Configurations(*(np.array([v]) for v in (8, 8, 1, 32, 1, 1, 1, 1, 1, 4)))
    slow, fast = (float(totals(model, system, "1d", 4096, row, c).t_pp_comm[0]) for c in (False, True))
    # 7 of 31 links are slow, and the original takes them for free: research note 10.1
    assert slow > 3 * fast


def test_json_carries_the_promised_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        "vit_era5",
        "--system",
        "A100",
        "--nvlink-domain",
        "4",
        "--num-gpus",
        "256",
        "--global-batch",
        "64",
    ]
    main(["search", "--compat", "tpe", "--tensor-parallel", "2d-summa", *words, "--top", "3", "--json", "--layers"])
    found = json.loads(capsys.readouterr().out)
    assert (found["configurations_considered"], found["feasible"], len(found["results"])) == (6772, 648, 3)
    best = found["results"][0]
    assert {k: best[k] for k in ("dp", "tp", "tp1", "tp2", "pp", "mbs", "nb")} == {
        "dp": 4, "tp": 32, "tp1": 8, "tp2": 4, "pp": 2, "mbs": 1, "nb": 16}  # fmt: skip
    assert (best["t"], best["mem"]) == pytest.approx((149.1738324780901, 77.73696576), rel=EXACT)
    assert len(found["layers"]) == 14


def test_text_shows_the_best_and_the_corrections(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "gpt3_1T", "--system", "A100", "--num-gpus", "2048", "--global-batch", "4096", "--corrected"]
    main(["search", "--compat", "tpe", *words, "--layers"])
    out = capsys.readouterr().out
    assert "slow pipeline links" in out and "fusedla" in out and "1810 candidates" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--system", "A10", "--num-gpus", "8"], "Did you mean 'A100'"),
        (["--system", "A100", "--num-gpus", "64"], "smallest that works"),
        (["--system", "A100", "--num-gpus", "0"], "whole numbers"),
    ],
)
def test_impossible_searches_say_why(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["search", "--compat", "tpe", "--model", "gpt3_1T", "--global-batch", "4096", *words])


def test_unknown_compatibility_mode_is_named() -> None:
    with pytest.raises(ConfigError, match="Known: fasop, tpe"):
        main(["search", "--compat", "calculon"])
