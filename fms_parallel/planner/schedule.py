"""Pipeline schedules in closed form: idle time, and how blocks are cut into stages.

It knows counts; seconds come in as arrays. `simulate` runs the same schedules event by event and is what these formulas
are tested against.

    p stages, m micro-batches, v stages per rank; f and b seconds of one micro-batch on one rank, w the part of b that
    makes weight gradients (bubbles: Narayanan et al. 2021, arXiv 2104.04473; Qi et al. 2023, arXiv 2401.10241)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.planner.columns import SCHEDULES, Columns
from fms_parallel.schedules import SCHEDULES as WORDS

Array = NDArray[Any]

CODE = {name: index for index, name in enumerate(SCHEDULES)}

FILLS = tuple(code for name, code in CODE.items() if WORDS[name].fills)
"""Schedules that need as many micro-batches as stages."""
SPLITS = tuple(code for name, code in CODE.items() if WORDS[name].splits_backward)
"""Schedules that find weight gradients in a pass of their own."""
TURNS = tuple(code for name, code in CODE.items() if WORDS[name].shape == "v")
"""Schedules with the first and the last stage on one rank."""


def blocks_of_stages(layers: int, columns: Columns, head_blocks: Any) -> tuple[Array, Array, Array]:
    """Blocks of a full stage, of the last stage, and full stages: a lighter last stage makes room for the head.

    `head_blocks`: the head's time in blocks. The first `full` stages hold `most` blocks, the others `most - 1`; the
    last one holds `last`.
    """
    stages = columns.pp * columns.virtual
    head = np.broadcast_to(np.asarray(head_blocks, dtype=float), stages.shape)
    most = np.maximum(np.ceil((layers + head) / stages - 1e-9).astype(np.int64), 1)
    last = np.clip(np.floor(most - head + 1e-9).astype(np.int64), 1, most)
    # What the others hold must be layers - last, between most - 1 and most each.
    others = np.maximum(stages - 1, 1)
    last = np.where(stages == 1, layers, np.clip(last, layers - others * most, layers - others))
    last = np.maximum(last, 1)
    most = np.where(stages == 1, layers, -(-(layers - last) // others))
    full = np.where(stages == 1, 1, layers - last - others * (most - 1))
    return most, last, full


def blocks_of_ranks(columns: Columns, most: Array, last: Array, full: Array) -> tuple[Array, Array]:
    """Blocks of the fullest rank that does not hold the last stage, and of the one that does, over all their stages.

    Stage s lies on rank s % pp; in a V schedule on min(s, 2 pp - 1 - s), so that the first rank holds the last stage.
    """
    pp, v = columns.pp, columns.virtual
    vee = (columns.schedule == CODE["zbv"]) | (columns.schedule == CODE["dualpipev"])
    loop = v * (most - 1) + np.minimum(-(-full // pp), v), (v - 1) * (most - 1) + np.minimum(full // pp, v - 1) + last
    bent = 2 * (most - 1) + np.minimum(full, 1) + (full > pp), most - 1 + np.minimum(full, 1) + last
    whole = np.where(pp == 1, most, 0)
    fullest = np.where(pp == 1, whole, np.where(vee, bent[0], loop[0]))
    return fullest, np.where(pp == 1, whole, np.where(vee, bent[1], loop[1]))


def stage_split(layers: int, most: int, last: int, full: int, stages: int) -> tuple[int, ...]:
    """The blocks of each stage that `blocks_of_stages` counted."""
    if stages == 1:
        return (layers,)
    return (*[most] * full, *[most - 1] * (stages - 1 - full), last)


def bubble(columns: Columns, forward: Array, backward: Array, weight: Array) -> Array:
    """Seconds in which a rank waits while the pipeline fills and drains.

    `forward`, `backward`, `weight`: seconds of one micro-batch on one rank, over all its stages.
    """
    ramp = columns.pp - 1
    both = forward + backward
    code = columns.schedule
    idle = ramp * both / columns.virtual
    zero_bubble = ramp * np.maximum(both - 2 * weight, 0.0) / columns.virtual
    two_way = np.maximum(ramp * (both - 2 * weight) / 2, 0.0) * np.where(columns.count >= 2 * columns.pp, 0.0, 1.0)
    idle = np.where(code == CODE["interleaved_zero_bubble"], zero_bubble, idle)
    return np.where((code == CODE["zbv"]) | (code == CODE["dualpipev"]), two_way, idle)
