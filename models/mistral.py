"""Mistral (arXiv 2310.06825): LLaMA whose queries see a window of the latest positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.modules.context import last_position
from fms_parallel.modules.sequences import Sequences

from .hf.llama import Fields, hf_adapter, read_fields, written_fields
from .llama import MICRO, LLaMA, LLaMAConfig
from .registry import Architecture, register_model


@dataclass(frozen=True)
class MistralConfig(LLaMAConfig):
    """A LLaMA's fields, and one more.

    Attributes:
        window: a query sees itself and the window - 1 positions before it; None: all of them.
    """

    kv_heads: int | None = 8
    ffn_width: int = 14336
    max_positions: int = 32768
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window}: a query sees at least itself; None is no window.")


class Mistral(LLaMA):
    """LLaMA under a windowed mask, which every block shares; none is made while all positions fit the window."""

    config: MistralConfig

    def sequences(self, batch: int, length: int, positions: Tensor, first_position: int = 0, **more: Any) -> Sequences:
        """As LLaMA's, with the mask that the window leaves."""
        seq = super().sequences(batch, length, positions, first_position, **more)
        if seq.ragged is not None:
            return replace(seq, window=self.config.window)
        end = last_position(length, first_position, seq.context)
        if self.config.window is None or end <= self.config.window:
            return seq
        if seq.context is None:
            seen = window_mask(length, end, self.config.window, positions.device)
        else:
            seen = seq.context.cut(window_mask(end, end, self.config.window, positions.device), -2)
        return replace(seq, mask=seen if seq.mask is None else seq.mask & seen)


def window_mask(s: int, t: int, window: int, device: torch.device) -> Tensor:
    """Bool `[S, T]` for the last S of T positions: True where key j is one of the `window` up to query i."""
    query = torch.arange(t - s, t, device=device).unsqueeze(1)
    key = torch.arange(t, device=device)
    return (key <= query) & (key > query - window)


VARIANTS = {
    "micro": MistralConfig(**MICRO, kv_heads=2, window=256),
    "7b": MistralConfig(window=4096),
    "0.2-7b": MistralConfig(rope_base=1e6),
    "0.3-7b": MistralConfig(vocab_size=32768, rope_base=1e6),
    "nemo-12b": MistralConfig(
        vocab_size=131072, width=5120, layers=40, head_width=128, rope_base=1e6, max_positions=131072
    ),
}
_OWN: Fields = {"kv_heads": ("num_key_value_heads", 8), "window": ("sliding_window", 4096)}


def config_from_hf(raw: Mapping[str, Any]) -> MistralConfig:
    """The config that a `config.json` of model type `mistral` describes; errors of `read_fields`."""
    return MistralConfig(**read_fields(raw, "mistral", _OWN))


def config_to_hf(config: MistralConfig) -> dict[str, Any]:
    """The way back; errors of `written_fields`."""
    return written_fields(config, "mistral", "MistralForCausalLM", _OWN)


register_model(
    Architecture(
        name="mistral",
        build=Mistral,
        variants=VARIANTS,
        adapters={"hf": hf_adapter},
        from_hf=config_from_hf,
        to_hf=config_to_hf,
        hf_classes=("MistralForCausalLM",),
    )
)
