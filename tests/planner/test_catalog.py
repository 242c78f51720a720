"""Model shapes by name against the registered models, and files against the sizes written in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.models import get_shape, list_variants
from fms_parallel.planner import catalog
from fms_parallel.planner.catalog import find_model
from fms_parallel.planner.hardware import read_data


def test_own_list_agrees_with_the_registered_models() -> None:
    own = [name.split(":") for name in read_data("models.json") if name.startswith("llama:")]
    shared = [variant for _, variant in own if variant in list_variants("llama")]
    assert shared
    for variant in shared:
        assert find_model(f"llama:{variant}").shape == get_shape("llama", variant)


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt3", 174.6), ("llama:3.1-70b", 70.55), ("mixtral:8x7b", 46.7), ("gpt3_1T", 1008)]
)
def test_sizes_are_the_published_ones(name: str, billions: float) -> None:
    assert find_model(name).parameters() / 1e9 == pytest.approx(billions, rel=0.01)


def test_hugging_face_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 32}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shape = find_model(str(path)).shape
    assert (shape.layers, shape.kv_heads, shape.head_width, shape.ffn_width, shape.gated) == (2, 2, 16, 128, True)
    path.write_text(json.dumps({**config, "num_local_experts": 4, "num_experts_per_tok": 2}))
    assert find_model(str(path)).experts is not None
    path.write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        find_model(str(path))


def test_own_shape_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    table = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 4, "head_width": 16, "ffn_width": 256, "vocab": 99}
    path.write_text(json.dumps({**table, "max_positions": 32}))
    assert find_model(str(path)).shape.vocab == 99
    path.write_text(json.dumps({**table, "max_position": 32}))
    with pytest.raises(ConfigError, match="Did you mean 'max_positions'"):
        find_model(str(path))


def test_experts_cost_what_a_token_visits() -> None:
    """Mixtral 8x7b: 12.9 billion active parameters (arXiv 2401.04088), 6 operations each, and attention."""
    model = find_model("mixtral:8x7b")
    attention = 3 * 2 * 1 * 32 * 32 * 128 * model.shape.layers
    assert model.flops_per_token(1) == pytest.approx(6 * (12.88e9 - 32000 * 4096) + attention, rel=0.01)


class Entry:
    """An entry point that another package would register."""

    value = "their.package:shapes"

    def __init__(self, shapes: dict[str, object] | None) -> None:
        self.shapes = shapes

    def load(self) -> object:
        if self.shapes is None:
            raise ImportError("no module named their")
        return lambda: self.shapes


def test_entry_points_add_models(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = get_shape("llama", "micro")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [Entry({"their:model": shape})])
    assert find_model("their:model").shape == shape
    with pytest.raises(ConfigError, match=r"Did you mean 'their:model'.*gpt3_1T"):
        find_model("their:modle")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [Entry(None)])
    assert find_model("gpt3").shape.layers == 96
    with pytest.raises(ConfigError, match="cannot be listed: no module named their"):
        find_model("their:model")
