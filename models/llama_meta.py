"""LLaMA's checkpoints as Meta publishes them: keys, how files cut them, and `params.json`.

Meta's rotary positions turn neighbouring features of a head, ours (and Hugging Face's) features half a head apart, so
rows of query and key are permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fms_parallel.checkpoint.adapter import Adapter, Drop, PermuteRotary, Rename, Step
from fms_parallel.checkpoint.meta import Cut, MetaFiles
from fms_parallel.errors import ConfigError

if TYPE_CHECKING:
    from .llama import LLaMAConfig

META_NAMES = (
    ("tok_embeddings.weight", "embedding.weight"),
    ("norm.weight", "norm.weight"),
    ("output.weight", "head.weight"),
    ("layers.{n}.attention_norm.weight", "layers.{n}.attention_norm.weight"),
    ("layers.{n}.ffn_norm.weight", "layers.{n}.ffn_norm.weight"),
    ("layers.{n}.attention.wq.weight", "layers.{n}.attention.query.weight"),
    ("layers.{n}.attention.wk.weight", "layers.{n}.attention.key.weight"),
    ("layers.{n}.attention.wv.weight", "layers.{n}.attention.value.weight"),
    ("layers.{n}.attention.wo.weight", "layers.{n}.attention.out.weight"),
    ("layers.{n}.feed_forward.w1.weight", "layers.{n}.feed_forward.gate.weight"),
    ("layers.{n}.feed_forward.w3.weight", "layers.{n}.feed_forward.up.weight"),
    ("layers.{n}.feed_forward.w2.weight", "layers.{n}.feed_forward.down.weight"),
)
ROPE_TABLE = "*rope.freqs"
LLAMA3_VOCABULARY = 128256
"""Since Llama 3 files cut the embedding along the vocabulary, before along the width; nothing in them says which."""


def meta_adapter(config: LLaMAConfig, stored: tuple[Step, ...]) -> Adapter:
    """Between Meta's keys and ours; `stored` are the steps to the form that the config stores (fused, tied)."""
    permuted = (
        PermuteRotary(("layers.{n}.attention.query.weight",), config.heads, config.d),
        PermuteRotary(("layers.{n}.attention.key.weight",), config.k, config.d),
    )
    return Adapter("meta", (Drop((ROPE_TABLE,)), Rename(META_NAMES), *permuted, *stored))


def meta_files(config: LLaMAConfig) -> MetaFiles:
    """How Meta's files cut these tensors."""
    attention, ffn = "layers.{n}.attention.", "layers.{n}.feed_forward."
    rows = ("output.weight", *(f"{attention}w{x}.weight" for x in "qkv"), *(f"{ffn}w{x}.weight" for x in "13"))
    columns = (f"{attention}wo.weight", f"{ffn}w2.weight")
    norms = ("norm.weight", "layers.{n}.attention_norm.weight", "layers.{n}.ffn_norm.weight")
    tables = ("rope.freqs", f"{attention}inner_attention.rope.freqs")
    embedding = (0, 1) if config.vocab_size >= LLAMA3_VOCABULARY else (1, 0)
    return MetaFiles(
        (
            Cut("tok_embeddings.weight", embedding, (config.vocab_size, config.width)),
            *(Cut(key, (0,)) for key in rows),
            *(Cut(key, (1,)) for key in columns),
            *(Cut(key) for key in (*norms, *tables)),
        ),
        most=config.k,
    )


# ---- params.json ------------------------------------------------------------------------------------------------

_SIZES = {"dim": "width", "n_layers": "layers", "n_heads": "heads", "norm_eps": "norm_eps"}  # theirs -> ours
_READ = (*_SIZES, "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope")
_MEANINGLESS = ("max_batch_size", "max_seq_len")
_ROUNDING = 256


