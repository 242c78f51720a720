"""The families built like LLaMA in every kind of layout: loss, gradients and updated weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.inference import generate
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model, save_hf
from fms_parallel.verify import TOLERANCE, Report, verify
from tests.poison import poisoned_memory

# Odd on purpose: 13 tokens, 97 ids and 63 features divide by nothing.
TINY: dict[str, Any] = {
    **{"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 63, "max_positions": 64},
}
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "mistral": [{"window": 5}],
    "qwen3": [{"head_width": 12, "tied": True}],
    "granite": [{"tied": True, "attention_bias": True, "dropout": 0.2}],
    "mixtral": [{"experts": 3, "std": 0.2}, {"experts": 4, "window": 5, "fused": True, "std": 0.2}],
}
LAYOUTS = ["tp=2", "tp=2,sp", "tp=4,sp,recompute=full", "fsdp=2", "dp=2", "fsdp=2,tp=2,sp"]
CASES = [(layout, name, config) for name, configs in FAMILIES.items() for config in configs for layout in LAYOUTS]
IDS = [f"{layout}-{name}-{'-'.join(config)}" for layout, name, config in CASES]


def shaken_model(family: str, **arguments: Any) -> nn.Module:
    """None of whose parameters is constant."""
    model = get_model(family, "micro", seed=5, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            ramp = torch.arange(parameter.numel(), dtype=parameter.dtype).remainder_(7).view(parameter.shape)
            local_tensor(parameter).add_(ramp.mul_(0.01)[local_box(parameter).slices])
    return model


def compare(layout: str, family: str, config: dict[str, Any], pieces: int) -> Report:
    """One rank of one case."""
    arguments: dict[str, Any] = {**TINY, **config, "family": family}
    with poisoned_memory():
        parsed = ParallelLayout.parse(layout)
        return verify(shaken_model, parsed, dtype="fp64", seq_len=13, grad_accum_steps=pieces, **arguments)


def ranks_of(layout: str) -> int:
    return ParallelLayout.parse(layout).world_size


@pytest.mark.parametrize(("layout", "family", "config"), CASES, ids=IDS)
def test_fp64_matches_one_process(layout: str, family: str, config: dict[str, Any]) -> None:
    reports = run_ranks(compare, ranks_of(layout), layout, family, config, 2 if ranks_of(layout) == 2 else 1)
    assert all(report.worst <= TOLERANCE["fp64"] for report in reports), reports[0]


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
