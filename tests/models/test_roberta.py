"""RoBERTa and BERT against transformers at the same weights, padded batches included, for every task."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError
from fms_parallel.models import get_config, get_model, list_variants, save_hf
from fms_parallel.models.hf.roberta import CLASSIFICATION, MASKED, QUESTION_ANSWERING, TaskKeys, hf_adapter
from fms_parallel.models.registry import REGISTRY
from tests.models.parity import TOLERANCE, gradient_errors, relative, shaken

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ARCHITECTURES: dict[str, TaskKeys] = {
    "roberta": MASKED,
    "roberta_classification": CLASSIFICATION,
    "roberta_question_answering": QUESTION_ANSWERING,
}
FAMILIES = ("roberta", "bert")
S = 21
TINY: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 43},
    **{"max_position_embeddings": 66, "type_vocab_size": 2, "initializer_range": 0.1, "layer_norm_eps": 1e-5},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "relu, one token type": {"hidden_act": "relu", "type_vocab_size": 1},
    "another padding id": {"pad_token_id": 5},
}
CASES = [
    (name, kind) for name in ARCHITECTURES for kind in KINDS if (name, kind) != ("roberta_classification", "untied")
]


def theirs(folder: Path, family: str, task: TaskKeys, **options: Any) -> Any:
    make = getattr(transformers, {"roberta": "RobertaConfig", "bert": "BertConfig"}[family])
    torch.manual_seed(0)
    options = options | ({"num_labels": 3} if task is CLASSIFICATION else {})
    model = getattr(transformers, task.classes[family])(make(**(TINY | options)))
    with torch.no_grad():  # rows of padding start at zero, which would hide that they are read
        model.get_input_embeddings().weight.add_(0.01)
    return shaken(model, folder)


def ours(folder: Path, **overrides: Any) -> Any:
    return get_model("hf_pretrained", model_path=folder, **overrides).eval()


def rows(padding: int) -> tuple[Tensor, Tensor]:
    """Ids padded to three lengths, and which are real."""
    ids = torch.randint(10, 97, (3, S))
    real = torch.arange(S) < torch.tensor([[S], [13], [1]])
    return ids.where(real, padding), real


def wanted(task: TaskKeys, real: Tensor) -> Tensor:
    """Labels of the three rows; some are left out."""
    if task is MASKED:
        labels = torch.randint(97, (3, S)).where(real, -100)
        labels.view(-1)[::5] = -100
        return labels
    if task is CLASSIFICATION:
        return torch.tensor([2, 0, -100])
    return torch.tensor([[3, 20], [0, -100], [0, 0]])


def outputs(task: TaskKeys, found: Any) -> Tensor:
    if task is QUESTION_ANSWERING:
        return torch.stack([found.start_logits, found.end_logits], dim=-1)
    return found.logits


def their_loss(task: TaskKeys, logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.transpose(1, 2) if task is QUESTION_ANSWERING else logits
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


@pytest.mark.parametrize(("architecture", "kind"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_outputs_and_gradients_match_transformers(
    tmp_path: Path, architecture: str, family: str, kind: str, fused: bool
) -> None:
    task = ARCHITECTURES[architecture]
    reference, model = theirs(tmp_path, family, task, **KINDS[kind]), ours(tmp_path, fused=fused)
    assert model.architecture == architecture
    ids, real = rows(reference.config.pad_token_id)
    types = torch.randint(reference.config.type_vocab_size, (3, S))
    expected = outputs(task, reference(ids, attention_mask=real.long(), token_type_ids=types))
    assert relative(model(ids, token_types=types), expected) <= TOLERANCE
    labels = wanted(task, real)
    their_loss(task, expected, labels).backward()
    loss = model(ids, labels, token_types=types)
    assert relative(loss, their_loss(task, expected, labels)) <= TOLERANCE
    loss.backward()
    unused = task.decoder_bias and task.decoder_bias[family][1]
    if unused and (bias := reference.get_parameter(unused)).grad is None:  # untied: computed with the decoder's
        bias.grad = reference.get_parameter(task.decoder_bias[family][0]).grad  # type: ignore[index]
    errors = gradient_errors(model, reference, hf_adapter(model.config, task))
    assert max(errors.values()) <= TOLERANCE, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_token_types_are_zero_unless_given(tmp_path: Path, family: str) -> None:
    reference, model = theirs(tmp_path, family, MASKED), ours(tmp_path)
    ids, real = rows(reference.config.pad_token_id)
    expected = reference(ids, attention_mask=real.long()).logits
    assert relative(model(ids), expected) <= TOLERANCE
    with pytest.raises(RuntimeError, match=r"token type is not in the table of 2"):
        model(ids, token_types=torch.full_like(ids, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_given_mask_replaces_that_of_padding(tmp_path: Path, family: str) -> None:
    reference, model = theirs(tmp_path, family, MASKED), ours(tmp_path)
    ids, real = rows(reference.config.pad_token_id)
    seen = real.clone()
    seen[:, 2:5] = False
    seen[:, 0] = True
    assert relative(model(ids, mask=seen), reference(ids, attention_mask=seen.long()).logits) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_computes_what_it_would_without_padding(family: str) -> None:
    model = get_model("roberta", "micro", data_type="fp64", positions=family, layers=2, std=0.2).eval()
    ids = torch.randint(5, 256, (1, 9))
    padded = torch.cat([ids, torch.full((1, 6), 1)], dim=1)
    torch.testing.assert_close(model(padded)[:, :9], model(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_row_of_padding_alone_is_finite(dropout: float) -> None:
    """As a dataset's last batch may have one: it must not spoil the others' gradients."""
    from fms_parallel.modules.sequences import DropoutKey

    model = get_model("roberta", "micro", layers=2, attention_dropout=dropout)
    ids = torch.randint(5, 256, (2, 9))
    ids[1] = 1
    labels = ids.masked_fill(ids == 1, -100)
    loss = model(ids, labels, dropout=DropoutKey(0))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_in_transformers(tmp_path: Path, architecture: str, family: str, kind: str) -> None:
    task = ARCHITECTURES[architecture]
    reference = theirs(tmp_path / "theirs", family, task, **KINDS[kind])
    save_hf(ours(tmp_path / "theirs", fused=True), tmp_path / "ours")
    again, report = getattr(transformers, task.classes[family]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, real = rows(reference.config.pad_token_id)
    with torch.no_grad():
        one, other = (outputs(task, m.eval()(ids, attention_mask=real.long())) for m in (again, reference))
    assert torch.equal(one, other)


def test_names_of_older_files_are_read(tmp_path: Path) -> None:
    """As bert-base's own: gamma and beta, a pooler and a second head that this task has not."""
    from safetensors.torch import load_file, save_file

    reference = theirs(tmp_path, "bert", MASKED)
    file = tmp_path / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(file).items()
    }
    extra = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight")
    save_file(tensors | {name: torch.zeros(3) for name in extra}, file)
    ids, real = rows(0)
    assert relative(ours(tmp_path)(ids), reference(ids, attention_mask=real.long()).logits) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_is_one_graph(architecture: str) -> None:
    """fullgraph=True raises at the first break."""
    torch.compiler.reset()
    model, ids = get_model(architecture, "micro", layers=2).eval(), torch.randint(5, 256, (2, 9))
    ids[1, 4:] = 1
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids))


