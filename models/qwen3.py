"""Qwen3 (arXiv 2505.09388): LLaMA with normalised queries and keys and a head width of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fms_parallel.errors import ConfigError

from .hf.llama import Fields, hf_adapter, read_fields, written_fields
from .llama import MICRO, LLaMA, LLaMAConfig
from .registry import Architecture, register_model


@dataclass(frozen=True)
class Qwen3Config(LLaMAConfig):
    """A LLaMA's fields at Qwen3's values."""

    vocab_size: int = 151936
    kv_heads: int | None = 8
    head_width: int | None = 128
    qk_norm: bool = True
    max_positions: int = 40960
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    bos_id: int | None = 151643
    eos_id: int | None = 151645


VARIANTS = {
    "micro": Qwen3Config(**MICRO, kv_heads=2, head_width=64),
    "0.6b": Qwen3Config(width=1024, layers=28, heads=16, ffn_width=3072, tied=True),
    "1.7b": Qwen3Config(width=2048, layers=28, heads=16, ffn_width=6144, tied=True),
    "4b": Qwen3Config(width=2560, layers=36, ffn_width=9728, tied=True),
    "8b": Qwen3Config(width=4096, layers=36, ffn_width=12288),
    "14b": Qwen3Config(width=5120, layers=40, heads=40, ffn_width=17408),
    "32b": Qwen3Config(width=5120, layers=64, heads=64, ffn_width=25600),
}
_OWN: Fields = {
    "attention_bias": ("attention_bias", False),
    "kv_heads": ("num_key_value_heads", 32),
    "head_width": ("head_dim", 128),
}
_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def config_from_hf(raw: Mapping[str, Any]) -> Qwen3Config:
    """The config that a `config.json` of model type `qwen3` describes.

    Raises:
        ConfigError: as `read_fields`; layers with a sliding window.
    """
    windowed = [kind for kind in raw.get("layer_types") or () if kind != "full_attention"]
    if raw.get("use_sliding_window") or windowed:
        raise ConfigError("config.json has use_sliding_window or layer_types other than full_attention: not supported.")
    return Qwen3Config(**read_fields({k: v for k, v in raw.items() if k not in _WINDOW}, "qwen3", _OWN), qk_norm=True)


def config_to_hf(config: Qwen3Config) -> dict[str, Any]:
    """The way back; errors of `written_fields`."""
    return written_fields(config, "qwen3", "Qwen3ForCausalLM", _OWN, qk_norm=True) | {"use_sliding_window": False}


register_model(
    Architecture(
        name="qwen3",
        build=LLaMA,
        variants=VARIANTS,
        adapters={"hf": hf_adapter},
        from_hf=config_from_hf,
        to_hf=config_to_hf,
        hf_classes=("Qwen3ForCausalLM",),
    )
)
