"""RoBERTa and BERT in every layout, for every task: loss, gradients and updated weights of one process.

Layouts with pp and cp, and padded rows: test_encoder.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.models import get_model, save_hf
from tests.distributed.comparison import check, ranks_of, together

# Odd on purpose: 97 ids and 63 features divide by nothing. Random tokens are padding (1) now and then.
TINY: dict[str, Any] = {
    **{"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "ffn_width": 63, "max_positions": 64, "padding_id": 1},
    **{"dropout": 0.0, "attention_dropout": 0.0},
}
BERT: dict[str, Any] = {"positions": "bert", "token_types": 2}
DROPS = {"dropout": 0.2, "attention_dropout": 0.3}
CLASSES = {"classes": 3}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("roberta", "tp=2", {}),
    ("roberta", "tp=2", {"fused": True, "tied": False}),
    ("roberta", "tp=2,sp", {}),
    ("roberta", "tp=2,sp", BERT),
    ("roberta", "tp=2,sp", DROPS),
    ("roberta", "tp=2,sp,tp_parts=attention", DROPS),
    ("roberta", "tp=2,sp,recompute=full", DROPS),
    ("roberta", "tp=2,sp,loss_parallel=off", {}),
    ("roberta", "tp=4,sp", {"tied": False}),
    ("roberta", "fsdp=2", {}),
    ("roberta", "fsdp=2", {"tied": False, **DROPS}),
    ("roberta", "dp=2", DROPS),
    ("roberta", "dp=2,fsdp=2", BERT),
    ("roberta", "fsdp=2,tp=2,sp", {}),
    ("roberta", "fsdp=2,tp=2,sp", {"fused": True, **DROPS, **BERT}),
    ("roberta_classification", "tp=2", CLASSES),
    ("roberta_classification", "tp=2,sp", {**CLASSES, **DROPS}),
    ("roberta_classification", "tp=4,sp", {**CLASSES, **BERT}),
    ("roberta_classification", "fsdp=2", CLASSES),
    ("roberta_classification", "dp=2", {**CLASSES, **DROPS}),
    ("roberta_classification", "fsdp=2,tp=2,sp", {**CLASSES, **DROPS}),
    ("roberta_question_answering", "tp=2,sp", {}),
    ("roberta_question_answering", "tp=4,sp", {}),
    ("roberta_question_answering", "fsdp=2", BERT),
    ("roberta_question_answering", "dp=2", DROPS),
    ("roberta_question_answering", "fsdp=2,tp=2,sp", DROPS),
]
COMPARED = together([(architecture, layout, TINY | config) for architecture, layout, config in CASES])


@pytest.mark.parametrize(
    ("architecture", "layout", "config"), CASES, ids=[f"{name}-{layout}-{'-'.join(c)}" for name, layout, c in CASES]
)
def test_fp64_matches_one_process(architecture: str, layout: str, config: dict[str, Any]) -> None:
    check(COMPARED(architecture, layout, TINY | config))


def outputs(layout: str, folder: str, ids: Tensor) -> tuple[Tensor, bool]:
    """A folder's model in a layout: what it computes, and whether saving it again gives the same bytes."""
    model = get_model("hf_pretrained", model_path=folder, distributed_strategy=layout).eval()
    again = Path(folder).parent / f"again-{layout}"
    save_hf(model, again)
    first, second = (next(path.glob("*.safetensors")).read_bytes() for path in (Path(folder), again))
    with torch.no_grad():
        return model(ids), first == second


@pytest.mark.parametrize("architecture", ["roberta", "roberta_classification", "roberta_question_answering"])
@pytest.mark.parametrize("layout", ["tp=2,sp", "fsdp=2,tp=2,sp"])
def test_outputs_and_saved_files_are_those_of_one_process(layout: str, architecture: str, tmp_path: Path) -> None:
    model = get_model(architecture, "micro", seed=1, **TINY).eval()
    save_hf(model, tmp_path / "hf")
    ids = torch.randint(97, (3, 13))
    for found, same in run_ranks(outputs, ranks_of(layout), layout, str(tmp_path / "hf"), ids):
        torch.testing.assert_close(found, model(ids).detach(), rtol=1e-5, atol=1e-6)
        assert same