# ---- configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", list_variants("roberta"))
def test_parameters_are_those_of_the_module_and_of_transformers(architecture: str, variant: str) -> None:
    known, task = REGISTRY.get(architecture), ARCHITECTURES[architecture]
    config = get_config(architecture, variant)
    assert known.to_hf is not None
    make = getattr(transformers, {"roberta": "RobertaConfig", "bert": "BertConfig"}[config.positions])
    with torch.device("meta"):
        model = known.build(config)
        reference = getattr(transformers, task.classes[config.positions])(make(**known.to_hf(config)))
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, reference)]
    assert [config.parameters()] * 2 == counts


def test_base_has_the_published_number_of_parameters() -> None:
    assert get_config("roberta", "base").parameters() == 124_697_433


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", list_variants("roberta"))
def test_config_survives_the_round_trip(architecture: str, variant: str) -> None:
    known = REGISTRY.get(architecture)
    config = replace(get_config(architecture, variant), attention_dropout=0.3, token_types=3)
    if architecture == "roberta_classification":
        config = replace(config, classes=7, classifier_dropout=0.4)
    assert known.from_hf is not None and known.to_hf is not None
    assert known.from_hf(known.to_hf(config)) == config


def test_configs_of_the_published_form_are_read() -> None:
    base = {
        **{"architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768},
        **{"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_act": "gelu", "eos_token_id": 2},
        **{"initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "bos_token_id": 0},
        **{"max_position_embeddings": 514, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1},
        "type_vocab_size": 1,
    }
    bert = {
        **{"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 768},
        **{"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_act": "gelu"},
        **{
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "gradient_checkpointing": False,
        },
        **{"max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0},
        **{"type_vocab_size": 2, "position_embedding_type": "absolute", "use_cache": True},
    }
    read = REGISTRY.get("roberta").from_hf
    assert read is not None
    assert read(base) == get_config("roberta", "base")
    assert read(bert) == get_config("roberta", "bert.base")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_decoder": True}, "is_decoder=True"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"brand_new_switch": True}, "brand_new_switch=True"),
        ({"model_type": "albert"}, "'albert'"),
        ({"problem_type": "regression"}, "regression"),
        ({"id2label": {"0": "score"}}, "classes=1"),
    ],
)
def test_unsupported_fields_are_errors(change: dict[str, Any], words: str) -> None:
    known = REGISTRY.get("roberta_classification")
    assert known.from_hf is not None and known.to_hf is not None
    with pytest.raises(ConfigError, match=words):
        known.from_hf({**known.to_hf(get_config("roberta_classification", "base")), **change})


@pytest.mark.parametrize(
    ("fields_", "words"),
    [
        ({"positions": "learned"}, "'learned'"),
        ({"heads": 5}, "5 heads"),
        ({"padding_id": None}, "give padding_id"),
        ({"padding_id": 256}, "padding id 256"),
    ],
)
def test_impossible_configs_are_errors(fields_: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_model("roberta", "micro", **fields_)


def test_too_many_tokens_are_refused() -> None:
    model = get_model("roberta", "micro", max_positions=8, layers=1).eval()
    assert model(torch.full((1, 8), 9)).shape == (1, 8, 256)
    with pytest.raises(ConfigError, match=r"9 tokens are more than max_positions=8"):
        model(torch.full((1, 9), 9))


def test_unknown_arguments_are_named() -> None:
    model = get_model("roberta_classification", "micro", layers=1).eval()
    with pytest.raises(TypeError, match="attention_mask"):
        model(torch.full((1, 8), 9), attention_mask=None)


def test_padding_of_another_id_is_refused_by_the_config(tmp_path: Path) -> None:
    """Where positions do not count from it, every shape would fit."""
    theirs(tmp_path, "bert", MASKED)
    model = ours(tmp_path)
    values = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    with pytest.raises(ConfigError, match=r"padding_id: 0 in the file, 3 asked for"):
        get_model("roberta", "base", tmp_path, **(values | {"padding_id": 3}))
