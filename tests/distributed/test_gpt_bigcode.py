"""GPT-BigCode in every layout: loss, gradients and updated weights of one process; tokens and checkpoints too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.inference import generate
from fms_parallel.models import get_model, save_hf
from tests.distributed.comparison import check, ranks_of, together

# Odd on purpose: 97 ids and 63 features divide by nothing.
TINY: dict[str, Any] = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "ffn_width": 63, "max_positions": 64}
MHA: dict[str, Any] = {"multi_query": False}
DROPS = {"dropout": 0.2, "embedding_dropout": 0.1, "attention_dropout": 0.3}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tp=2", {}),
    ("tp=2", {"fused": True}),
    ("tp=2,sp", {}),
    ("tp=2,sp", {"tied": False, **MHA}),
    ("tp=2,sp", {"fused": True, **MHA}),
    ("tp=2,sp", DROPS),
    ("tp=2,sp,recompute=full", {**DROPS, **MHA}),
    ("tp=2,sp,loss_parallel=off", {}),
    ("tp=2,sp,tp_parts=attention", DROPS),
    ("tp=4,sp", {}),
    ("tp=4,sp", {"fused": True}),
    ("fsdp=2", {"tied": False}),
    ("fsdp=2", DROPS),
    ("dp=2", DROPS),
    ("dp=2,fsdp=2", {}),
    ("dp=2,tp=2,sp", MHA),
    ("fsdp=2,tp=2,sp", {}),
    ("fsdp=2,tp=2,sp", {**DROPS, **MHA}),
    ("pp=2", {}),
    ("pp=2,schedule=gpipe,microbatches=4", {**DROPS, **MHA, "tied": False}),
    ("pp=2,tp=2,sp", DROPS),
    ("pp=2,tp=2,sp,tp_parts=attention", DROPS),
    ("fsdp=2,tp=2,sp,tp_parts=attention", {}),
    ("pp=2,fsdp=2", MHA),
    ("cp=2", DROPS),
    ("cp=2,cp_method=ulysses", MHA),
    ("cp=2,tp=2,sp", {}),
]
COMPARED = together([("gpt_bigcode", layout, TINY | config) for layout, config in CASES])


@pytest.mark.parametrize(("layout", "config"), CASES, ids=[f"{layout}-{'-'.join(config)}" for layout, config in CASES])
def test_fp64_matches_one_process(layout: str, config: dict[str, Any]) -> None:
    check(COMPARED("gpt_bigcode", layout, TINY | config))


def tokens(layout: str, folder: str) -> tuple[list[list[int]], bool]:
    """What a folder's model generates in a layout, and whether saving it again gives the same bytes."""
    model = get_model("hf_pretrained", model_path=folder, distributed_strategy=layout)
    again = Path(folder).parent / f"again-{layout}"
    save_hf(model, again)
    first, second = (next(path.glob("*.safetensors")).read_bytes() for path in (Path(folder), again))
    return generate(model, [[0, 5, 0, 7, 8], [11, 0], [0]], max_new_tokens=8), first == second


@pytest.mark.parametrize("config", [{}, MHA], ids=["mqa", "mha"])
@pytest.mark.parametrize("layout", ["tp=2", "tp=2,sp", "fsdp=2,tp=2,sp"])
def test_tokens_and_saved_files_are_those_of_one_process(layout: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = get_model("gpt_bigcode", "micro", seed=1, std=0.4, **(TINY | config))
    save_hf(model, tmp_path / "hf")
    expected = generate(model, [[0, 5, 0, 7, 8], [11, 0], [0]], max_new_tokens=8)
    for found, same in run_ranks(tokens, ranks_of(layout), layout, str(tmp_path / "hf")):
        assert found == expected and same
