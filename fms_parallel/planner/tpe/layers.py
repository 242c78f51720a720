"""The layers of one transformer block under 1D, 2D SUMMA and 2D sequence tensor parallelism.

It knows FLOPs, memory traffic, buffers and what is exchanged; it knows nothing of batches of a step or pipelines. Every
number may be an array over configurations. E = 2 bytes of an element, E1 = 1 byte of a dropout mask, in GB.

    m1, m2   shards; 1D: m1 = tp, m2 = 1; SUMMA: a grid m1 x m2; seqp: m1 over heads, m2 over the sequence
    t1, t2   how many of them share an NVLink domain
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.tpe.system import Model, System, collective

Array = NDArray[Any]

E, E1, TERA = 2e-9, 1e-9, 1e-12
OVERHEAD, REACHED = 20e-6, 0.8
"""Seconds that every operator pays, and the part of the peak that it reaches."""


@dataclass(frozen=True)
class Exchange:
    """One collective: its kind, GB (gathered), members, members in one domain."""

    kind: str
    volume: Array
    n: Array
    top: Array


@dataclass(frozen=True)
class Layer:
    """One layer. `flops`, `memory`, `exchanges`: (forward, backward), in FLOP and GB; `panels`: those of SUMMA."""

    name: str
    flops: tuple[Array, Array]
    memory: tuple[Array, Array]
    buffer: Array
    weights: Array
    exchanges: tuple[Sequence[Exchange], Sequence[Exchange]] = ((), ())
    matrix: bool = True
    panels: Array | None = None


@dataclass(frozen=True)
class Timed:
    """Seconds of a layer in one direction: arithmetic, memory that sticks out, communication that sticks out, all."""

    compute: Array
    memory: Array
    exchange: Array
    total: Array


@dataclass(frozen=True)
class Grid:
    """Configurations of one block: m1, m2, t1, t2, micro-batch b, SUMMA panels nb."""

    m1: Array
    m2: Array
    t1: Array
    t2: Array
    b: Array
    nb: Array = field(default_factory=lambda: np.ones(1, dtype=np.int64))


def timed(layer: Layer, system: System, backward: bool, compat: bool) -> Timed:
    """Seconds of one layer in one direction."""
    direction = int(backward)
    rate = system.matrix_flops_fp16 if layer.matrix else system.vector_flops_fp16
    compute = OVERHEAD + layer.flops[direction] * TERA / (REACHED * rate)
    memory = layer.memory[direction] / system.hbm_bandwidth
    busy = np.maximum(compute, memory)
    parts = None if layer.panels is None else layer.panels
    exchange = np.zeros_like(busy)
    for one in layer.exchanges[direction]:
        volume = one.volume if parts is None else one.volume / parts
        exchange = exchange + collective(system, one.kind, volume, one.n, one.top, compat)
    sticking = np.maximum(memory - compute, 0.0)
    if parts is not None:
        exchange = exchange + np.maximum(parts * exchange - busy, 0.0)
        sticking = np.maximum(memory - exchange, 0.0) if compat else sticking
    return Timed(compute, sticking, exchange, busy + exchange)


# ---- building blocks ------------------------------------------------------------------------------------------------


def _linear(name: str, tokens: Any, i: Any, o: Any, exchanges: Any) -> Layer:
    """(tokens, i) x (i, o), sizes of one shard."""
    fwd = tokens * o * (2 * i - 1)
    bwd = tokens * i * (2 * o - 1) + i * o * (2 * tokens - 1)
    moved = (tokens * i + tokens * o + i * o) * E
    return Layer(name, (fwd, bwd), (moved, 2 * moved), tokens * i * E, i * o * E, exchanges)


def _bias(name: str, tokens: Any, width: Any) -> Layer:
    n = tokens * width
    moved = (n + width) * E
    return Layer(name, (n, n), (moved, moved), np.zeros_like(moved), width * E + 0 * moved, matrix=False)


def _activation(name: str, n: Any) -> Layer:
    n = np.asarray(n, dtype=float)
    return Layer(name, (8 * n, 13 * n), (2 * n * E, 3 * n * E), n * E, np.zeros_like(n), matrix=False)


def _dropout(name: str, n: Any) -> Layer:
    n = np.asarray(n, dtype=float)
    moved = 2 * n * E + n * E1
    return Layer(name, (n, n), (moved, moved), n * E1, np.zeros_like(n), matrix=False)


def _norm(name: str, tokens: Any, e: Any, exchanges: Any) -> Layer:
    n = np.asarray(tokens * e, dtype=float)
    flops = 9 * n, 8 * n + 4 * tokens * (e - 1)
    moved = (2 * n + 2 * tokens + 2 * e) * E, (5 * n + 2 * e) * E
    return Layer(name, flops, moved, n * E, 2 * e * E + 0 * n, exchanges, matrix=False)


def _attention(model: Model, system: System, g: Grid, heads: Array, queries: Array, exchanges: Any) -> Layer:
    """Fused scores, softmax, dropout and values for `queries` rows against all l keys.

    Vector FLOPs count k-fold, so that the matrix rate gives their time.
    """
    q, k, keys = model.e // model.h, system.matrix_flops_fp16 / system.vector_flops_fp16, model.l
    bh = (g.b * heads).astype(float)
    area = bh * queries * keys
    scores, values = area * (2 * q - 1), bh * queries * q * (2 * keys - 1)
    softmax = k * (2 * area + bh * queries * (keys - 1))
    slope = k * (3 * area + bh * queries * (keys - 1))
    slopes = bh * keys * q * (2 * queries - 1)
    forward = scores + softmax + k * area + values
    backward = values + slopes + slope + k * area + scores + slopes + (scores + softmax + k * area)
    here, there = bh * queries * q, bh * keys * q
    buffer = (4 * here + 2 * bh * queries) * E
    moved = (2 * here + 2 * there + bh * queries) * E
    return Layer(
        "fusedla", (forward, backward), (moved, (2 * there + 2 * here) * E + buffer), buffer, 0 * buffer, exchanges
    )


# ---- 1D and 2D sequence ---------------------------------------------------------------------------------------------


def _shared(model: Model, system: System, g: Grid, sequence: bool, compat: bool) -> list[Layer]:
    """1D is the sequence form with m2 = 1, but for how two biases shard."""
    e, f, length = model.e, model.f, model.l
    local = length // g.m2
    tokens, outside = g.b * local, g.b * (local // g.m1 if sequence else length // g.m1)
    whole = np.asarray(g.b * local * e * E, dtype=float)
    none: tuple[Sequence[Exchange], Sequence[Exchange]] = ((), ())

    def over_heads(kind: str) -> list[Exchange]:
        return [Exchange(kind, whole, g.m1, g.t1)]

    def col(name: str, o: int) -> Layer:
        return _linear(name, tokens, e, o // g.m1, ([], over_heads("reducescatter")))

    def row(name: str, i: int) -> Layer:
        return _linear(name, tokens, i // g.m1, e, (over_heads("reducescatter"), []))

    kv = np.asarray(2 * g.b * (model.h // g.m1) * length * (e // model.h) * E, dtype=float)
    keys = [Exchange("allgather", kv, g.m2, g.t2)]
    exchanges = (keys, [*keys, Exchange("reducescatter", kv, g.m2, g.t2)]) if sequence else none
    between = (over_heads("allgather"), over_heads("reducescatter"))
    whole_bias, own_bias = (tokens, np.asarray(e)), (outside, np.asarray(e))
    second = whole_bias if compat and not sequence else own_bias
    third = (tokens, e // g.m1) if compat and sequence else second
    return [
        col("fc1", f),
        _bias("fc1-bias", tokens, f // g.m1),
        _activation("act1", tokens * (f // g.m1)),
        _dropout("dpr1", tokens * (f // g.m1)),
        row("fc2", f),
        _bias("fc2-bias", *second),
        _dropout("dpr2", outside * e),
        _norm("ln1", outside, np.asarray(e), between),
        col("qkv", 3 * e),
        _attention(model, system, g, model.h // g.m1, local, exchanges),
        row("vproj", e),
        _bias("vproj-bias", *third),
        _dropout("dpr_v", outside * e),
        _norm("ln2", outside, np.asarray(e), between),
    ]


def one_dimensional(model: Model, system: System, g: Grid, compat: bool) -> list[Layer]:
    """1D tensor parallelism over m1."""
    return _shared(model, system, g, False, compat)


def sequence(model: Model, system: System, g: Grid, compat: bool) -> list[Layer]:
    """2D: heads and matrices over m1, the sequence over m2; keys and values are gathered over m2."""
    return _shared(model, system, g, True, compat)


# ---- 2D SUMMA -------------------------------------------------------------------------------------------------------


def _panel_linear(name: str, g: Grid, tokens: Array, i: int, o: int) -> Layer:
    """Both matrices on the m1 x m2 grid; panels of them are broadcast while others are multiplied."""
    local = o // g.m1
    act, mat = np.asarray(tokens * i * E, dtype=float), np.asarray(i * local * E, dtype=float)
    out = tokens * local * g.nb * E
    flops = 2.0 * tokens * local * i, tokens * i * (2.0 * local - 1) + i * local * (2.0 * tokens - 1)
    a1, w2 = (Exchange("broadcast", act, g.m1, g.t1), Exchange("broadcast", mat, g.m2, g.t2))
    r1, r2 = (Exchange("reduce", act, g.m1, g.t1), Exchange("reduce", mat, g.m2, g.t2))
    return Layer(
        name,
        flops,
        (act + mat + out, 2 * (mat + out + act)),
        tokens * (i // g.m1) * E,
        (i // g.m2) * local * E,
        ([a1, w2], [w2, r1, a1, r2]),
        panels=g.nb,
    )


def summa(model: Model, system: System, g: Grid, compat: bool) -> list[Layer]:
    """2D SUMMA: activations and weights on an m1 x m2 grid."""
    e, f, local = model.e, model.f, model.l // g.m2
    tokens = g.b * local
    sums = np.asarray(2 * tokens * E, dtype=float)
    back = (2 * e // g.m1 + 2 * g.b * model.l // g.m2) * E
    norms = ([Exchange("allreduce", sums, g.m1, g.t1)], [Exchange("allreduce", back, g.m1, g.t1)])
    width = model.l // g.m1 if compat else e // g.m1
    kv = np.asarray(2 * g.b * (model.h // g.m1) * model.l * (e // model.h) * E, dtype=float)
    keys = [Exchange("allgather", kv, g.m2, g.t2)]
    exchanges = (keys, [*keys, Exchange("reducescatter", kv, g.m2, g.t2)])
    return [
        _panel_linear("fc1", g, tokens, e, f),
        _bias("fc1-bias", tokens, f // g.m1),
        _activation("act1", tokens * (f // g.m1)),
        _dropout("dpr1", tokens * (f // g.m1)),
        _panel_linear("fc2", g, tokens, f, e),
        _bias("fc2-bias", tokens, e // g.m1),
        _dropout("dpr2", tokens * (e // g.m1)),
        _norm("ln1", tokens, width, norms),
        _panel_linear("qkv", g, tokens, e, 3 * e),
        _attention(model, system, g, model.h // g.m1, local, exchanges),
        _panel_linear("vproj", g, tokens, e, e),
        _bias("vproj-bias", tokens, e // g.m1),
        _dropout("dpr_v", tokens * (e // g.m1)),
        _norm("ln2", tokens, width, norms),
    ]


BLOCKS: Mapping[str, Callable[[Model, System, Grid, bool], list[Layer]]] = {
    "1d": one_dimensional,
    "2d-summa": summa,
    "2d-seqp": sequence,
}
