"""Scores against hand-made errors, reading of every published form, fitting on made-up truth, and the scored tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.planner.cli import main
from fms_parallel.planner.efficiency import DEFAULT
from fms_parallel.planner.fitting import fit, spread
from fms_parallel.planner.hardware import load_devices
from fms_parallel.planner.measured import Case, gpt, read_measured
from fms_parallel.planner.scoring import Predictor, Score

# Measured by VIA-Research/vTrain (MIT): Megatron-LM, full recomputation, A100.
VTRAIN = """hidden layers heads gpus gbs mbs tp dp pp seq iter_ms
3072 30 32 64 512 8 1 64 1 2048 3566.5
3072 30 32 64 512 2 2 32 1 2048 4264.2
3072 30 32 64 512 4 8 8 1 2048 5618.0
6144 40 48 256 1024 2 8 32 1 2048 10453.3
8192 48 64 512 1536 2 8 32 2 2048 14614
8192 48 64 512 1536 12 8 8 8 2048 18000
12288 96 96 512 1536 2 8 8 8 2048 55110
12288 96 96 512 1536 6 4 4 32 2048 66632"""


def rows() -> list[dict[str, float]]:
    header, *lines = (line.split() for line in VTRAIN.splitlines())
    return [{k: float(v) if "." in v else int(v) for k, v in zip(header, line, strict=True)} for line in lines]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_score_of_known_errors() -> None:
    score = Score.of(np.array([1.1, 1.8, 3.0, 4.4]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert (score.n, score.mape, score.signed_median) == (4, pytest.approx(0.075), pytest.approx(0.05))
    assert score.spearman == pytest.approx(1)
    assert Score.of(np.array([3.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0])).spearman == pytest.approx(-np.sqrt(0.75))


def test_vtrain_rows_are_predicted_within_ten_percent_and_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "v.json", {"multi": rows()})
    assert main(["validate", "--measured", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == found["feasible"] == 8
    assert found["mape"] < 0.1
    assert found["tables"][0]["name"] == "multi"


# torchtitan's benchmarks/llama3_h100_202412_torchtitan.md
TITAN = {
    "id": "torchtitan/x",
    "hardware": "H100 96GB HBM2e (2.4 TB/s)",
    "seq": 8192,
    "tables": [
        {
            "caption": "1D Parallelism (FSDP). Llama 3.1 8B model. 8 GPUs. Local batch size 2, global batch size 16. "
            "Selective activation checkpointing.",
            "header": ["Techniques", "TPS/GPU", "Memory(GiB)"],
            "rows": [
                ["FSDP", "5,762", "82.4"],
                ["FSDP + torch.compile", "6,667", "77.0"],
                ["FSDP + torch.compile + Float8", "8,532", "76.8"],
            ],
        },
        {
            "caption": "3D parallelism (FSDP + TP + PP) + torch.compile + Float8 + AsyncTP. Llama 3.1 405B model. "
            "512 GPUs (FSDP 8, TP 8, PP8). Local batch size 32, global batch size 256. Full activation checkpointing.",
            "header": ["Schedule", "TPS/GPU", "Memory(GiB)"],
            "rows": [["1F1B", "100", "82.5"], ["Interleaved 1F1B", "128", "72.7"]],
        },
        {
            "caption": "4D parallelism (FSDP + TP + PP + CP) + torch.compile + Float8 + AsyncTP + 1F1B. Llama 3.1 405B "
            "model. 512 GPUs (TP 8, PP8). Local batch size 8. Full activation checkpointing.",
            "header": ["Parallelism", "Sequence Length", "TPS/GPU", "Memory(GiB)"],
            "rows": [["FSDP 8, CP 1", "32768", "76", "75.3"], ["FSDP 1, CP 8", "262144", "16", "84.9"]],
        },
    ],
}


def test_torchtitan_captions_become_layouts_and_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.json", {"tables": [TITAN]})
    tables = read_measured(path)
    assert [len(t.cases) for t in tables] == [3, 2, 2]
    first, pipeline = tables[0].cases[2], tables[1].cases[1]
    assert (first.precision, first.settings["fsdp"], first.settings["micro"], first.memory_gb) == ("fp8", 8, 2, 76.8)
    assert {k: pipeline.settings[k] for k in ("pp", "tp", "fsdp", "virtual")} == {
        "pp": 8,
        "tp": 8,
        "fsdp": 8,
        "virtual": 2,
    }
    assert pipeline.seconds == pytest.approx(256 * 8192 / 128 / 512)
    main(["validate", "--measured", str(path), "--json"])
    for table in json.loads(capsys.readouterr().out)["tables"]:
        assert table["mape"] < 0.15 and table["memory"]["mape"] < 0.07 and table["memory"]["p90"] < 0.085
        assert table["feasible"] == table["n"]


def test_table_of_gpt_models_leaves_unpublished_settings_open(tmp_path: Path) -> None:
    row = {"hidden": 8192, "layers": 48, "heads": 64, "tp": 8, "pp": 2, "dp": 32, "gpus": 512, "global_batch": 1536}
    entry = {
        "id": "m",
        "hardware": "A100",
        "recompute": "full",
        "schedule": "interleaved",
        "rows": [{**row, "tflops_per_gpu": 138}],
    }
    case = read_measured(write(tmp_path / "m.json", {"tables": [entry]}))[0].cases[0]
    assert case.unknown == {"micro": [1, 2, 4, 8, 16], "virtual": [1, 2, 3, 4, 6, 8]}
    assert case.seconds == pytest.approx(14.45, rel=2e-3)  # the paper's formula and rate


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"multi": [{"tp": 1}]}, "multi row 0: no 'dp'"),
        ({"rows": [{"op": "allgather"}]}, "rows row 0: no 'size'"),
        ({"note": "x"}, "neither rows nor tables"),
        ({"tables": [{"id": "q", "rows": [{"hidden": 64}]}]}, "q row 0: no 'heads'"),
    ],
)
def test_malformed_measurements_name_file_row_and_field(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_measured(write(tmp_path / "x.json", content))


def cases() -> list[Case]:
    found = []
    for layers in (8, 16):
        for tp, pp, dp in ((1, 1, 8), (2, 2, 2), (8, 1, 1), (1, 4, 2), (4, 2, 1)):
            for micro in (1, 4):
                settings = {"tp": tp, "pp": pp, "dp": dp, "micro": micro, "count": 4, "recompute": 2}
                found.append(
                    Case(
                        "",
                        gpt(1024, layers, 16, 1024),
                        "a100",
                        "megatron-2021",
                        "bf16",
                        1024,
                        4 * dp * micro,
                        settings,
                        1.0,
                    )
                )
    return found


def test_fit_recovers_the_constants_that_made_the_rows() -> None:
    predictor = Predictor({name: replace(d, constants={}) for name, d in load_devices().items()})
    truth = replace(DEFAULT, kernel_us=40.0, micro_us=3000.0, best=0.7)
    every = cases()
    seconds = replace(predictor, constants=truth).predict(every).seconds
    made = [replace(case, seconds=float(s)) for case, s in zip(every, seconds, strict=True)]
    chosen = spread(made, 12)
    assert len(set(chosen)) == 12
    fitted = fit(predictor, [made[i] for i in chosen])
    assert fitted.before > 0.3 and fitted.after < 0.02
    rest = [i for i in range(len(made)) if i not in chosen]
    error = replace(predictor, constants=fitted.constants).predict([made[i] for i in rest]).seconds / seconds[rest] - 1
    assert np.abs(error).max() < 0.05
    assert fitted.constants.kernel_us == pytest.approx(40, rel=0.15)


def test_rows_that_were_fitted_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "v.json", {"multi": rows()})
    main(["validate", "--measured", str(path), "--calibrate-rows", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["fitted_rows"]) == (5, 3)
    with pytest.raises(ConfigError, match="leaves none to score"):
        main(["validate", "--measured", str(path), "--calibrate-rows", "8"])
