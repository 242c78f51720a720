"""RoBERTa and BERT as Hugging Face writes them: keys of the body and of each task's head, and their `config.json`.

It knows key names and config fields; the modules are in `roberta.py` one floor up. A config's `positions` says which of
the two families it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fms_parallel.checkpoint.adapter import Adapter, Drop, GroupQKV, Rename, Step, Tied
from fms_parallel.checkpoint.reshape import FirstOf, OlderEndings
from fms_parallel.errors import ConfigError

from .config import HFFields, hf_activation

Config = TypeVar("Config")
Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TaskKeys:
    """How one task's head is written, by family.

    Attributes:
        classes: transformers' class. names: keys of the head. dropped: patterns of keys that other tasks need.
        decoder_bias: the two keys under which the head's bias is found.
        classifies: the config counts labels.
    """

    classes: Mapping[str, str]
    names: Mapping[str, Names]
    dropped: Mapping[str, tuple[str, ...]]
    decoder_bias: Mapping[str, tuple[str, str]] | None = None
    classifies: bool = False


def _classes(task: str) -> dict[str, str]:
    return {"roberta": f"RobertaFor{task}", "bert": f"BertFor{task}"}


MASKED = TaskKeys(
    classes=_classes("MaskedLM"),
    names={
        "roberta": (
            ("lm_head.dense.{kind}", "head_dense.{kind}"),
            ("lm_head.layer_norm.{kind}", "head_norm.{kind}"),
            ("lm_head.decoder.weight", "head.weight"),
            ("lm_head.bias", "head.bias"),
        ),
        "bert": (
            ("cls.predictions.transform.dense.{kind}", "head_dense.{kind}"),
            ("cls.predictions.transform.LayerNorm.{kind}", "head_norm.{kind}"),
            ("cls.predictions.decoder.weight", "head.weight"),
            ("cls.predictions.bias", "head.bias"),
        ),
    },
    dropped={"roberta": ("roberta.pooler.*",), "bert": ("bert.pooler.*", "cls.seq_relationship.*")},
    decoder_bias={
        "roberta": ("lm_head.decoder.bias", "lm_head.bias"),
        "bert": ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    },
)
CLASSIFICATION = TaskKeys(
    classes=_classes("SequenceClassification"),
    names={
        "roberta": (
            ("classifier.dense.{kind}", "classifier.dense.{kind}"),
            ("classifier.out_proj.{kind}", "classifier.out.{kind}"),
        ),
        "bert": (
            ("bert.pooler.dense.{kind}", "classifier.dense.{kind}"),
            ("classifier.{kind}", "classifier.out.{kind}"),
        ),
    },
    dropped={"roberta": ("roberta.pooler.*",), "bert": ()},
    classifies=True,
)
_SPAN: Names = (("qa_outputs.{kind}", "head.{kind}"),)
QUESTION_ANSWERING = TaskKeys(
    classes=_classes("QuestionAnswering"),
    names={"roberta": _SPAN, "bert": _SPAN},
    dropped={"roberta": ("roberta.pooler.*",), "bert": ("bert.pooler.*",)},
)


def _body(family: str) -> Names:
    embeddings, layer = f"{family}.embeddings.", f"{family}.encoder.layer.{{n}}."
    return (
        (f"{embeddings}word_embeddings.weight", "embedding.weight"),
        (f"{embeddings}position_embeddings.weight", "position_embedding.weight"),
        (f"{embeddings}token_type_embeddings.weight", "token_type_embedding.weight"),
        (f"{embeddings}LayerNorm.{{kind}}", "embedding_norm.{kind}"),
        (f"{layer}attention.self.query.{{kind}}", "layers.{n}.attention.query.{kind}"),
        (f"{layer}attention.self.key.{{kind}}", "layers.{n}.attention.key.{kind}"),
        (f"{layer}attention.self.value.{{kind}}", "layers.{n}.attention.value.{kind}"),
        (f"{layer}attention.output.dense.{{kind}}", "layers.{n}.attention.out.{kind}"),
        (f"{layer}attention.output.LayerNorm.{{kind}}", "layers.{n}.attention_norm.{kind}"),
        (f"{layer}intermediate.dense.{{kind}}", "layers.{n}.feed_forward.up.{kind}"),
        (f"{layer}output.dense.{{kind}}", "layers.{n}.feed_forward.down.{kind}"),
        (f"{layer}output.LayerNorm.{{kind}}", "layers.{n}.ffn_norm.{kind}"),
    )


def hf_adapter(config: Any, task: TaskKeys) -> Adapter:
    """Between Hugging Face's keys and ours. The table of positions is theirs, with the rows that are never read."""
    family = config.positions
    steps: list[Step] = [
        OlderEndings(((".gamma", ".weight"), (".beta", ".bias"))),
        Drop(("*.embeddings.position_ids", *task.dropped[family])),
    ]
    if task.decoder_bias is not None:
        steps += _decoder_bias(*task.decoder_bias[family], config.tied)
    steps.append(Rename((*_body(family), *task.names[family])))
    if config.fused:
        q, k, v = (f"layers.{{n}}.attention.{name}.{{kind}}" for name in ("query", "key", "value"))
        whole = "layers.{n}.attention.qkv.{kind}"
        steps.append(GroupQKV(q, k, v, whole, config.heads, config.heads, config.d))
    if config.tied and task is MASKED:
        steps.append(Tied("head.weight", "embedding.weight"))
    return Adapter("hf", tuple(steps))


