"""A tiny LLaMA in three forms, in any layout: what the checkpoint tests load and save."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fms_parallel.layout import ParallelLayout
from fms_parallel.models.llama import LLaMA, LLaMAConfig
from fms_parallel.strategy.compose import compose

TINY = LLaMAConfig(vocab_size=61, width=24, layers=2, heads=4, kv_heads=2, ffn_width=38, max_positions=32)
"""61 and 38/4 are not whole: shards of unequal size."""
TIED = replace(TINY, tied=True)
FUSED = replace(TINY, fused=True, attention_bias=True, ffn_bias=True)


def build(config: LLaMAConfig, layout: str = "", seed: int = 0) -> nn.Module:
    """The model in a layout, with the weights of `seed`."""
    with torch.device("meta"):
        model = LLaMA(config)
    return compose(model, ParallelLayout.parse(layout), seed=seed)
