"""LLaMA against transformers at the same weights: logits, every gradient, both ways of writing a checkpoint."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.models import get_config, get_model, list_variants, save_hf
from fms_parallel.models.llama import LLaMAConfig, config_from_hf, config_to_hf, hf_adapter
from tests.models.parity import config_words

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "odd": {"vocab_size": 61, "intermediate_size": 43},
    "gelu": {"hidden_act": "gelu"},
    "llama3 rope beyond its original length": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "yarn rope": {"rope_parameters": {**LLAMA3, "rope_type": "yarn"} | {"beta_fast": 32.0, "beta_slow": 1.0}},
}
for name in ("low_freq_factor", "high_freq_factor"):
    KINDS["yarn rope"]["rope_parameters"].pop(name)


def theirs(folder: Path, **options: Any) -> nn.Module:
    """A transformers model with no constant parameter, saved to `folder`."""
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY | config_words(options))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model.eval()


def ours(folder: Path, **overrides: Any) -> nn.Module:
    """The model that the folder describes, with its weights."""
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return get_model("llama", "micro", folder, "hf", **(values | overrides)).eval()


def loss_gradients(model: nn.Module, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(one: Tensor, other: Tensor, scale: float = 0.0) -> float:
    return float((one - other).abs().max()) / max(float(other.abs().max()), scale)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_match_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    reference = theirs(tmp_path, **KINDS[kind])
    model = ours(tmp_path, fused=fused)
    ids = torch.randint(61, (2, 100))  # three times the original length of the scaled ropes
    with torch.no_grad():
        assert relative(model(ids), reference(ids).logits) <= 1e-5
    expected = loss_gradients(reference, ids, labels := torch.randint(61, (2, 100)))
    found = loss_gradients(model, ids, labels)
    found = {name: grad.read_all() for name, grad in _as_hf(model, found).items()}
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        # A key's bias has no gradient in exact arithmetic: compared on the scale of the model.
        assert relative(found[name], grad, scale=1e-3 * largest) <= 1e-5, name


def _as_hf(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Any]:
    """Gradients under Hugging Face names: they are shaped like the weights, so the adapter maps them too."""
    from fms_parallel.checkpoint.lazy import MemoryTensor

    assert isinstance(model.config, LLaMAConfig)
    tensors = {name: MemoryTensor(grad) for name, grad in gradients.items()}
    if model.config.tied:
        tensors["head.weight"] = tensors["embedding.weight"]
    return hf_adapter(model.config).from_native(tensors)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_loads_in_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    reference = theirs(tmp_path / "theirs", **KINDS[kind])
    save_hf(ours(tmp_path / "theirs", fused=fused), tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(61, (2, 100))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)


def test_both_spellings_of_rope_are_one_config() -> None:
    base = {name: value for name, value in config_to_hf(get_config("llama", "3.1-8b")).items() if "rope" not in name}
    scaling = dict(get_config("llama", "3.1-8b").rope_options) | {"rope_type": "llama3"}
    four = config_from_hf({**base, "rope_theta": 500000.0, "rope_scaling": scaling})
    five = config_from_hf({**base, "rope_parameters": {"rope_theta": 500000.0, **scaling}})
    assert four == five
    assert four.rope_base == 500000.0 and four.rope_options["factor"] == 8.0


@pytest.mark.parametrize("variant", list_variants("llama"))
def test_config_survives_the_round_trip(variant: str) -> None:
    config = get_config("llama", variant, dropout=0.0)
    again = config_from_hf(config_to_hf(config))
    assert again.shape() == config.shape()
    assert again.rotary == config.rotary and (again.tied, again.norm_eps) == (config.tied, config.norm_eps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"brand_new_switch": True}, "brand_new_switch=True"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "which?"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_act": "wiggle"}, "'wiggle'"),
    ],
)
def test_unsupported_fields_are_errors(change: dict[str, Any], words: str) -> None:
    raw = config_to_hf(get_config("llama", "micro"))
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")), torch.device("meta"):
        from fms_parallel.models.llama import LLaMA

        LLaMA(config_from_hf({**raw, **change}))


def test_weights_of_another_model_are_refused_by_its_config(tmp_path: Path) -> None:
    theirs(tmp_path, rope_parameters=LLAMA3)
    raw = json.loads((tmp_path / "config.json").read_text())
    config = config_from_hf(raw)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    with pytest.raises(ConfigError, match=r"rope_scaling: llama3 in the file, default asked for"):
        get_model("llama", "micro", tmp_path, **(values | {"rope_scaling": "default", "rope_options": {}}))


def test_too_many_positions_are_refused() -> None:
    model = get_model("llama", "micro", max_positions=8, layers=1)
    with pytest.raises(ConfigError, match=r"position 9 is beyond max_positions=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_layouts_that_cannot_be_are_refused_before_ranks_start() -> None:
    with pytest.raises(LayoutError, match=r"tp=3 .*4 heads.*\[1, 2, 4\]"):
        from fms_parallel.layout import ParallelLayout

        ParallelLayout.parse("tp=3").validate(get_config("llama", "micro").shape())
