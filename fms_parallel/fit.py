"""Whether a model of some shape can be cut as a layout says: the rules, each with its number and its way out.

They know sizes and degrees, no torch; `ParallelLayout.validate` applies them and adds the nearest layouts that work.
"""

from __future__ import annotations

from typing import Any

from fms_parallel.errors import LayoutError
from fms_parallel.schedules import find_schedule
from fms_parallel.shape import ModelShape
from fms_parallel.words import as_text

ParallelLayout = Any
"""`layout` stands on this page; imported here it would be a circle."""


def check_fit(layout: ParallelLayout, shape: ModelShape) -> None:
    """All rules of this page. Raises LayoutError with the first that is broken."""
    _check_tensor(layout, shape)
    _check_context(layout, shape)
    _check_stages(layout, shape)
    if layout.keep_gathered > shape.layers:
        raise LayoutError(f"keep_gathered={layout.keep_gathered}: the model has {shape.layers} blocks to keep.")
    check_schedule(layout)
    if shape.tied:
        check_tied(layout, "embedding and head")


def _check_tensor(layout: ParallelLayout, shape: ModelShape) -> None:
    works = f"Use tp in {_tp_degrees(shape)}."
    if shape.heads % layout.tp:
        raise LayoutError(f"tp={layout.tp} does not divide {shape.heads} heads: each rank holds whole heads. {works}")
    if shape.kv_heads % layout.tp and layout.tp % shape.kv_heads:
        raise LayoutError(
            f"tp={layout.tp} with {shape.kv_heads} kv heads: one must divide the other, because kv heads are split "
            f"or copied. {works}"
        )
    if layout.tp_parts == "attention" and shape.experts > 1:
        raise LayoutError(
            f"tp_parts=attention with {shape.experts} experts: only a feed-forward without any is left whole; drop it."
        )
    if layout.tp > shape.ffn_width:
        raise LayoutError(
            f"tp={layout.tp} with a feed-forward width of {shape.ffn_width}: a rank would hold nothing of it. {works}"
        )


def _tp_degrees(shape: ModelShape) -> list[int]:
    """Every tp that cuts both heads and kv heads and leaves no rank without feed-forward."""
    divisors = (d for d in range(1, min(shape.heads, shape.ffn_width) + 1) if shape.heads % d == 0)
    return [d for d in divisors if shape.kv_heads % d == 0 or d % shape.kv_heads == 0]


def _check_context(layout: ParallelLayout, shape: ModelShape) -> None:
    held = shape.heads // layout.tp
    if layout.cp_method == "ulysses" and held % layout.cp:
        raise LayoutError(
            f"{layout}: a rank's {held} of {shape.heads} heads do not divide by {layout.cp}. With cp_method=ulysses cp "
            "must divide them; cp_method=ring needs not."
        )


def _check_stages(layout: ParallelLayout, shape: ModelShape) -> None:
    if layout.stages > shape.layers:
        raise LayoutError(
            f"{layout.stages} pipeline stages (pp={layout.pp} * virtual_stages={layout.stages // layout.pp}) for "
            f"{shape.layers} blocks: each stage needs one; use at most {shape.layers} stages."
        )
    if layout.stage_split is not None and sum(layout.stage_split) != shape.layers:
        split = as_text("stage_split", layout.stage_split)
        raise LayoutError(
            f"{split} adds up to {sum(layout.stage_split)} blocks but the model has {shape.layers}: "
            "change a number, or drop it for an even split."
        )


def check_schedule(layout: ParallelLayout) -> None:
    """Raises LayoutError when the schedule cannot run these stages and micro-batches, or its file not be read."""
    if layout.pp == 1:
        return
    schedule = find_schedule(layout.schedule)
    refusal = schedule.refusal(layout.pieces, layout.pp, layout.stages)
    if refusal is not None:
        raise LayoutError(f"schedule={layout.schedule} with pp={layout.pp}: {refusal}.")
    if layout.recompute == "selective" and schedule.splits_backward:
        raise LayoutError(
            f"schedule={layout.schedule} goes through a block twice in its backward pass, and recompute=selective "
            "keeps results for one: use recompute=full, or another schedule."
        )


def check_tied(layout: ParallelLayout, what: str) -> None:
    """Raises LayoutError when first and last stage are on one rank and `what` they share is sharded or replicated."""
    if layout.pp > 1 and layout.gradient_ranks > 1 and layout.homes[0] == layout.homes[-1]:
        raise LayoutError(
            f"schedule={layout.schedule} puts the first and the last stage on one rank, where they share {what}: "
            "torch shards a weight once. Use another schedule, an untied head, or no dp, fsdp and cp."
        )