def _decoder_bias(decoder: str, bias: str, tied: bool) -> list[Step]:
    """transformers computes with the decoder's bias; it is the head's when tied, and the head's is unused otherwise."""
    if tied:
        return [Tied(decoder, bias), Drop((decoder,))]
    return [FirstOf((decoder, bias), under=bias)]


_FIELDS: dict[str, tuple[str, Any]] = {  # ours -> theirs, and what transformers takes when it is not written
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "ffn_width": ("intermediate_size", 3072),
    "token_types": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "tied": ("tie_word_embeddings", True),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "std": ("initializer_range", 0.02),
}
_FAMILY_DEFAULTS = {"roberta": (50265, 1), "bert": (30522, 0)}
"""Family -> vocab_size and pad_token_id when they are not written."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "position_embedding_type": ("absolute", None),
    "gradient_checkpointing": (False, True),
    "use_bidirectional_attention": (None,),
}
_POOLER = ("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
"""Of a pooler that no class of transformers builds."""


def config_from_hf(raw: Mapping[str, Any], task: TaskKeys, make: Callable[..., Config]) -> Config:
    """The config that a Hugging Face `config.json` of model type `roberta` or `bert` describes.

    Raises:
        ConfigError: another model type, or a field that is not supported.
    """
    family = str(raw.get("model_type"))
    if family not in task.classes:
        raise ConfigError(f"config.json is of model_type {family!r}, not one of {', '.join(task.classes)}.")
    fields = HFFields(raw)
    values = {ours: fields.take(theirs, default) for ours, (theirs, default) in _FIELDS.items()}
    vocab, padding = _FAMILY_DEFAULTS[family]
    values |= {"vocab_size": fields.take("vocab_size", vocab), "padding_id": fields.take("pad_token_id", padding)}
    # RoBERTa's table has rows for padding and before it.
    before = (values["padding_id"] or 0) + 1 if family == "roberta" else 0
    values["max_positions"] = fields.take("max_position_embeddings", 512) - before
    for name, allowed in _ONLY.items():
        if (value := fields.take(name, allowed[0])) not in allowed:
            raise ConfigError(f"config.json says {name}={value!r}: only {allowed[0]!r} is supported.")
    for name in (*_POOLER, "pooler_size_per_head", "pooler_type"):
        fields.take(name, None)
    values |= _labels(fields, task)
    config = make(
        **values, positions=family, bos_id=fields.token_id("bos_token_id"), eos_id=fields.token_id("eos_token_id")
    )
    fields.finish()
    return config


def _labels(fields: HFFields, task: TaskKeys) -> dict[str, Any]:
    """What only classification reads, of fields that every config may have."""
    dropout = fields.take("classifier_dropout", None)
    count = fields.take("num_labels", None)
    names, problem = fields.take("id2label", None), fields.take("problem_type", None)
    if not task.classifies:
        return {}
    if problem not in (None, "single_label_classification"):
        raise ConfigError(f"config.json says problem_type={problem!r}: only single_label_classification is supported.")
    return {"classifier_dropout": dropout, "classes": len(names) if names else count or 2}


def config_to_hf(config: Any, task: TaskKeys) -> dict[str, Any]:
    """The `config.json` under which transformers computes what we compute."""
    family = config.positions
    written = {
        "architectures": [task.classes[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _FIELDS.items()},
        "hidden_act": hf_activation(config.activation),
        "max_position_embeddings": config.max_positions + config.first_position,
        "pad_token_id": config.padding_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }
    if task.classifies:
        names = {str(index): f"LABEL_{index}" for index in range(config.classes)}
        written |= {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
        written["classifier_dropout"] = config.classifier_dropout
    return written
