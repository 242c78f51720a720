"""A tiny LLaMA and tiny data for the training tests, the same in every layout."""

from __future__ import annotations

from typing import Any

from torch import nn

from fms_parallel.data.rows import RandomRows
from fms_parallel.models import get_model

TINY = {"vocab_size": 61, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 38, "max_positions": 32}
OPTIONS = {"batch_size": 8, "lr": 1e-2, "warmup_steps": 2, "steps": 6}


def tiny(layout: str | None = None, **overrides: Any) -> nn.Module:
    """The model, from seed 0."""
    return get_model("llama", "micro", distributed_strategy=layout, **(TINY | overrides))


def rows(count: int = 40) -> RandomRows:
    """Rows of 13 tokens."""
    return RandomRows(seq_len=13, vocab_size=61, rows=count)
