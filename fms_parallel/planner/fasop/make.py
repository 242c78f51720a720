"""Measuring a profile in FASOP's form on the machine at hand: forward milliseconds of each module of a model.

It builds the modules' matrices in plain torch, cut as tp cuts them; torch is imported inside the functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError
from fms_parallel.shape import ModelShape


def measure_profile(
    shape: ModelShape, sequence: int, tp: int, rows: int, repeats: int = 5, device: str = "cpu"
) -> NDArray[Any]:
    """(rows, 10) milliseconds; row i is micro-batch 2^i of `sequence` tokens. Collectives of tp are not in it.

    Raises:
        ConfigError: a tp that does not cut heads and feed-forward.
    """
    import torch

    if shape.heads % tp or shape.ffn_width % tp:
        raise ConfigError(f"tp={tp} does not divide {shape.heads} heads and feed-forward width {shape.ffn_width}.")
    e, f, v = shape.width, shape.ffn_width // tp, -(-shape.vocab // tp)
    q, kv = shape.heads * shape.head_width // tp, max(shape.kv_heads // tp, 1) * shape.head_width
    sizes = {
        "q": (q, e),
        "k": (kv, e),
        "v": (kv, e),
        "o": (e, q),
        "gate": (f, e),
        "up": (f, e),
        "down": (e, f),
        "head": (v, e),
    }
    weights = {name: torch.randn(*size, device=device) for name, size in sizes.items()}
    table = torch.randn(shape.vocab, e, device=device)
    linear, silu, embedding = (getattr(torch.nn.functional, name) for name in ("linear", "silu", "embedding"))

    def row(batch: int) -> list[float]:
        tokens = torch.randint(0, shape.vocab, (batch, sequence), device=device)
        x = torch.randn(batch, sequence, e, device=device)
        heads, inner = torch.randn(batch, sequence, q, device=device), torch.randn(batch, sequence, f, device=device)
        work: list[Callable[[], Any]] = [
            lambda: embedding(tokens, table),
            *(lambda w=weights[name]: linear(x, w) for name in ("q", "k", "v")),  # type: ignore[misc]
            lambda: linear(heads, weights["o"]),
            lambda: linear(x, weights["gate"]),
            lambda: silu(inner),
            lambda: linear(x, weights["up"]),
            lambda: linear(inner, weights["down"]),
            lambda: linear(x, weights["head"]),
        ]
        return [_milliseconds(torch, one, repeats, device) for one in work]

    with torch.inference_mode():
        return np.array([row(2**i) for i in range(rows)])


def _milliseconds(torch: Any, work: Callable[[], Any], repeats: int, device: str) -> float:
    """Median; a GPU is waited for."""
    found = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        if number:
            found.append((time.perf_counter() - began) * 1e3)
    return float(np.median(found))
