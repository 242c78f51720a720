"""Granite 3 (github.com/ibm-granite/granite-3.0-language-models): LLaMA with four constant multipliers.

They keep activations and gradients of one size whatever the width (maximal update parametrisation, arXiv 2203.03466).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fms_parallel.modules.attention import AttentionShape
from fms_parallel.modules.sequences import Sequences

from .hf.llama import BIASES, Fields, hf_adapter, read_fields, written_fields
from .llama import MICRO, LLaMA, LLaMABlock, LLaMAConfig
from .registry import Architecture, register_model


@dataclass(frozen=True)
class GraniteConfig(LLaMAConfig):
    """A LLaMA's fields, and four factors.

    Attributes:
        embedding_multiplier: of the embedding. attention_multiplier: of the scores, instead of 1 / sqrt(D).
        residual_multiplier: of what each half of a block adds. logits_scaling: what logits are divided by.
    """

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def attention_shape(self) -> AttentionShape:
        """As LLaMA's, with its own scale."""
        return replace(super().attention_shape(), scale=self.attention_multiplier)


class GraniteBlock(LLaMABlock):
    """x + r * attention(norm(x)), then + r * feed_forward(norm(.)). It needs no twin: what it calls has one."""

    def __init__(self, config: GraniteConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), seq), seq) * self.multiplier
        return x + self.ffn_dropout(self.feed_forward(self.ffn_norm(x)), seq) * self.multiplier


class Granite(LLaMA):
    """LLaMA with factors where tokens come in and logits go out."""

    config: GraniteConfig
    block = GraniteBlock

    def enter(self, input_ids: Tensor, seq: Sequences) -> Tensor:
        """Ids `[B, S]` -> what the first block reads."""
        return super().enter(input_ids, seq) * self.config.embedding_multiplier

    def leave(self, x: Tensor, seq: Sequences, labels: Tensor | None = None, last: int | None = None) -> Tensor:
        """What the last block made -> logits or loss. Dividing what the head reads divides the logits."""
        return self.head(self.norm(x) / self.config.logits_scaling, seq, labels, last)


_FACTORS31: dict[str, Any] = {"tied": True, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
_GRANITE31 = GraniteConfig(
    vocab_size=49155, layers=40, kv_heads=8, max_positions=131072, bos_id=0, eos_id=0, pad_id=0, **_FACTORS31
)
_2B: dict[str, Any] = {"width": 2048, "ffn_width": 8192, "attention_multiplier": 0.015625, "logits_scaling": 8.0}
_8B: dict[str, Any] = {"width": 4096, "ffn_width": 12800, "attention_multiplier": 0.0078125, "logits_scaling": 16.0}

VARIANTS = {
    "micro": GraniteConfig(**MICRO, **_FACTORS31, kv_heads=2, attention_multiplier=1 / 48, logits_scaling=8.0),
    "3.0-2b": replace(_GRANITE31, **_2B, max_positions=4096),
    "3.0-8b": replace(_GRANITE31, **_8B, max_positions=4096),
    "3.1-2b": replace(_GRANITE31, **_2B, rope_base=5e6),
    "8b": replace(_GRANITE31, **_8B, rope_base=1e7),
    "3.1-8b": replace(_GRANITE31, **_8B, rope_base=1e7),
}
_FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_OWN: Fields = {**BIASES, **{name: (name, 1.0) for name in _FACTORS}}


def config_from_hf(raw: Mapping[str, Any]) -> GraniteConfig:
    """The config that a `config.json` of model type `granite` describes; errors of `read_fields`."""
    return GraniteConfig(**read_fields(raw, "granite", _OWN))


def config_to_hf(config: GraniteConfig) -> dict[str, Any]:
    """The way back; errors of `written_fields`."""
    return written_fields(config, "granite", "GraniteForCausalLM", _OWN)


register_model(
    Architecture(
        name="granite",
        build=Granite,
        variants=VARIANTS,
        adapters={"hf": hf_adapter},
        from_hf=config_from_hf,
        to_hf=config_to_hf,
        hf_classes=("GraniteForCausalLM",),
    )
)
