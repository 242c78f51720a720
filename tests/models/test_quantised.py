"""`get_model(linear_type=...)`: the same numbers as quantising the whole model, from a seed or any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fms_parallel.checkpoint.training_state import save_training_state
from fms_parallel.data.feed import Batch
from fms_parallel.errors import CheckpointError, ConfigError, LayoutError, TrainingError
from fms_parallel.inference import generate
from fms_parallel.models import get_model
from fms_parallel.models.build import save_hf
from fms_parallel.modules.linear_types import SCALE, quantise, stored_parameters
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import train_step

TINY: dict[str, Any] = {"vocab_size": 53, "width": 32, "layers": 2, "heads": 4, "ffn_width": 40, "max_positions": 64}
IDS = torch.arange(24).view(2, 12) * 7 % 53


def build(architecture: str = "llama", **options: Any) -> nn.Module:
    return get_model(architecture, None, **{**TINY, **options})


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("config", [{}, {"tied": True}, {"fused": True}, {"kv_heads": 1, "attention_bias": True}])
@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
def test_built_quantised_equals_built_and_quantised(config: dict[str, Any], data_type: str) -> None:
    plain = build(data_type=data_type, **config)
    want = quantise(plain, "int8")
    if data_type == "bf16":
        want = want.to(torch.bfloat16)  # scales lose nothing by it
    same(build(data_type=data_type, linear_type="int8", **config), want)


@pytest.mark.parametrize("tied", [False, True])
def test_read_quantised_equals_read_and_quantised(tmp_path: Path, tied: bool) -> None:
    save_hf(build(tied=tied, seed=3), tmp_path)
    read = {"model_path": tmp_path, "source": "hf", "tied": tied}
    same(build(linear_type="int8", **read), quantise(build(**read), "int8"))
    loaded = get_model("hf_pretrained", None, tmp_path, "hf", linear_type="int8")
    same(loaded, quantise(build(**read), "int8"))


def test_skipped_modules_are_read_as_they_are(tmp_path: Path) -> None:
    save_hf(build(seed=3), tmp_path)
    model = build(model_path=tmp_path, source="hf", linear_type="int8", linear_skip=("head", "layers.1"))
    assert {name for name, _ in stored_parameters(model)} == {
        f"layers.0.{name}.weight"
        for name in (
            *("attention.query", "attention.key", "attention.value", "attention.out"),
            *("feed_forward.gate", "feed_forward.up", "feed_forward.down"),
        )
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt_bigcode", "qwen3", "mistral", "granite", "mixtral"])
def test_error_of_the_logits_follows_from_that_of_the_weights(architecture: str) -> None:
    """Rounding errors are independent, so the matrices between a token and its logits add theirs in quadrature."""
    fields = {name: TINY[name] for name in ("vocab_size", "width", "layers", "heads", "ffn_width", "max_positions")}
    plain, rounded = (get_model(architecture, None, seed=1, **fields) for _ in range(2))
    quantise(rounded, "int8")
    worst = 0.0
    for name, kind in stored_parameters(rounded):
        weight = plain.get_parameter(name).detach()
        values, scale = rounded.get_parameter(name), rounded.get_parameter(name + SCALE)
        worst = max(worst, float((kind.dense(values, scale, torch.float32) - weight).norm() / weight.norm()))
    assert 0.001 < worst < 0.02  # scale / sqrt(12), of rows whose largest weight is two to four deviations
    with torch.no_grad():
        want, got = plain(IDS), rounded(IDS)
    matrices = 4 * TINY["layers"] + 1  # along one path: value and out, up and down of each layer, and the head
    error = float((got - want).norm() / want.norm())
    assert 0 < error < 2 * worst * matrices**0.5
    divergence = F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean") / 12
    assert -1e-6 < divergence < (error * float(want.abs().max())) ** 2


def test_generation_runs_and_names_of_other_parameters_stay() -> None:
    model = build(linear_type="int8")
    assert {n for n in model.state_dict() if not n.endswith("weight_scale")} == set(build().state_dict())
    assert len(generate(model, [[1, 2, 3], [4]], max_new_tokens=4)[0]) == 4


def test_an_unknown_word_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown linear type 'int4'.*Known: int8"):
        build(linear_type="int4")
    with pytest.raises(ConfigError, match="without linear_type has nothing to skip"):
        build(linear_skip=("head",))
    with pytest.raises(ConfigError, match="would not be rounded"):
        build(linear_type="int8", fill=lambda model: None)


def test_training_is_refused() -> None:
    model = build(linear_type="int8")
    optimizer = make_optimizer(model, TrainOptions())
    with pytest.raises(TrainingError, match="quantise afterwards"):
        train_step(model, optimizer, [Batch(IDS, IDS)])


@pytest.mark.parametrize("layout", ["fsdp=2", "dp=2", "cp=2"])
def test_layouts_of_gradients_are_refused(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(LayoutError, match="int8 weights take no gradients"):
        build(linear_type="int8", distributed_strategy=layout)


def test_saving_is_refused(tmp_path: Path) -> None:
    model = build(linear_type="int8")
    with pytest.raises(CheckpointError, match=r"attention.query is stored as int8, which is rounded: keep the checkp"):
        save_hf(model, tmp_path)
    optimizer = make_optimizer(model, TrainOptions())
    with pytest.raises(CheckpointError, match="is rounded"):
        save_training_state(tmp_path, step=1, model=model, optimizer=optimizer, numbers={})
