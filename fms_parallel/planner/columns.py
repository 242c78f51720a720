"""`Columns`: many layouts at once, one numpy array per number, so that a search is arithmetic on arrays.

It knows degrees, micro-batches and policies; it knows nothing of models or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms_parallel.errors import LayoutError
from fms_parallel.layout import TP_PARTS, ParallelLayout

Array = NDArray[Any]

RECOMPUTE = ("none", "selective", "full", "budget")
SCHEDULES = ("1f1b", "gpipe", "interleaved1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
OFFLOADS = ("none", "optimizer_state", "params")
WHOLE_BUDGET = 1 << 20
"""`budget` counts in such parts: columns hold whole numbers."""


@dataclass(frozen=True)
class Columns:
    """One row per layout.

    Attributes:
        pp, dp, fsdp, cp, tp: degrees. sp: 0 or 1. virtual: stages per rank. schedule, recompute, offload: indices into
            `SCHEDULES`, `RECOMPUTE`, `OFFLOADS`. micro: sequences in one micro-batch of one replica. count:
            micro-batches of one replica in a step. zero: ZeRO stage over dp (0, 1 or 2; fsdp > 1 is stage 3). every:
            with full recomputation, each such block is made again. budget: with that policy, what blocks may keep of
            all that they would, in parts of `WHOLE_BUDGET`. kept: blocks that stay gathered.
            tp_parts: index into `TP_PARTS`: what of a block tp cuts.
    """

    pp: Array
    dp: Array
    fsdp: Array
    cp: Array
    tp: Array
    sp: Array
    virtual: Array
    schedule: Array
    recompute: Array
    offload: Array
    micro: Array
    count: Array
    zero: Array
    every: Array
    budget: Array
    kept: Array
    tp_parts: Array

    def __len__(self) -> int:
        return len(self.pp)

    def take(self, which: Any) -> Columns:
        """The rows that a mask or an index array picks."""
        return Columns(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, int]]) -> Columns:
        """Columns from dictionaries; what a row does not name is 1 for degrees and counts, 0 for policies."""
        return cls(
            **{
                f.name: np.array([row.get(f.name, _DEFAULTS.get(f.name, 0)) for row in rows], dtype=np.int64)
                for f in fields(cls)
            }
        )

    @classmethod
    def of_layout(cls, layout: ParallelLayout, global_batch: int) -> Columns:
        """One row for one layout: the batch is spread over its replicas and micro-batches.

        Raises:
            LayoutError: a schedule from a file.
        """
        if layout.schedule not in SCHEDULES:
            raise LayoutError(
                f"{layout}: columns hold schedules with a name; a schedule from a file is priced by `Planner.estimate`."
            )
        count = layout.pieces
        per_replica = max(global_batch // layout.data_parallel, 1)
        policy, budget = read_policy(layout.recompute)
        row = {
            **{axis: getattr(layout, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp")},
            "sp": int(layout.sp),
            "virtual": layout.stages // layout.pp,
            "schedule": SCHEDULES.index(layout.schedule),
            "recompute": policy,
            "every": max(layout.recompute_interval, 1),
            "budget": budget,
            "kept": layout.keep_gathered,
            "tp_parts": TP_PARTS.index(layout.tp_parts),
            "offload": OFFLOADS.index("optimizer_state" if layout.offload == "optimizer_step" else layout.offload),
            "micro": max(per_replica // count, 1),
            "count": count,
        }
        return cls.of([row])

    def layout(self, row: int, precision: str, split: tuple[int, ...] | None = None) -> ParallelLayout:
        """The layout of one row."""
        pp = int(self.pp[row])
        pipeline: dict[str, Any] = {}
        if pp > 1:
            pipeline = {
                "schedule": SCHEDULES[self.schedule[row]],
                "microbatches": int(self.count[row]),
                "virtual_stages": int(self.virtual[row]),
                "stage_split": split,
            }
        return ParallelLayout(
            pp=pp,
            dp=int(self.dp[row]),
            fsdp=int(self.fsdp[row]),
            cp=int(self.cp[row]),
            tp=int(self.tp[row]),
            sp=bool(self.sp[row]),
            tp_parts=TP_PARTS[self.tp_parts[row]],
            recompute=self.policy(row),
            precision=precision,
            offload=OFFLOADS[self.offload[row]],
            keep_gathered=int(self.kept[row]),
            **pipeline,
        )

    def policy(self, row: int) -> str:
        """The word of a layout for the recomputation of one row."""
        word, every = RECOMPUTE[self.recompute[row]], int(self.every[row])
        if word == "budget":
            return f"budget={round(float(self.budget[row]) / WHOLE_BUDGET, 6):g}"
        return word if every == 1 else f"every={every}"

    def recomputed(self, layers: int) -> Array:
        """Part of the blocks that full recomputation makes again: all, or with every=N each N-th from the first on."""
        blocks = -(-layers // self.pp)
        return np.asarray(-(-blocks // self.every) / blocks)

    @property
    def budgets(self) -> bool:
        """Whether any row has a recompute budget."""
        return bool((self.recompute == BUDGET).any())

    @property
    def share(self) -> Array:
        """The part that a recompute budget leaves to blocks, 0 with other policies."""
        return np.asarray(np.where(self.recompute == BUDGET, self.budget / WHOLE_BUDGET, 0.0))

    @property
    def tp_of_ffn(self) -> Array:
        """Ranks that share a feed-forward's matrices: those of tp, or each has them whole, for 1/tp of the tokens."""
        return np.asarray(np.where(self.tp_parts == 1, 1, self.tp))

    @property
    def ranks(self) -> Array:
        """Devices that each layout needs."""
        return self.pp * self.dp * self.fsdp * self.cp * self.tp

    def with_(self, **columns: Any) -> Columns:
        """The same rows with some columns replaced."""
        return replace(self, **columns)


BUDGET = RECOMPUTE.index("budget")


def read_policy(policy: str) -> tuple[int, int]:
    """`selective` -> (its index, 0); `budget=0.5` -> (index of budget, 0.5 in parts); `every=4` is full."""
    word, _, number = policy.partition("=")
    if word == "budget":
        return BUDGET, round(float(number) * WHOLE_BUDGET)
    return RECOMPUTE.index(policy if policy in RECOMPUTE else "full"), 0


_POLICIES = ("sp", "schedule", "recompute", "offload", "zero", "kept", "budget", "tp_parts")
_DEFAULTS = {f.name: 1 for f in fields(Columns) if f.name not in _POLICIES}
