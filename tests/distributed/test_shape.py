"""`ModelShape.activation_bytes` against what autograd keeps on each of two ranks. One process: tests/test_shape.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from tests.saved import saved_bytes

B, S = 2, 48
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tp=2", {}),
    ("tp=2", {"kv_heads": 1}),  # each rank keeps the one kv head
    ("tp=2,sp", {}),
    ("tp=2,sp", {"kv_heads": 2}),
]


def measured() -> list[tuple[int, int]]:
    """(kept, predicted) of every case on this rank."""
    found = []
    for words, switches in CASES:
        layout = ParallelLayout.parse(words)
        model = get_model("llama", "micro", layers=3, distributed_strategy=layout, **switches)
        config: Any = model.config
        ids = torch.arange(B * S).view(B, S)
        kept = saved_bytes(model, ids, ids) - 4 * config.vocab_size * config.width // layout.tp
        predicted = config.activation_bytes(B, S, bytes_per_element=4, tp=layout.tp, sp=layout.sp)
        found.append((kept, predicted))
    return found


def test_activation_bytes_are_those_that_autograd_keeps_on_each_rank() -> None:
    """Beside the head's gradient, which the loss keeps."""
    for rank in run_ranks(measured, 2):
        for case, (kept, predicted) in zip(CASES, rank, strict=True):
            assert kept == pytest.approx(predicted, rel=0.01), case
