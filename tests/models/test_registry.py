"""`get_model` and its neighbours: the names they know, and one sentence for those they do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import CheckpointError, ConfigError, FmsError, LayoutError
from fms_parallel.models import get_config, get_model, get_shape, list_models, list_sources, list_variants, save_hf
from fms_parallel.models.registry import Architecture, Registry
from fms_parallel.strategy.base import Strategy

SMALL = {"width": 32, "layers": 1, "ffn_width": 48}


def test_names() -> None:
    assert "llama" in list_models()
    assert {"micro", "7b", "3.1-8b", "granite.code-3b"} <= set(list_variants("llama"))
    assert {"hf", "native"} <= set(list_sources("llama"))
    assert get_shape("llama", "7b").parameters() == 6_738_415_616


def test_overrides_replace_fields() -> None:
    assert get_config("llama", "micro", layers=2).layers == 2


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("lama",), {}, "Did you mean 'llama'"),
        (("llama", "7bb"), {}, "Did you mean '7b'"),
        (("llama", "micro"), {"nlayer": 1}, "no config field 'nlayer'. Did you mean 'layers'"),
        (("llama", "micro", None, "hf"), {}, "source='hf' without model_path"),
        (("llama", "micro", "/nowhere"), {}, "/nowhere: no such file"),
        (("llama", "micro", "/nowhere", "hff"), {}, "'hff'"),
        (("llama", "micro"), {"data_type": "float3"}, "'float3'"),
        (("llama", "micro"), {"device_type": "tpu"}, "'tpu'"),
        (("llama", "micro"), {"checkpoint_sharding": "tp"}, "checkpoint_sharding='tp'"),
        (("llama", "micro"), {"distributed_strategy": "tp=2"}, "needs 2 ranks"),
        (("llama", "micro"), {"distributed_strategy": "cp=2"}, "needs 2 ranks"),
        (("llama", "micro"), {"distributed_strategy": "ep=2"}, "ep"),
        (("llama", "micro"), {"heads": 5}, "192"),
    ],
)
def test_an_impossible_request_gets_a_sentence(arguments: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(FmsError, match=re.escape(words)):
        get_model(*arguments, **options)


def test_a_bare_axis_on_one_rank_is_one_process() -> None:
    assert get_model("llama", "micro", distributed_strategy="tp", **SMALL).parallel.layout.world_size == 1


def test_a_seed_draws_the_same_weights_and_another_seed_others() -> None:
    one, two, other = (get_model("llama", "micro", seed=seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_native_weights_round_trip(tmp_path: Path) -> None:
    from fms_parallel.checkpoint.export import save_weights

    model = get_model("llama", "micro", seed=3, **SMALL)
    save_weights(model, tmp_path, None)
    again = get_model("llama", "micro", tmp_path, **SMALL)  # the source is found out
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_of_no_known_format_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"strange.key": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"strange\.key"):
        get_model("llama", "micro", tmp_path, **SMALL)


def test_data_type_is_that_of_the_parameters() -> None:
    model = get_model("llama", "micro", data_type="bf16", **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_strategy_object_is_used() -> None:
    class Marking(Strategy):
        def distribute(self, model: torch.nn.Module) -> torch.nn.Module:
            model.marked = True
            return model

    assert get_model("llama", "micro", distributed_strategy=Marking(), **SMALL).marked


def test_a_model_without_hf_form_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown architecture"):
        save_hf(torch.nn.Linear(2, 2), tmp_path)


def test_a_name_is_registered_once() -> None:
    registry = Registry()
    registry.add(Architecture("a", torch.nn.Linear, {}))
    with pytest.raises(ConfigError, match="'a' is registered already"):
        registry.add(Architecture("a", torch.nn.Linear, {}))


@pytest.mark.parametrize("word", ["pp=1", "tp=1,sp"])
def test_words_without_effect_are_refused(word: str) -> None:
    if word == "pp=1":
        assert get_model("llama", "micro", distributed_strategy=word, **SMALL) is not None
        return
    with pytest.raises(LayoutError, match="sp with tp=1"):
        get_model("llama", "micro", distributed_strategy=word, **SMALL)
