"""GPT-BigCode against transformers at the same weights: logits, every gradient, tokens, checkpoints both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.inference import generate
from fms_parallel.models import get_config, get_model, list_variants, save_hf
from fms_parallel.models.gpt_bigcode import GPTBigCode, config_from_hf, config_to_hf, hf_adapter
from tests.models.parity import TOLERANCE, gradient_errors, relative, shaken

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.activations import ACT2FN  # noqa: E402

TINY: dict[str, Any] = {
    **{"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    **{"bos_token_id": None, "eos_token_id": None},
}
KINDS: dict[str, dict[str, Any]] = {
    "mqa": {},
    "mha": {"multi_query": False},
    "untied": {"tie_word_embeddings": False},
    "mha untied": {"tie_word_embeddings": False, "multi_query": False},
    "odd": {"vocab_size": 61, "n_inner": 43},
    "unscaled": {"scale_attn_weights": False},
    "one head": {"n_head": 1},
}
WITH_PARAMETERS = ("prelu", "xielu")
ELEMENTWISE = sorted(name for name in ACT2FN if name not in WITH_PARAMETERS)


def theirs(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return shaken(transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**(TINY | options))), folder)


def ours(folder: Path, **overrides: Any) -> Any:
    return get_model("hf_pretrained", model_path=folder, source=None, **overrides).eval()


def compare(folder: Path, options: dict[str, Any], **overrides: Any) -> None:
    """Logits and gradients, with token 0 in the rows."""
    reference, model = theirs(folder, **options), ours(folder, **overrides)
    ids = torch.randint(61, (2, 21))
    ids[0, :3] = ids[1, 7] = 0
    labels = torch.randint(61, (2, 21))
    expected = reference(ids).logits
    assert relative(model(ids), expected) <= TOLERANCE
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(ids, labels).backward()
    errors = gradient_errors(model, reference, hf_adapter(model.config))
    assert max(errors.values()) <= TOLERANCE, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_match_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    compare(tmp_path, KINDS[kind], fused=fused)


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_every_activation_matches_transformers(tmp_path: Path, activation: str) -> None:
    compare(tmp_path, {"activation_function": activation})


@pytest.mark.parametrize("activation", WITH_PARAMETERS)
def test_activations_with_parameters_are_refused(activation: str) -> None:
    raw = config_to_hf(get_config("gpt_bigcode", "micro")) | {"activation_function": activation}
    with pytest.raises(ConfigError, match=f"'{activation}'"), torch.device("meta"):
        GPTBigCode(config_from_hf(raw))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_loads_in_transformers(tmp_path: Path, kind: str, fused: bool) -> None:
    reference = theirs(tmp_path / "theirs", **KINDS[kind])
    save_hf(ours(tmp_path / "theirs", fused=fused), tmp_path / "ours")
    again, report = transformers.GPTBigCodeForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(61, (2, 21))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("multi_query", [True, False], ids=["mqa", "mha"])
def test_greedy_tokens_of_unequal_prompts_equal_theirs(tmp_path: Path, multi_query: bool) -> None:
    """Prompts hold token 0, which is also what pads them."""
    reference = theirs(tmp_path, multi_query=multi_query, initializer_range=0.4)
    prompts = [[0, 5, 0, 7, 8], [11, 0], [0]]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = reference.generate(ids, attention_mask=seen, max_new_tokens=16, do_sample=False, pad_token_id=0)
    model = ours(tmp_path)
    assert generate(model, prompts, max_new_tokens=16) == expected[:, 5:].tolist()
    assert generate(model, prompts, max_new_tokens=16, use_cache=False) == expected[:, 5:].tolist()


@pytest.mark.slow
def test_forward_is_one_graph() -> None:
    """fullgraph=True raises at the first break."""
    torch.compiler.reset()
    model, ids = get_model("gpt_bigcode", "micro", layers=2).eval(), torch.randint(256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids))


# ---- configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list_variants("gpt_bigcode"))
def test_parameters_are_those_of_the_module_and_of_transformers(variant: str) -> None:
    config = get_config("gpt_bigcode", variant)
    with torch.device("meta"):
        model = GPTBigCode(config)
        reference = transformers.GPTBigCodeForCausalLM(
            transformers.GPTBigCodeConfig(**{**config_to_hf(config), "n_positions": 1})
        )
    expected = sum(p.numel() for p in reference.parameters()) + (config.max_positions - 1) * config.width
    assert sum(p.numel() for p in model.parameters()) == config.parameters() == expected


def test_starcoder_has_the_published_number_of_parameters() -> None:
    assert get_config("gpt_bigcode", "starcoder").parameters() == 15_517_456_384


@pytest.mark.parametrize("variant", list_variants("gpt_bigcode"))
def test_config_survives_the_round_trip(variant: str) -> None:
    config = replace(get_config("gpt_bigcode", variant), attention_dropout=0.3, dropout=0.2, multi_query=False)
    assert config_from_hf(config_to_hf(config)) == config


def test_a_config_of_the_published_form_is_read() -> None:
    """starcoder's, as published: with the words of a runner that nobody has."""
    raw = {
        **{"model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "vocab_size": 49152},
        **{"n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192},
        **{"activation_function": "gelu", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
        **{"layer_norm_epsilon": 1e-05, "initializer_range": 0.02209708691207961, "multi_query": True},
        **{"scale_attn_weights": True, "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True},
        **{"bos_token_id": 0, "eos_token_id": 0, "inference_runner": 0, "max_batch_size": None},
        **{"max_sequence_length": None, "pad_key_length": True, "pre_allocate_kv_cache": False},
        **{"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
        **{"summary_type": "cls_index", "summary_use_proj": True, "validate_runner_input": True},
        **{"torch_dtype": "float32", "transformers_version": "4.28.1", "use_cache": True},
    }
    config = config_from_hf(raw)
    assert config.shape() == get_config("gpt_bigcode", "starcoder").shape()
    assert (config.activation, config.tied, config.attention_dropout) == ("gelu", True, 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"attention_softmax_in_fp32": False}, "attention_softmax_in_fp32"),
        ({"brand_new_switch": True}, "brand_new_switch=True"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"n_head": 5}, "5 heads"),
    ],
)
def test_unsupported_fields_are_errors(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_hf({**config_to_hf(get_config("gpt_bigcode", "micro")), **change})


def test_missing_inner_width_is_four_times_the_width() -> None:
    raw = {name: value for name, value in config_to_hf(get_config("gpt_bigcode", "micro")).items() if name != "n_inner"}
    assert config_from_hf(raw).f == config_from_hf({**raw, "n_inner": None}).f == 4 * 192


def test_positions_beyond_the_table_are_errors() -> None:
    model = get_model("gpt_bigcode", "micro", max_positions=8, layers=1)
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"position 9 is beyond max_positions=8"):
        model(ids)
    with pytest.raises(RuntimeError, match=r"position is not in the table of 8"):
        model(ids[:, :8], positions=torch.arange(1, 9)[None])


def test_weights_of_another_activation_are_refused_by_the_config(tmp_path: Path) -> None:
    theirs(tmp_path, activation_function="relu")
    same: dict[str, Any] = {"vocab_size": 97, "width": 32, "layers": 2, "max_positions": 64}
    with pytest.raises(ConfigError, match=r"activation: relu in the file, gelu_pytorch_tanh asked for"):
        get_model("gpt_bigcode", "micro", tmp_path, **same)
    theirs(tmp_path, activation_function="gelu_new", n_inner=128)  # two ways of writing what is asked for
    get_model("gpt_bigcode", "micro", tmp_path, **same)
