"""`hf_pretrained` and `hf_configured`: a folder's config.json says which model it is, and all of its fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import CheckpointError, ConfigError, FmsError
from fms_parallel.models import Architecture, get_config, get_model, list_models, save_hf
from fms_parallel.models.build import find_model
from fms_parallel.models.hf.pretrained import described
from fms_parallel.models.llama import LLaMAConfig, config_to_hf
from fms_parallel.models.registry import REGISTRY

SMALL: dict[str, Any] = {
    "width": 32,
    "layers": 1,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 48,
    "head_width": 12,
    "rope_base": 5e5,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with no field at its default."""
    save_hf(get_model("llama", "micro", seed=3, **SMALL, attention_bias=True, norm_eps=1e-3), tmp_path)
    return tmp_path


def test_pretrained_has_every_field_and_the_weights(folder: Path) -> None:
    model = get_model("hf_pretrained", model_path=folder)
    expected = get_model("llama", "micro", seed=3, **SMALL, attention_bias=True, norm_eps=1e-3)
    assert model.architecture == "llama"
    assert isinstance(model.config, LLaMAConfig) and isinstance(expected.config, LLaMAConfig)
    assert config_to_hf(model.config) == config_to_hf(expected.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_file_is_described_by_the_config_beside_it(folder: Path) -> None:
    model = get_model("hf_pretrained", model_path=folder / "model.safetensors")
    assert torch.equal(model.head.weight, get_model("hf_pretrained", model_path=folder).head.weight)  # type: ignore[arg-type]


def test_configured_has_every_field_and_the_weights_of_the_seed(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = get_model("hf_configured", model_path=folder, seed=7)
    expected = get_model("llama", "micro", seed=7, **SMALL, attention_bias=True, norm_eps=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_fields_can_be_overridden_where_they_change_no_weight(folder: Path) -> None:
    assert get_model("hf_pretrained", model_path=folder, fused=True).config.fused
    assert get_config("hf_pretrained", model_path=folder, dropout=0.1).dropout == 0.1
    with pytest.raises(ConfigError, match=r"norm_eps: 0\.001 in the file, 0\.1 asked for"):
        get_model("hf_pretrained", model_path=folder, norm_eps=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, r"unknown model_type 'lama'\. Did you mean 'llama'\? Known: .*llama"),
        ({"model_type": None}, r"unknown model_type 'None'"),
        ({"new_switch": 3}, r"new_switch=3"),
    ],
)
def test_what_is_not_supported_is_named(folder: Path, change: dict[str, Any], words: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        get_model("hf_pretrained", model_path=folder)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("hf_pretrained",), {}, "give model_path"),
        (("hf_configured",), {}, "give model_path"),
        (("hf_pretrained", None, "/nowhere"), {}, "/nowhere/config.json: no such file"),
        (("hf_pretrained", "7b", "FOLDER"), {}, "has no variant '7b'"),
        (("hf_pretrained", None, "FOLDER"), {"layer": 2}, "no config field 'layer'. Did you mean 'layers'"),
    ],
)
def test_an_impossible_request_gets_a_sentence(
    folder: Path, arguments: tuple[Any, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(FmsError, match=words):
        get_model(*tuple(str(folder) if word == "FOLDER" else word for word in arguments), **options)  # type: ignore[arg-type]


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        get_model("hf_pretrained", model_path=folder)


def test_of_several_readers_of_one_type_the_class_decides(tmp_path: Path) -> None:
    def reader(name: str, *classes: str) -> Architecture:
        config = LLaMAConfig(vocab_size=len(name))
        return Architecture(
            name,
            lambda config: torch.nn.Linear(1, 1),
            {},
            from_hf=lambda raw: config,
            model_types=("both",),
            hf_classes=classes,
        )

    architectures = [reader("masked", "ForMaskedLM"), reader("classes", "ForClasses")]
    for classes, name in ((["ForClasses"], "classes"), (["ForMaskedLM"], "masked")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "both", "architectures": classes}))
        assert described(architectures, tmp_path)[0].name == name
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "both", "architectures": ["ForMusic"]}))
    with pytest.raises(ConfigError, match=r"unknown class in architectures 'ForMusic'.*Known: ForClasses, ForMaskedLM"):
        described(architectures, tmp_path)


BAD = (None, "x", -1, 0, [], {}, 1.5, True, float("nan"))


@pytest.mark.parametrize("architecture", [name for name in list_models() if REGISTRY.get(name).to_hf is not None])
def test_a_field_of_any_kind_is_read_or_refused(tmp_path: Path, architecture: str) -> None:
    """A file can hold anything; whatever it is, nothing but our own errors comes out."""
    to_hf = REGISTRY.get(architecture).to_hf
    assert to_hf is not None
    raw = to_hf(get_config(architecture, "micro", layers=1))
    refused = 0
    for name in raw:
        for value in BAD:
            (tmp_path / "config.json").write_text(json.dumps({**raw, name: value}))
            try:
                find_model("hf_configured", None, tmp_path, {})
            except FmsError:
                refused += 1
    assert refused > len(raw)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"layers": "two"}, r"layers='two' must be a whole number"),
        ({"width": 64.0}, r"width=64\.0 must be a whole number"),
        ({"layers": True}, r"layers=True must be a whole number"),
        ({"tied": 1}, r"tied=1 must be true or false"),
        ({"kv_heads": "4"}, r"\{'kv_heads': '4'\} is no config: unsupported operand"),
        ({"layers": 0}, r"layers=0 must be at least 1"),
        ({"std": -1.0}, r"std=-1\.0 must be at least 0"),
        ({"norm_eps": "1e-5"}, r"norm_eps='1e-5' must be a number"),
        ({"rope_options": {"factor": "8"}}, r"rope_options=.* must be Mapping"),
    ],
)
def test_overrides_of_the_wrong_kind_are_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_config("llama", "micro", **overrides)


def test_pseudo_architectures_are_not_listed() -> None:
    assert not {"hf_pretrained", "hf_configured"} & set(list_models())
