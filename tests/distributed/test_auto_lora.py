"""Adapters of this library's models: loss, gradients and update of each layout against one process; files; merging.

What one process finds is held against merged weights and the chain rule in `tests/auto/test_lora.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.auto.lora import merge_lora
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.models import get_model, load_lora, save_hf, save_lora
from fms_parallel.modules.low_rank import LowRank, is_adapter
from tests.distributed.comparison import Case, check, shaken_model, together

EVERY = LowRank(("query", "key", "value", "out", "gate", "up", "down"), rank=3)
FUSED = LowRank(r".*\.(qkv|out|gate_up|down)", rank=3)
SMALL = {"width": 32, "layers": 2, "ffn_width": 48, "vocab_size": 64}
LLAMA: dict[str, Any] = {**SMALL, "kv_heads": 2, "adapters": EVERY}

CASES: list[Case] = [
    *(("llama", layout, LLAMA) for layout in ("tp=2", "tp=2,sp", "fsdp=2", "dp=2", "cp=2", "pp=2,microbatches=2")),
    ("llama", "tp=2,sp", {**SMALL, "kv_heads": 1, "adapters": EVERY}),
    ("llama", "tp=2,sp,tp_parts=attention", {**SMALL, "kv_heads": 2, "ffn_bias": True, "adapters": EVERY}),
    ("llama", "tp=2,sp", {**SMALL, "kv_heads": 1, "fused": True, "adapters": FUSED}),
    ("llama", "tp=2", {**SMALL, "fused": True, "attention_bias": True, "ffn_bias": True, "adapters": FUSED}),
    (
        "roberta",
        "tp=2,sp",
        {"layers": 2, "width": 32, "ffn_width": 48, "adapters": LowRank(("query", "value", "down"))},
    ),
    ("llama", "pp=2,tp=2,sp,microbatches=2", LLAMA),
    ("llama", "fsdp=2,tp=2,recompute=full", {**LLAMA, "fused": True, "adapters": FUSED}),
]
COMPARED = together(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{len(case[2])}")
def test_adapters_in_every_layout_equal_one_process(case: Case) -> None:
    reports = COMPARED(*case)
    check(reports)
    blocks, factors = case[2]["layers"], {EVERY: 14, FUSED: 8}.get(case[2]["adapters"], 6)
    assert all(report.tensors == blocks * factors for report in reports)  # gradients of adapters and of nothing else


def filled(layout: str | None, fields: dict[str, Any]) -> Any:
    return shaken_model("llama", distributed_strategy=layout, data_type="fp64", **fields).eval()


def ids() -> Tensor:
    return torch.arange(24).remainder(64).view(2, 12)


def written_and_read(folder: str, fields: dict[str, Any]) -> tuple[float, float]:
    """How far apart logits are after loading the adapters into a new model, and after merging those."""
    model = filled("tp=2,sp", fields)
    with torch.no_grad():
        wanted = model(ids())
        save_lora(model, folder)
        other = get_model("llama", "micro", seed=5, distributed_strategy="fsdp=2", data_type="fp64", **fields)
        plain = {name: p for name, p in filled("fsdp=2", fields).named_parameters() if "_lora_" not in name}
        for name, parameter in other.named_parameters():
            if name in plain:
                parameter.copy_(plain[name])
        load_lora(other, folder)
        found = other.eval()(ids())
        merge_lora(model)
        merged = model(ids())
        save_hf(model, f"{folder}/merged")
        merge_lora(other)
        torch.testing.assert_close(other(ids()), wanted, rtol=1e-11, atol=1e-13)
        assert not [name for each in (model, other) for name, _ in each.named_parameters() if is_adapter(name)]
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / scale, float((merged - wanted).abs().max()) / scale


@pytest.mark.parametrize("fused", [False, True])
def test_files_are_pefts_and_merged_weights_are_transformers(fused: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    fields = {**SMALL, "kv_heads": 2, "fused": fused, "adapters": FUSED if fused else EVERY}
    for loaded, merged in run_ranks(written_and_read, 2, str(tmp_path), fields):
        assert loaded <= 1e-12 and merged <= 1e-12
    alone = filled(None, fields)
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    torch.testing.assert_close(whole(ids()).logits, alone(ids()), rtol=1e-5, atol=1e-5)  # its norms are fp32
    # peft's rule: base weight + alpha / r * B A of the module that the key names.
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 7
    base = filled(None, fields)
    for name, parameter in base.named_parameters():
        if name.endswith("_lora_b.weight"):
            parameter.data.zero_()
    save_hf(base, tmp_path / "base")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    for key, second in stored.items():
        if key.endswith("lora_B.weight"):
            module = plain.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
            module.weight.data += 16 / 3 * second @ stored[key.replace("lora_B", "lora_A")]
    torch.testing.assert_close(plain(ids()).logits, alone(ids()), rtol=1e-5, atol=1e-5)  # its norms are fp32
