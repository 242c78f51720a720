"""Mixtral (arXiv 2401.04088): Mistral whose feed-forward is a few of several experts, chosen for every token.

Training adds no load-balancing loss: that of Hugging Face, off unless `output_router_logits` asks for it, averages over
whatever tokens one process happens to see, so it would be another loss in every layout. Its coefficient is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fms_parallel.checkpoint.adapter import Adapter, Drop, Rename, Stack, Step
from fms_parallel.errors import ConfigError
from fms_parallel.modules.experts import Experts
from fms_parallel.shape import ModelShape

from .hf.llama import OUTER_NAMES, Fields, read_fields, stored_form, written_fields
from .llama import MICRO, LLaMABlock, LLaMAConfig
from .mistral import Mistral, MistralConfig
from .registry import Architecture, register_model


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """A Mistral's fields, and those of the experts; ffn_width is that of one of them.

    Attributes:
        experts: X. experts_used: of them, by each token.
        router_loss: coefficient of the load-balancing loss, kept for the way back to Hugging Face (see above).
        fused: as LLaMA's, for query, key and value; experts are stored apart.
    """

    rope_base: float = 1e6
    experts: int = 8
    experts_used: int = 2
    router_loss: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_bias:
            raise ConfigError("ffn_bias: experts have no biases; leave it out.")

    def shape(self) -> ModelShape:
        """As LLaMA's, with the experts."""
        return replace(super().shape(), experts=self.experts, experts_used=self.experts_used)


class MixtralBlock(LLaMABlock):
    """LLaMA's block around experts. It needs no twin: what it calls has one."""

    def make_feed_forward(self, config: LLaMAConfig) -> nn.Module:
        """The experts."""
        assert isinstance(config, MixtralConfig)
        sizes = (config.width, config.ffn_width, config.experts, config.experts_used)
        return Experts(*sizes, config.activation, std=config.std, out_std=config.out_std)


class Mixtral(Mistral):
    """Mistral of these blocks."""

    block = MixtralBlock


_8X22B: dict[str, Any] = {"width": 6144, "layers": 56, "heads": 48, "ffn_width": 16384, "max_positions": 65536}

VARIANTS = {
    "micro": MixtralConfig(**MICRO, kv_heads=2, experts=4),
    "8x7b": MixtralConfig(),
    "8x22b": MixtralConfig(**_8X22B, vocab_size=32000),
}


# ---- Hugging Face keys and config -------------------------------------------------------------------------------

_MOE = "model.layers.{n}.block_sparse_moe."
_MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}  # theirs -> ours


def hf_adapter(config: MixtralConfig) -> Adapter:
    """Between Hugging Face's keys, one for each expert's matrix, and ours."""
    ffn = "layers.{n}.feed_forward."
    apart = tuple(
        (f"{_MOE}experts.{expert}.{theirs}.weight", f"{ffn}{expert}.{ours}")
        for expert in range(config.experts)
        for theirs, ours in _MATRICES.items()
    )
    stacked: list[Step] = [
        Stack(tuple(f"{ffn}{expert}.{ours}" for expert in range(config.experts)), f"{ffn}{ours}")
        for ours in _MATRICES.values()
    ]
    names = (*OUTER_NAMES, (f"{_MOE}gate.weight", f"{ffn}router"), *apart)
    return Adapter("hf", (Drop(("*.rotary_emb.inv_freq",)), Rename(names), *stacked, *stored_form(config, dense=False)))


_OWN: Fields = {
    "kv_heads": ("num_key_value_heads", 8),
    "window": ("sliding_window", None),
    "experts": ("num_local_experts", 8),
    "experts_used": ("num_experts_per_tok", 2),
    "router_loss": ("router_aux_loss_coef", 0.001),
}
_OFF = {"output_router_logits": False, "router_jitter_noise": 0.0}


def config_from_hf(raw: Mapping[str, Any]) -> MixtralConfig:
    """The config that a `config.json` of model type `mixtral` describes.

    Raises:
        ConfigError: as `read_fields`; a load-balancing loss that is switched on, or a noisy router.
    """
    for name, value in _OFF.items():
        if raw.get(name, value) not in (value, None):
            raise ConfigError(f"config.json says {name}={raw[name]}: only {value} is supported.")
    return MixtralConfig(**read_fields({k: v for k, v in raw.items() if k not in _OFF}, "mixtral", _OWN, 1e6))


def config_to_hf(config: MixtralConfig) -> dict[str, Any]:
    """The way back; errors of `written_fields`."""
    return written_fields(config, "mixtral", "MixtralForCausalLM", _OWN) | _OFF


register_model(
    Architecture(
        name="mixtral",
        build=Mixtral,
        variants=VARIANTS,
        adapters={"hf": hf_adapter},
        from_hf=config_from_hf,
        to_hf=config_to_hf,
        hf_classes=("MixtralForCausalLM",),
    )
)
