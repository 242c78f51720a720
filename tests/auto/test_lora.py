"""Adapters in one process: gradients of this library's models by the chain rule, and what cannot have adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fms_parallel.auto.lora import add_lora, merge_lora
from fms_parallel.errors import CheckpointError, ConfigError
from fms_parallel.inference.weights import prepare_for_decode
from fms_parallel.models import get_model, load_lora, save_lora
from fms_parallel.modules.low_rank import LowRank, is_adapter, matrix_of, without_adapters
from fms_parallel.training import TrainOptions, make_optimizer

SMALL: dict[str, Any] = {"width": 32, "layers": 2, "ffn_width": 48, "vocab_size": 64, "heads": 4, "kv_heads": 2}
TARGETS = r".*\.(query|key|value|out|gate|up|down|qkv|gate_up)"


def adapted(**fields: Any) -> nn.Module:
    """With adapters that do something."""
    wanted = LowRank(TARGETS, rank=3, alpha=6.0)
    model = get_model("llama", "micro", data_type="fp64", seed=2, adapters=wanted, **SMALL, **fields)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.arange(2 * 12).mul(7).remainder(64).view(2, 12)
    logits: Tensor = model(ids)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_merged_weights_by_the_chain_rule(fused: bool) -> None:
    """W' = W + s B A, so dB = s dW' A^T and dA = s B^T dW'."""
    model = adapted(fused=fused)
    loss = loss_of(model)
    loss.backward()
    plain = get_model("llama", "micro", data_type="fp64", seed=2, fused=fused, **SMALL)
    factors = {name: parameter.detach() for name, parameter in model.named_parameters() if is_adapter(name)}
    assert len(factors) == 2 * 2 * (4 if fused else 7)
    pairs = {matrix_of(a): (a, a.replace("_lora_a", "_lora_b")) for a in factors if "_lora_a" in a}
    with torch.no_grad():
        for matrix, (a, b) in pairs.items():
            plain.get_parameter(str(matrix)).add_(2.0 * factors[b] @ factors[a])
    wanted = loss_of(plain)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for matrix, (a, b) in pairs.items():
        whole = plain.get_parameter(str(matrix)).grad
        assert whole is not None
        rows, second = whole.flatten(0, -2), factors[b].flatten(0, -2)
        for name, should in ((a, 2.0 * second.T @ rows), (b, (2.0 * rows @ factors[a].T).view(factors[b].shape))):
            torch.testing.assert_close(model.get_parameter(name).grad, should, rtol=1e-9, atol=1e-13)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not is_adapter(name))


def test_adapters_begin_where_the_model_is_and_change_no_other_value() -> None:
    wanted = LowRank(TARGETS)
    model = get_model("llama", "micro", data_type="fp64", seed=2, adapters=wanted, **SMALL)
    plain = get_model("llama", "micro", data_type="fp64", seed=2, **SMALL)
    assert torch.equal(loss_of(model), loss_of(plain))
    with without_adapters(model):
        assert list(model.state_dict()) == list(plain.state_dict())
    assert all(bool(p.any()) for name, p in model.named_parameters() if name.endswith("_lora_a.weight"))
    add_lora(plain, TARGETS)  # in memory: the same as on the meta device
    assert list(plain.state_dict()) == list(model.state_dict()) and torch.equal(loss_of(model), loss_of(plain))


def test_merging_changes_weights_and_no_result() -> None:
    model = adapted(fused=True)
    with torch.no_grad():
        before, weight = loss_of(model), model.get_parameter("layers.0.attention.qkv.weight").clone()
        merge_lora(model)
        torch.testing.assert_close(loss_of(model), before, rtol=1e-12, atol=0)
    assert not torch.equal(weight, model.get_parameter("layers.0.attention.qkv.weight"))


def test_merging_leaves_the_model_without_adapters(tmp_path: Path) -> None:
    model = adapted(fused=True)
    merge_lora(model)
    plain = get_model("llama", "micro", fused=True, **SMALL)
    assert list(model.state_dict()) == list(plain.state_dict()) == list(model.parallel.names)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="adapters"):
        save_lora(model, tmp_path)
    with torch.no_grad(), prepare_for_decode(model, 1):
        loss_of(model)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        make_optimizer(model, TrainOptions())


def test_merging_into_called_layers_leaves_no_hook() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).train()
    names, x = list(model.state_dict()), torch.randn(2, 5, 8)
    before = model(x)
    add_lora(model, ["linear1"], rank=2)
    nn.init.normal_(model.get_parameter("linear1_lora_b.weight"))
    wanted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), wanted)
    assert not torch.equal(wanted, before)
    assert list(model.state_dict()) == names and not model.linear1._forward_hooks


def changed(tensors: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    prefix = "base_model.model.model.layers.0.self_attn."
    if case == "apart":
        tensors[f"{prefix}v_proj.lora_A.weight"] += 1
    elif case == "missing":
        del tensors[f"{prefix}v_proj.lora_B.weight"]
    elif case == "extra":
        tensors["base_model.model.model.layers.2.self_attn.o_proj.lora_A.weight"] = torch.zeros(3, 32)
    elif case == "rank":
        tensors = {k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in tensors.items()}
    return tensors


WRONG_FILES = {
    "apart": r"layers\.0\.attention\.qkv_lora_a\.weight: the matrices that are one here .* fused=False",
    "missing": r"keys are missing .*attention\.value\.weight",
    "extra": r"layers\.2\.self_attn\.o_proj\.lora_A",
    "rank": r"qkv_lora_a\.weight \(\[2, 32\], the model has \[3, 32\]\)",
}


def test_adapters_come_back_from_files_and_files_of_others_are_refused(tmp_path: Path) -> None:
    model = adapted(fused=True)
    save_lora(model, tmp_path)
    other = get_model(
        "llama", "micro", data_type="fp64", seed=2, adapters=LowRank(TARGETS, 3, 6.0), fused=True, **SMALL
    )
    assert not torch.equal(loss_of(other), loss_of(model))
    load_lora(other, tmp_path)
    assert torch.equal(loss_of(other), loss_of(model))
    file = tmp_path / "adapter_model.safetensors"
    for case, words in WRONG_FILES.items():
        save_lora(model, tmp_path)
        save_file(changed(load_file(file), case), file)
        with pytest.raises(CheckpointError, match=words):
            load_lora(other, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "targets", "words"),
    [
        ("llama", ["head"], "head is a Head: adapters go to linear layers"),
        ("roberta_classification", ["dense"], r"\w+ uses its children's weights without calling them"),
    ],
)
def test_matrices_that_nobody_would_adapt_are_refused_and_stay_as_they_were(
    architecture: str, targets: Any, words: str
) -> None:
    model = get_model(architecture, "micro", layers=1)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=words):
        add_lora(model, targets)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_what_matches_nothing_or_is_no_matrix_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    for targets, words in ((["nowhere"], "match no module"), (["0"], "is a Embedding: adapters go to linear layers")):
        with pytest.raises(ConfigError, match=words):
            add_lora(model, targets)
    with pytest.raises(ConfigError, match="such weights pass no gradient on"):
        get_model("llama", "micro", linear_type="int8", adapters=LowRank(["query"]), **SMALL)