def config_from_meta(params: Mapping[str, Any], asked: LLaMAConfig) -> LLaMAConfig:
    """The config that a `params.json` describes, what it leaves open taken from the config asked for.

    It leaves open the vocabulary (-1 in Llama 1 and 2), the numbers of a scaled rope, ties, positions and token ids.

    Raises:
        ConfigError: a field that is missing or not supported.
    """
    if unsupported := sorted(set(params) - {*_READ, *_MEANINGLESS}):
        raise ConfigError(f"params.json has fields that are not supported: {', '.join(unsupported)}.")
    if missing := sorted({*_SIZES, "multiple_of"} - set(params)):
        raise ConfigError(f"params.json lacks {', '.join(missing)}.")
    scaled = bool(params.get("use_scaled_rope", False))
    if scaled != (asked.rope_scaling == "llama3"):
        raise ConfigError(
            f"params.json says use_scaled_rope={scaled}, rope_scaling={asked.rope_scaling!r} was asked for: choose the "
            "variant that it is."
        )
    vocabulary = params.get("vocab_size", -1)
    return replace(
        asked,
        **{ours: params[theirs] for theirs, ours in _SIZES.items()},
        kv_heads=params.get("n_kv_heads") or params["n_heads"],
        head_width=params["dim"] // params["n_heads"],
        ffn_width=_ffn_width(params["dim"], params.get("ffn_dim_multiplier"), params["multiple_of"]),
        vocab_size=asked.vocab_size if vocabulary == -1 else vocabulary,
        rope_base=float(params.get("rope_theta") or 10000.0),
        activation="silu",
        qk_norm=False,
        attention_bias=False,
        ffn_bias=False,
        rope_partial=1.0,
    )


def config_to_meta(config: LLaMAConfig) -> dict[str, Any]:
    """The `params.json` of this config.

    Raises:
        ConfigError: a field that Meta's code has no word for.
    """
    inexpressible = {
        "attention_bias": config.attention_bias,
        "ffn_bias": config.ffn_bias,
        "qk_norm": config.qk_norm,
        f"activation={config.activation}": config.activation not in ("silu", "swish"),
        f"rope_scaling={config.rope_scaling}": config.rope_scaling not in ("default", "llama3"),
        "rope_partial": config.rope_partial != 1.0,
        f"head_width={config.d}": config.d * config.heads != config.width,
    }
    if words := [word for word, used in inexpressible.items() if used]:
        raise ConfigError(f"Meta's LLaMA has no {', '.join(words)}: save as hf or native weights instead.")
    multiplier, rounding = _ffn_words(config)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "n_kv_heads": config.k,
        "vocab_size": config.vocab_size,
        "multiple_of": rounding,
        **({} if multiplier is None else {"ffn_dim_multiplier": multiplier}),
        "rope_theta": config.rope_base,
        **({"use_scaled_rope": True} if config.rope_scaling == "llama3" else {}),
    }


def _ffn_width(width: int, multiplier: float | None, rounding: int) -> int:
    """F as Meta's code computes it: 2/3 of 4 E, times the multiplier, rounded up."""
    hidden = int(2 * (4 * width) / 3)
    hidden = hidden if multiplier is None else int(multiplier * hidden)
    return -(-hidden // rounding) * rounding


def _ffn_words(config: LLaMAConfig) -> tuple[float | None, int]:
    """A multiplier and a rounding from which Meta's code computes F again."""
    if _ffn_width(config.width, None, _ROUNDING) == config.ffn_width:
        return None, _ROUNDING
    rounding = next(r for r in (_ROUNDING, 64, 16, 4, 1) if config.ffn_width % r == 0)
    multiplier = config.ffn_width / int(2 * (4 * config.width) / 3)
    for factor in (multiplier, multiplier * (1 + 1e-12)):  # the second where rounding fell short of an integer
        if _ffn_width(config.width, factor, rounding) == config.ffn_width:
            return factor, rounding
    raise ConfigError(f"ffn_width={config.ffn_width} is none that Meta's code can compute from width={config.width}.")
