"""The families built like LLaMA in every kind of layout: loss, gradients and updated weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.inference import generate
from fms_parallel.models import get_model, save_hf
from tests.distributed.comparison import check, ranks_of, together

# Odd on purpose: 97 ids and 63 features divide by nothing.
TINY: dict[str, Any] = {
    **{"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 63, "max_positions": 64},
}
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "mistral": [{"window": 5}],
    "qwen3": [{"head_width": 12, "tied": True}],
    "granite": [{"tied": True, "attention_bias": True, "dropout": 0.2}],
    "mixtral": [{"experts": 3, "std": 0.2}, {"experts": 4, "window": 5, "fused": True, "std": 0.2}],
}
LAYOUTS = ["tp=2", "tp=2,sp", "tp=4,sp,recompute=full", "fsdp=2", "fsdp=2,tp=2,sp", "dp=2,pp=2", "cp=2"]
CASES = [(layout, name, config) for name, configs in FAMILIES.items() for config in configs for layout in LAYOUTS]
CASES += [(f"cp=2,cp_method={method}", "mistral", {"window": 5}) for method in ("allgather", "ulysses")]
IDS = [f"{layout}-{name}-{'-'.join(config)}" for layout, name, config in CASES]
COMPARED = together([(name, layout, {**TINY, **config}) for layout, name, config in CASES])


@pytest.mark.parametrize(("layout", "family", "config"), CASES, ids=IDS)
def test_fp64_matches_one_process(layout: str, family: str, config: dict[str, Any]) -> None:
    check(COMPARED(family, layout, {**TINY, **config}))


PROMPTS = [[3, 5, 1, 7, 8, 2, 9], [11, 4], [6]]


def tokens(layout: str, folder: str) -> tuple[list[list[int]], bool]:
    """What a folder's model generates in a layout, and whether saving it again gives the same bytes."""
    model = get_model("hf_pretrained", model_path=folder, distributed_strategy=layout)
    again = Path(folder).parent / f"again-{layout}"
    save_hf(model, again)
    first, second = (next(path.glob("*.safetensors")).read_bytes() for path in (Path(folder), again))
    return generate(model, PROMPTS, max_new_tokens=8), first == second


@pytest.mark.parametrize("layout", ["tp=2,sp", "fsdp=2,tp=2,sp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_saved_files_are_those_of_one_process(layout: str, family: str, tmp_path: Path) -> None:
    config = {**TINY, **FAMILIES[family][0], "std": 0.4, "dropout": 0.0}
    model = get_model(family, "micro", seed=1, **config)
    save_hf(model, tmp_path / "hf")
    expected = generate(model, PROMPTS, max_new_tokens=8)
    for found, same in run_ranks(tokens, ranks_of(layout), layout, str(tmp_path / "hf")):
        assert found == expected and same
