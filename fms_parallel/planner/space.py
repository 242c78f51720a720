"""The layouts that a search looks at, as columns, and the rules that reject one before anything is priced.

It knows divisibility and a person's pins; it knows nothing of seconds and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import ConfigError, LayoutError, unknown
from fms_parallel.layout import AXES, TP_PARTS
from fms_parallel.planner import schedule
from fms_parallel.planner.columns import OFFLOADS, RECOMPUTE, SCHEDULES, Columns, read_policy
from fms_parallel.shape import ModelShape
from fms_parallel.words import recompute_number

Array = NDArray[Any]

COMPARE: Mapping[str, Callable[[Array, int], Array]] = {
    "<=": np.less_equal,
    ">=": np.greater_equal,
    "!=": np.not_equal,
    "==": np.equal,
    "<": np.less,
    ">": np.greater,
    "=": np.equal,
}
PINNABLE = (*AXES, "virtual", "micro", "count", "zero", "sp", "kept")
COLUMN_OF = {"microbatches": "count", "micro_batch": "micro", "virtual_stages": "virtual", "keep_gathered": "kept"}
POLICIES = ("sp", "virtual", "schedule", "recompute", "every", "budget", "offload", "zero", "kept", "tp_parts")
WORDS = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "offload": OFFLOADS, "tp_parts": TP_PARTS}


@dataclass(frozen=True)
class Space:
    """What a search may use.

    Attributes:
        schedules, recompute, offloads: words of the layout, `every=N` and `budget=PART` among them. max_virtual: stages
            per rank of schedules that interleave. max_micro: largest micro-batch. pins: words as in `tp<=8`, `pp=4`.
            exclude: axes that stay 1, or words of a policy. zero: ZeRO stages over dp; only 0 has a word in
            `ParallelLayout`. keep_gathered: blocks that stay gathered; None: as many as memory has room for, where that
            makes a step faster, or what pins name.
    """

    schedules: Sequence[str] = ("1f1b", "interleaved1f1b", "zbv")
    recompute: Sequence[str] = RECOMPUTE[:3]
    offloads: Sequence[str] = ("none",)
    max_virtual: int = 8
    max_micro: int | None = None
    pins: Sequence[str] = ()
    exclude: Sequence[str] = ()
    zero: Sequence[int] = (0,)
    keep_gathered: Sequence[int] | None = None
    axes: Sequence[str] = field(default=AXES)


def candidates(gpus: int, global_batch: int, space: Space) -> Columns:
    """Every combination of degrees whose product is `gpus`, policies, and micro-batches that divide the batch."""
    degrees = factorisations(gpus, tuple(axis in space.axes and axis not in space.exclude for axis in AXES))
    policies = _policies(space)
    micro = _micro_batches(degrees[:, 1] * degrees[:, 2], global_batch, space.max_micro)
    rows, slot = np.nonzero(micro > 0)
    degrees, micro = degrees[rows], micro[rows, slot]
    count = global_batch // (degrees[:, 1] * degrees[:, 2]) // micro
    # One row of policies for each row of degrees, without building what a rule of the words forbids.
    wide = dict(zip((*AXES, "micro", "count"), (*degrees.T, micro, count), strict=True))
    narrow = dict(zip(POLICIES, policies.T, strict=True))
    columns = Columns(
        **{name: np.repeat(column, len(policies)) for name, column in wide.items()},
        **{name: np.tile(column, len(degrees)) for name, column in narrow.items()},
    )
    return columns.take(_possible_words(columns))


def _possible_words(columns: Columns) -> Array:
    """A policy without its axis is no layout of its own: sp needs tp, a schedule needs pp, ZeRO over dp needs dp."""
    no_pipeline = (columns.schedule == 0) & (columns.virtual == 1)
    return (
        ((columns.tp > 1) | (columns.sp == 0))
        & ((columns.sp == 1) | (columns.tp_parts == 0))
        & ((columns.pp > 1) | no_pipeline)
        & ((columns.dp > 1) | (columns.zero == 0))
        & ((columns.fsdp == 1) | (columns.zero == 0))
        & (((columns.fsdp > 1) & (columns.pp == 1)) | (columns.kept == 0))
    )


@lru_cache(maxsize=64)
def factorisations(gpus: int, allowed: tuple[bool, ...]) -> Array:
    """Degrees (pp, dp, fsdp, cp, tp) with product `gpus`, one row each; axes that are not allowed stay 1."""
    divisors = [d for d in range(1, gpus + 1) if gpus % d == 0]
    rows: list[tuple[int, ...]] = [()]
    for axis, free in enumerate(allowed):
        last = axis == max((i for i, ok in enumerate(allowed) if ok), default=-1)
        rows = [
            (*row, d)
            for row in rows
            for rest in (gpus // int(np.prod(row or (1,))),)
            for d in (((rest,) if last else divisors) if free else (1,))
            if rest % d == 0
        ]
    whole = [row for row in rows if int(np.prod(row)) == gpus]
    return np.array(whole, dtype=np.int64).reshape(-1, len(allowed))


def _policies(space: Space) -> Array:
    """Rows of `POLICIES`."""
    pipelines: list[tuple[int, int]] = []
    for word in space.schedules:
        if word not in SCHEDULES:
            raise ConfigError(unknown("schedule", word, SCHEDULES))
        code = SCHEDULES.index(word)
        if word in ("zbv", "dualpipev"):
            pipelines.append((2, code))
        elif word in ("interleaved1f1b", "looped_bfs", "interleaved_zero_bubble"):
            pipelines += [(v, code) for v in (2, 3, 4, 5, 6, 8, 10, 12, 16) if v <= space.max_virtual]
        else:
            pipelines.append((1, code))
    if (1, 0) not in pipelines:
        pipelines.append((1, 0))  # pp = 1 needs it; rejected by a rule of its own where pp > 1
    return np.array(
        [
            (sp, v, code, *_recompute(policy), OFFLOADS.index(offload), zero, kept, parts)
            for sp in (0, 1)
            for v, code in pipelines
            for policy in space.recompute
            for offload in space.offloads
            for zero in space.zero
            for kept in kept_blocks(space)
            for parts in tp_parts(space)
        ],
        dtype=np.int64,
    )


def kept_blocks(space: Space) -> Sequence[int]:
    """Numbers of blocks that stay gathered: those of the space, or 0 and those around the numbers in pins."""
    if space.keep_gathered is not None:
        return space.keep_gathered
    numbers = {0}
    for pin in space.pins:
        found = re.fullmatch(r"\s*(?:kept|keep_gathered)\s*\D+(\d+)\s*", pin)
        near = range(max(int(found[1]) - 1, 0), int(found[1]) + 2) if found else ()
        numbers.update(near)
    return sorted(numbers)


def tp_parts(space: Space) -> Sequence[int]:
    """Indices of `TP_PARTS`: cut all, and the other where a pin speaks of it; a search looks at that by itself."""
    return range(len(TP_PARTS)) if any(re.match(r"\s*tp_parts\b", pin) for pin in space.pins) else (0,)


def _recompute(policy: str) -> tuple[int, int, int]:
    """(index of the policy, each how many blocks, budget): `every=4` is full for each fourth block.

    Raises:
        ConfigError: no policy that a layout has.
    """
    try:
        number = recompute_number(policy)
    except LayoutError as error:
        raise ConfigError(f"--recompute: {error}") from None
    index, budget = read_policy(policy)
    return index, max(int(number), 1), budget


def _micro_batches(replicas: Array, global_batch: int, largest: int | None) -> Array:
    """Per row of degrees: micro-batches that divide its share of the batch, and zeros."""
    sizes = np.array(
        [m for m in range(1, min(global_batch, largest or 1024) + 1) if global_batch % m == 0], dtype=np.int64
    )
    share = global_batch // replicas
    fits = (global_batch % replicas == 0)[:, None] & (share[:, None] % sizes[None, :] == 0) & (sizes <= share[:, None])
    return np.where(fits, sizes[None, :], 0)


# ---- rules ----------------------------------------------------------------------------------------------------------


def rejections(columns: Columns, shape: ModelShape, sequence: int, space: Space) -> dict[str, Array]:
    """Reason -> mask of the layouts that it rejects, in the order in which reasons count."""
    c = columns
    stages = c.pp * c.virtual
    interleaves = np.isin(
        c.schedule, [SCHEDULES.index(w) for w in ("interleaved1f1b", "interleaved_zero_bubble", "looped_bfs")]
    )
    rules = {
        f"only one feed-forward is left whole, not {shape.experts} experts": (c.tp_parts == 1) & (shape.experts > 1),
        f"tp does not divide {shape.heads} heads": shape.heads % c.tp != 0,
        f"tp and {shape.kv_heads} kv heads: neither divides the other": (shape.kv_heads % c.tp != 0)
        & (c.tp % shape.kv_heads != 0),
        f"tp does not divide the feed-forward width {shape.ffn_width}": shape.ffn_width % c.tp_of_ffn != 0,
        f"more stages than {shape.layers} blocks": stages > shape.layers,
        f"more gathered than {shape.layers} blocks": c.kept > shape.layers,
        f"sequence {sequence} does not divide into 2 * cp pieces": (c.cp > 1) & (sequence % (2 * c.cp) != 0),
        "interleaving needs micro-batches in multiples of pp": interleaves & (c.count % c.pp != 0),
        "fewer micro-batches than stages leave ranks idle": (c.pp > 1)
        & (c.count < np.where(np.isin(c.schedule, schedule.FILLS), stages, c.pp)),
        "selective keeps results for one backward pass, the schedule makes two": (c.pp > 1)
        & np.isin(c.schedule, schedule.SPLITS)
        & (c.recompute == RECOMPUTE.index("selective")),
        "embedding and head are one tensor, on one rank by this schedule: without dp, fsdp and cp only": shape.tied
        & (c.pp > 1)
        & np.isin(c.schedule, schedule.TURNS)
        & (c.dp * c.fsdp * c.cp > 1),
    }
    for pin in space.pins:
        rules[f"pin {pin}"] = ~_obeys(columns, pin)
    for word in space.exclude:
        if word not in AXES:
            rules[f"exclude {word}"] = _uses(columns, word)
    return rules


def _obeys(columns: Columns, pin: str) -> Array:
    found = re.fullmatch(r"\s*([a-z_]+)\s*(<=|>=|!=|==|<|>|=)\s*([\w]+)\s*", pin)
    if found is None:
        raise ConfigError(f"--pin {pin!r}: write a word, a comparison and a value, as in tp<=8 or schedule=1f1b.")
    name, sign, value = found.groups()
    name = COLUMN_OF.get(name, name)
    if name in WORDS:
        if value not in WORDS[name]:
            raise ConfigError(unknown(name, value, WORDS[name]))
        equal = getattr(columns, name) == WORDS[name].index(value)
        # A schedule belongs to a pipeline: without one every schedule is kept.
        return np.asarray((~equal if sign == "!=" else equal) | ((name == "schedule") & (columns.pp == 1)))
    if name not in PINNABLE:
        raise ConfigError(f"--pin {pin!r}: {unknown('word', name, (*PINNABLE, *WORDS))}")
    if not value.isdecimal():
        raise ConfigError(f"--pin {pin!r}: {value} is not a whole number.")
    return np.asarray(COMPARE[sign](getattr(columns, name), int(value)))


def _uses(columns: Columns, word: str) -> Array:
    """Whether a layout uses a word of a policy (`sp`, `full`, `zbv`)."""
    if word == "sp":
        return columns.sp == 1
    for name, words in WORDS.items():
        if word in words and word not in ("none", "all"):
            used = np.asarray(getattr(columns, name) == words.index(word))
            return used & ((name != "schedule") | (columns.pp > 1)) & ((word != "full") | (columns.every == 1))
    known = [*AXES, "sp", *(w for words in WORDS.values() for w in words if w not in ("none", "all"))]
    raise ConfigError(f"--exclude: {unknown('word', word, known)}")
