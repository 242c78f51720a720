"""Hugging Face's keys and config fields of LLaMA, and of every model that is written like it.

Both sides keep rotary pairs half-split, so nothing is permuted. An architecture adds its own fields to these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fms_parallel.checkpoint.adapter import Adapter, Drop, GroupQKV, Rename, Stack, Step, Tied
from fms_parallel.errors import ConfigError

from .config import HFFields, hf_activation

if TYPE_CHECKING:
    from ..llama import LLaMAConfig

OUTER_NAMES = (
    ("model.embed_tokens.weight", "embedding.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "head.weight"),
    ("model.layers.{n}.input_layernorm.weight", "layers.{n}.attention_norm.weight"),
    ("model.layers.{n}.post_attention_layernorm.weight", "layers.{n}.ffn_norm.weight"),
    ("model.layers.{n}.self_attn.q_proj.{kind}", "layers.{n}.attention.query.{kind}"),
    ("model.layers.{n}.self_attn.k_proj.{kind}", "layers.{n}.attention.key.{kind}"),
    ("model.layers.{n}.self_attn.v_proj.{kind}", "layers.{n}.attention.value.{kind}"),
    ("model.layers.{n}.self_attn.o_proj.{kind}", "layers.{n}.attention.out.{kind}"),
    ("model.layers.{n}.self_attn.q_norm.weight", "layers.{n}.attention.query_norm"),
    ("model.layers.{n}.self_attn.k_norm.weight", "layers.{n}.attention.key_norm"),
)
"""All but the feed-forward."""
HF_NAMES = (
    *OUTER_NAMES,
    ("model.layers.{n}.mlp.gate_proj.{kind}", "layers.{n}.feed_forward.gate.{kind}"),
    ("model.layers.{n}.mlp.up_proj.{kind}", "layers.{n}.feed_forward.up.{kind}"),
    ("model.layers.{n}.mlp.down_proj.{kind}", "layers.{n}.feed_forward.down.{kind}"),
)


def hf_adapter(config: LLaMAConfig) -> Adapter:
    """Between Hugging Face's keys and ours."""
    return Adapter("hf", (Drop(("*.rotary_emb.inv_freq",)), Rename(HF_NAMES), *stored_form(config)))


def stored_form(config: LLaMAConfig, tied_once: bool = True, dense: bool = True) -> tuple[Step, ...]:
    """From separate tensors to those that the module holds.

    Args:
        tied_once: the format writes tied tensors once, or else under both names.
        dense: the feed-forward has one gate and one up matrix.
    """
    attention, ffn = "layers.{n}.attention.", "layers.{n}.feed_forward."
    steps: list[Step] = []
    if config.fused:
        q, k, v = (f"{attention}{name}.{{kind}}" for name in ("query", "key", "value"))
        steps.append(GroupQKV(q, k, v, f"{attention}qkv.{{kind}}", config.heads, config.k, config.d))
    if config.fused and dense:
        steps.append(Stack((f"{ffn}gate.{{kind}}", f"{ffn}up.{{kind}}"), f"{ffn}gate_up.{{kind}}"))
    if config.tied:
        steps.append(Tied("head.weight", "embedding.weight", tied_once))
    return tuple(steps)


# ---- config.json ------------------------------------------------------------------------------------------------

Fields = Mapping[str, tuple[str, Any]]
"""Ours -> theirs, and what transformers takes when it is not written."""

_NEEDED = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
}
_COMMON: Fields = {
    "kv_heads": ("num_key_value_heads", None),
    "head_width": ("head_dim", None),
    "tied": ("tie_word_embeddings", False),
    "std": ("initializer_range", 0.02),
}
BIASES: Fields = {"attention_bias": ("attention_bias", False), "ffn_bias": ("mlp_bias", False)}


def read_fields(raw: Mapping[str, Any], model_type: str, own: Fields, rope_base: float = 10000.0) -> dict[str, Any]:
    """Values for a config class, from a `config.json`.

    Args:
        own: the architecture's fields beside the common ones, or other defaults for those.
        rope_base: theta when it is not written.
    Raises:
        ConfigError: another model type, a field that is missing, or one that is not supported.
    """
    if raw.get("model_type") != model_type:
        raise ConfigError(f"config.json is of model_type {raw.get('model_type')!r}, not {model_type!r}.")
    fields = HFFields(raw)
    rope = fields.rope(rope_base)
    values = {
        **{ours: fields.take(theirs) for ours, theirs in _NEEDED.items()},
        **{ours: fields.take(theirs, default) for ours, (theirs, default) in {**_COMMON, **own}.items()},
        "rope_base": rope.base,
        "rope_scaling": rope.kind,
        "rope_options": rope.options,
        "rope_partial": rope.partial,
        **{f"{name}_id": fields.token_id(f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    fields.finish()
    return values


def written_fields(
    config: LLaMAConfig, model_type: str, hf_class: str, own: Fields, qk_norm: bool = False
) -> dict[str, Any]:
    """The `config.json` under which transformers computes what we compute; rotary positions in both spellings.

    Args:
        own: as for `read_fields`. qk_norm: what transformers' model always does.
    Raises:
        ConfigError: a field that transformers' model cannot express.
    """
    inexpressible = {
        **{name: bool(getattr(config, name)) for name in BIASES if name not in own},
        "qk_norm": config.qk_norm != qk_norm,
        "rope_scaling=ntk": config.rope_scaling == "ntk",
        "rope_original": config.rope_original not in (None, config.max_positions),
        "rope_partial": config.rope_partial != 1.0,
    }
    if words := [word for word, used in inexpressible.items() if used]:
        raise ConfigError(f"transformers' {hf_class} has no {', '.join(words)}: save as native weights instead.")
    scaling = None if config.rope_scaling == "default" else {"rope_type": config.rope_scaling, **config.rope_options}
    return {
        "architectures": [hf_class],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _NEEDED.items()},
        **{theirs: getattr(config, ours) for ours, (theirs, _) in {**_COMMON, **own}.items()},
        "hidden_act": hf_activation(config.activation),
        "num_key_value_heads": config.k,
        "head_dim": config.d,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_base, **(scaling or {"rope_type": "default"})},
        **{f"{name}_token_id": getattr(config, f"{name}_id") for name in ("bos", "eos", "pad")},
    }
