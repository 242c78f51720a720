"""Serving: time to the first token, tokens per second and KV memory of an engine cut by tp and pp.

It knows prefill and decode as rooflines over the same operators as training's forward pass; it knows no scheduler.

    prefill    the forward pass over the prompt, stage after stage
    decode     one token per sequence: every weight and every cached key and value is read once
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner.api import Planner
from fms_parallel.planner.columns import Columns
from fms_parallel.planner.hardware import GIB
from fms_parallel.planner.space import factorisations
from fms_parallel.planner.states import States
from fms_parallel.planner.topology import Group


@dataclass(frozen=True)
class Serving:
    """What one engine layout does for `batch` sequences at once.

    Attributes:
        ttft_s: time to the first token. token_s: time of one decode step. tokens_per_s: of all sequences together.
        weights_gb, kv_gb: 2^30 bytes per rank. max_batch: sequences whose cache fits beside the weights.
    """

    layout: ParallelLayout
    batch: int
    ttft_s: float
    token_s: float
    tokens_per_s: float
    weights_gb: float
    kv_gb: float
    max_batch: int


def serving(planner: Planner, batch: int, prompt: int, generated: int) -> list[Serving]:
    """Every tp x pp of the cluster that holds the model, most tokens per second first.

    Raises:
        ConfigError: no layout holds weights and cache; the message names the largest batch that fits, or the memory.
    """
    found = []
    shape = planner.model.shape
    for row in factorisations(planner.cluster.gpus, (True, False, False, False, True)):
        pp, tp = int(row[0]), int(row[4])
        fits = shape.heads % tp == 0 and (shape.kv_heads % tp == 0 or tp % shape.kv_heads == 0)
        if pp <= shape.layers and fits and shape.ffn_width % tp == 0:
            found.append(_one(planner, pp, tp, batch, prompt, generated))
    good = [s for s in found if s.max_batch >= batch]
    if not good:
        most = max((s.max_batch for s in found), default=0)
        way = f"a batch of at most {most}" if most else "more or larger devices: the weights alone do not fit"
        raise ConfigError(f"{planner.model.name} with {batch} sequences does not fit on {planner.cluster}: use {way}.")
    return sorted(good, key=lambda s: -s.tokens_per_s)


def _one(planner: Planner, pp: int, tp: int, batch: int, prompt: int, generated: int) -> Serving:
    shape, device, constants = planner.model.shape, planner.cluster.device, planner.constants
    width = planner.software.working_bytes
    blocks = -(-shape.layers // pp)
    row = Columns.of([{"tp": tp, "pp": pp, "micro": batch, "count": 1}])
    weights = width * rank_parameters(planner, row, blocks)
    length = prompt + generated
    cached = 2 * width * blocks * length * max(shape.kv_heads // tp, 1) * shape.head_width
    room = device.memory_gb * GIB - planner.software.reserve_gb * GIB - weights
    pieces = planner.costs.pieces(row)
    hop = pieces["hop"] * (pp - 1) / 2
    ttft = (shape.layers * pieces["forward"] + pieces["embedding_forward"] + pieces["head_forward"] / prompt) + hop
    bandwidth = device.memory_gb_s * 1e9 * constants.stream
    read = (weights + batch * cached * (prompt + generated / 2) / length) / bandwidth
    group = Group.of(np.array(tp), 1, device.per_node)
    size = batch * shape.width * width
    talk = 2 * blocks * float(planner.costs.collective("allreduce", size, group))
    host = blocks * 12 * constants.host_us * 1e-6
    across = Group.of(np.array(pp), tp, device.per_node)
    step = pp * (max(read, host) + talk) + (pp - 1) * float(planner.costs.collective("p2p", size, across))
    # With as many groups of sequences as stages, every stage is busy with one of them.
    rate = batch / step * min(pp, batch)
    layout = ParallelLayout(pp=pp, tp=tp, microbatches=1, precision="bf16")
    return Serving(layout, batch, ttft, step, rate, weights / GIB, batch * cached / GIB, max(int(room // cached), 0))


def rank_parameters(planner: Planner, row: Columns, blocks: int) -> float:
    """Parameters of the fullest rank: its blocks, and the ends of the model, of which a stage has at most one."""
    shape = planner.model.shape
    states = States(shape, row, planner.software, planner.model.experts)
    tp, alone = int(row.tp[0]), int(row.pp[0]) == 1
    table = shape.vocab * shape.width / tp
    positions = shape.max_positions * shape.width if shape.learned_positions else 0
    head = shape.norm_parameters + table
    ends = table + positions + (head - table * shape.tied) if alone else max(table + positions, head)
    return float(blocks * states.block()[0] + ends)
