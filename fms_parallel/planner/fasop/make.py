"""Measuring a profile in FASOP's form on the machine at hand: forward milliseconds of each module of a model.

It builds the modules' matrices in plain torch, cut as tp cuts them; torch is imported inside the functions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError
from fms_parallel.planner.fasop.tables import COLUMNS
from fms_parallel.shape import ModelShape


def measure_profile(
    shape: ModelShape, sequence: int, tp: int, rows: int, repeats: int = 5, device: str = "cpu"
) -> NDArray[Any]:
    """(rows, 10) milliseconds; row i is micro-batch 2^i of `sequence` tokens. Collectives of tp are not in it.

    Matrices are there one at a time, so that the largest has to fit, not a block.

    Raises:
        ConfigError: a tp that does not cut heads and feed-forward, no such device, or one with too little memory.
    """
    import torch

    if shape.heads % tp or shape.ffn_width % tp:
        raise ConfigError(f"tp={tp} does not divide {shape.heads} heads and feed-forward width {shape.ffn_width}.")
    matrices = _matrices(shape, tp)
    _check_memory(shape, list(matrices.values()), sequence * 2 ** (rows - 1), device)
    found = np.empty((rows, len(COLUMNS)))
    with torch.inference_mode():
        for column, name in enumerate(COLUMNS):
            work = _work(torch, name, matrices, device)
            for row in range(rows):
                found[row, column] = _milliseconds(torch, work(2**row * sequence), repeats, device)
    return found


def _matrices(shape: ModelShape, tp: int) -> dict[str, tuple[int, int]]:
    """Column of the profile -> (out, in) of its matrix on one rank; the embedding is whole, as in the original."""
    e, f, v = shape.width, shape.ffn_width // tp, -(-shape.vocab // tp)
    q, kv = shape.heads * shape.head_width // tp, max(shape.kv_heads // tp, 1) * shape.head_width
    sizes = ((shape.vocab, e), (q, e), (kv, e), (kv, e), (e, q), (f, e), (1, f), (f, e), (e, f), (v, e))
    return dict(zip(COLUMNS, sizes, strict=True))


def _work(torch: Any, name: str, matrices: Mapping[str, tuple[int, int]], device: str) -> Callable[[int], Any]:
    """From a number of tokens to one module's forward pass over them."""
    outputs, inputs = matrices[name]
    linear, silu, embedding = (getattr(torch.nn.functional, word) for word in ("linear", "silu", "embedding"))
    if name == "mlp_act_fn":
        return lambda tokens: partial(silu, torch.randn(tokens, inputs, device=device))
    weight = torch.randn(outputs, inputs, device=device)
    if name == "embed":
        return lambda tokens: partial(embedding, torch.randint(0, outputs, (tokens,), device=device), weight)
    return lambda tokens: partial(linear, torch.randn(tokens, inputs, device=device), weight)


def _check_memory(shape: ModelShape, matrices: Sequence[tuple[int, int]], tokens: int, device: str) -> None:
    """Raises ConfigError where the largest matrix, with what goes in and comes out, is more than the device has."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no GPU here: take --device cpu, or start where there is one.")
    if device == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = torch.cuda.mem_get_info()[0]
    needed = 4 * max(a * b + tokens * (a + b) for a, b in matrices[1:])
    needed = max(needed, 4 * (shape.vocab + tokens) * shape.width)
    if needed > there:
        raise ConfigError(
            f"the largest module needs {needed / 2**30:.1f} GiB and the device has {there / 2**30:.1f}: take a larger "
            "--tp, fewer --rows or a shorter --seq."
        )


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
