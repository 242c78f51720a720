"""The operator table: what one rank computes for one micro-batch, as a list of matrix products, attention and passes
over memory. Every size may be an array over many layouts.

It knows a model's shape and the shard factors; it knows nothing of devices and seconds.

Letters as in `fms_parallel.shape`; T = micro * S / cp tokens of one rank in attention and feed-forward, and T / tp of
them in norms and residuals with sp. FLOPs count 2 per multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import Columns
from fms_parallel.planner.software import Software
from fms_parallel.shape import ModelShape

Array = NDArray[Any]

MATMUL, ATTENTION, MEMORY = "matmul", "attention", "memory"


@dataclass(frozen=True)
class Op:
    """One operator of one rank and micro-batch.

    Attributes:
        kind: `matmul`, `attention` or `memory`. flops: forward. bytes: read and written, forward.
        shape: (m, n, k) of a matrix product. backward: multiples of `flops` and of `bytes` in the backward pass.
        kernels: forward and backward. core: belongs to the attention core that `selective` recomputes.
        precise: stays in 16 bit when matrices are multiplied in fp8. weight: parameters that the operator holds.
    """

    name: str
    kind: str
    flops: Array
    bytes: Array
    shape: tuple[Array, Array, Array] | None = None
    backward: tuple[float, float] = (2.0, 2.0)
    kernels: tuple[int, int] = (1, 2)
    core: bool = False
    precise: bool = False
    weight: Array = field(default_factory=lambda: np.zeros(()))


@dataclass(frozen=True)
class Workload:
    """What is trained: `global_batch` sequences of `sequence` tokens per step, in `precision`."""

    global_batch: int
    sequence: int
    precision: str = "bf16"


def tokens_of(columns: Columns, sequence: int) -> Array:
    """T: tokens of one rank and micro-batch inside attention and feed-forward."""
    return np.asarray(columns.micro * sequence / columns.cp)


def matmul(name: str, m: Any, n: Any, k: Any, width: float, count: Any = 1.0, precise: bool = False) -> Op:
    """`count` products (m, k) x (k, n) of elements of `width` bytes."""
    m, n, k, count = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (m, n, k, count)))
    size = width * (m * k + k * n + m * n)
    return Op(name, MATMUL, 2 * m * n * k * count, size * count, (m, n, k), precise=precise, weight=n * k * count)


def _memory(name: str, size: Any, backward: float, kernels: tuple[int, int], core: bool = False) -> Op:
    size = np.asarray(size, dtype=float)
    return Op(name, MEMORY, np.zeros_like(size), size, None, (0.0, backward), kernels, core)


def attention_operators(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> list[Op]:
    """A block without its feed-forward: attention with its projections, norms, residuals, rotary positions."""
    tokens = tokens_of(columns, sequence)
    outside = tokens / np.where(columns.sp == 1, columns.tp, 1)
    width = software.working_bytes
    heads = shape.heads / columns.tp
    groups = np.maximum(shape.kv_heads / columns.tp, 1)
    depth = shape.head_width
    ops = [
        matmul("qkv", tokens, (heads + 2 * groups) * depth, shape.width, width),
        *_attention(shape, columns, sequence, software),
        matmul("attention out", tokens, shape.width, heads * depth, width),
        *_outside(shape, outside, software),
    ]
    if not shape.learned_positions:
        ops.append(_memory("rope", software.elementwise * 2 * width * tokens * (heads + groups) * depth, 1.0, (2, 2)))
    return ops


def feed_forward_operators(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> list[Op]:
    """A dense feed-forward: one or two matrices up, activation, one down."""
    tokens = tokens_of(columns, sequence) * columns.tp_of_ffn / columns.tp
    width, ffn, ups = software.working_bytes, shape.ffn_width / columns.tp_of_ffn, 2 if shape.gated else 1
    passes = ups + 1 + (ups if shape.ffn_bias and not software.fused_elementwise else 0)
    return [
        matmul("up", tokens, ups * ffn, shape.width, width),
        _memory("activation", software.elementwise * width * tokens * ffn * passes, 1.6, (ups, ups)),
        matmul("down", tokens, shape.width, ffn, width),
    ]


def _attention(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> list[Op]:
    """Scores and their product with values; causal attention computes half where the software skips the rest."""
    part = 0.5 if software.causal_skip else 1.0
    keys = columns.micro * (shape.heads / columns.tp) * (sequence / columns.cp) * sequence
    flops = 4 * keys * shape.head_width * part
    tokens = tokens_of(columns, sequence)
    traffic = software.working_bytes * 2 * tokens * (shape.heads + shape.kv_heads) * shape.head_width / columns.tp
    if software.fused_attention:
        return [Op("attention", ATTENTION, flops, traffic, None, (2.5, 2.5), (1, 3), core=True)]
    rows = np.broadcast_to(np.asarray(float(sequence)), flops.shape)
    # Scores written, softmax read and written, dropout read and written with its mask, read by the second product.
    passes = 2 + 4 + (5 if software.dropout else 0) + 2
    return [
        Op(
            "attention products",
            MATMUL,
            flops,
            traffic,
            (rows, rows, np.full_like(rows, shape.head_width)),
            (2.0, 2.0),
            (2, 4),
            core=True,
        ),
        _memory("softmax", keys * passes * software.working_bytes / 2, 1.2, (3, 3), core=True),
    ]


def _outside(shape: ModelShape, tokens: Array, software: Software) -> list[Op]:
    """Two norms and two residual sums, on the tokens that a rank holds there."""
    width, passes = software.working_bytes, 2 if software.fused_elementwise else 3
    mask = 0.5 * software.dropout
    return [
        _memory("norms", software.elementwise * 2 * tokens * shape.width * width * 2, 2.0, (2, 4)),
        _memory("residuals", 2 * tokens * shape.width * width * (passes + mask), 0.7, (2, 2)),
    ]


def head_operators(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> list[Op]:
    """After the last block: the last norm, the head over the vocabulary, the loss in fp32."""
    tokens = tokens_of(columns, sequence)
    vocabulary = shape.vocab / columns.tp
    return [
        _memory("last norm", tokens * shape.width * software.working_bytes * 2, 2.0, (1, 2)),
        matmul("head", tokens, vocabulary, shape.width, software.working_bytes, precise=True),
        # Cast to fp32, maximum, exponentials, sum; the gradient once, cast back.
        _memory("loss", software.elementwise * tokens * vocabulary * (2 + 4 + 4 + 4 + 4), 1.0, (6, 4)),
    ]


def embedding_operators(shape: ModelShape, columns: Columns, sequence: int, software: Software) -> list[Op]:
    """Before the first block: rows of the table, and their scattered gradient."""
    tokens = tokens_of(columns, sequence)
    return [_memory("embedding", tokens * shape.width * software.working_bytes * 2, 3.0, (2, 3))]
