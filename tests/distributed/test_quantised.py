"""int8 weights, and weights laid out for decoding, on several ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.inference import generate
from fms_parallel.inference.weights import prepare_for_decode
from fms_parallel.models import get_model
from fms_parallel.models.build import save_hf
from fms_parallel.modules.linear_types import quantise
from tests.inference.models import compiled_wins

TINY: dict[str, Any] = {"vocab_size": 53, "width": 32, "layers": 2, "heads": 4, "ffn_width": 37, "max_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain, odd F and V": {},
    "one kv head, biases, tied": {"kv_heads": 1, "attention_bias": True, "ffn_bias": True, "tied": True},
    "fused": {"fused": True, "kv_heads": 2},
    "experts": {"architecture": "mixtral", "kv_heads": 4, "experts": 3, "experts_used": 2},
}
IDS = torch.arange(24).view(2, 12) * 7 % 53
PROMPTS = [[1, 2, 3, 4], [5, 6]]


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "architecture"}


def build(config: dict[str, Any], **options: Any) -> nn.Module:
    return get_model(config.get("architecture", "llama"), None, std=0.3, **_fields({**TINY, **config, **options}))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, put together."""
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}


def answers(model: nn.Module) -> dict[str, Any]:
    with torch.inference_mode():
        logits = model(IDS)
    return {"logits": logits, "tokens": generate(model, PROMPTS, max_new_tokens=6), "weights": whole(model)}


def on_ranks(layout: str, folder: str | None) -> dict[str, Any]:
    """Config -> what this rank found: built quantised, quantised afterwards, and prepared for decoding."""
    found = {}
    for name, config in CONFIGS.items():
        read = {} if folder is None else {"model_path": f"{folder}/{name}", "source": "hf"}
        options = {"distributed_strategy": layout, **read}
        if ("tp=4" in layout and name == "fused") or ("tp_parts" in layout and name == "experts"):
            continue
        model = build(config, linear_type="int8", **options)
        later = quantise(build(config, **options), "int8")
        found[name] = {"built": answers(model), "later": whole(later)}
        with prepare_for_decode(model):
            found[name]["prepared"] = answers(model)
        plain = build(config, **options)
        with prepare_for_decode(plain):
            found[name]["plain"] = answers(plain)
        with compiled_wins(), prepare_for_decode(plain, compiled=True) as prepared:
            found[name]["compiled"] = answers(plain)
            found[name]["blocks"] = prepared.blocks
    return found


@pytest.mark.parametrize("layout", ["tp=2", "tp=2,sp", "tp=2,sp,tp_parts=attention", "tp=4"])
def test_ranks_agree_with_one_process(layout: str, tmp_path: Path) -> None:
    read = layout == "tp=2"  # from files; the others draw
    if read:
        for name, config in CONFIGS.items():
            save_hf(build(config), tmp_path / name)
    results = run_ranks(on_ranks, 4 if "4" in layout else 2, layout, str(tmp_path) if read else None)
    for name in results[0]:
        one, plain = answers(build(CONFIGS[name], linear_type="int8")), answers(build(CONFIGS[name]))
        for found in (result[name] for result in results):
            for weights in (found["built"]["weights"], found["later"], found["prepared"]["weights"]):
                assert weights.keys() == one["weights"].keys()
                assert all(torch.equal(tensor, one["weights"][key]) for key, tensor in weights.items()), name
            for answer, want in (
                (found["built"], one),
                (found["prepared"], one),
                (found["plain"], plain),
                (found["compiled"], plain),
            ):
                size = want["logits"].abs().max()
                assert (answer["logits"] - want["logits"]).abs().max() <= 1e-5 * size, name
                assert answer["tokens"] == want["tokens"], name
            (blocks,) = found["blocks"]
            if "sp" in layout:  # a block gathers and scatters its tokens
                assert "only sums over ranks" in blocks.reason
            else:
                assert (blocks.compiled is None) == (name == "experts")
