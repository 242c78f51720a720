"""Which layouts a model without twins can have: rules that raise, and for what they refuse the nearest that they allow.

Everything that follows from the layout, the model's config and its blocks is said here, before anything is built; what
only a forward shows (a value looked at, a cut that nothing crosses) is said where it is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fms_parallel.auto.blocks import find_blocks
from fms_parallel.auto.cut import check_split
from fms_parallel.auto.plans import check_heads
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.nearest import check
from fms_parallel.schedules import FILE, SCHEDULES
from fms_parallel.strategy.compose import refuse_unimplemented


def read_layout(
    layout: str | ParallelLayout | None,
    microbatches: int | None,
    schedule: str | None,
    world: int,
    skeleton: nn.Module,
    split: str | Sequence[int] | Sequence[str] = "cost",
    tensor_plan: Mapping[str, Any] | None = None,
) -> tuple[ParallelLayout, int]:
    """(the layout with every word and degree, micro-batches of a step).

    Args:
        split, tensor_plan: as `parallelize` is given them; a caller's own plan is not held against the heads.
    Raises:
        LayoutError: a rule that is broken, and the nearest layouts of as many ranks that break none.
    """
    found = ParallelLayout.parse(layout).resolve(world)
    if microbatches is not None and microbatches < 1:
        raise LayoutError(f"microbatches={microbatches}: needs a whole number >= 1, as in microbatches=4.")
    if found.pp > 1:  # a schedule has nothing to order otherwise: a script may name one for all its layouts
        words: dict[str, Any] = {"schedule": schedule, "microbatches": microbatches}
        found = replace(found, **{name: word for name, word in words.items() if word is not None})

    def fits_blocks(each: ParallelLayout) -> None:
        _refuse_stages(each, skeleton, split)

    def fits_heads(each: ParallelLayout) -> None:
        if tensor_plan is None:
            check_heads(skeleton, each.tp)
        if each.tp not in (1, found.tp) and not getattr(skeleton, "config", None):
            raise LayoutError(f"tp={each.tp}: only a look for a plan tells whether there is one, so it is not offered.")

    check(found, refuse_unimplemented, _refuse_words, _refuse_schedule, fits_blocks, fits_heads)
    return found, found.pieces if found.pp > 1 else microbatches or 1


def _refuse_words(layout: ParallelLayout) -> None:
    """What needs models with twins, or FSDP2."""
    if layout.cp > 1 or layout.sp:
        raise LayoutError(
            f"{layout}: cp and sp cut sequences inside the model's code; a model without twins has pp, dp, fsdp and tp."
        )
    if layout.recompute_budget is not None:
        raise LayoutError(f"{layout}: recompute=budget=... needs compiled blocks; use full, selective or every=N.")
    if layout.precision == "bf16" and layout.world_size == 1:
        raise LayoutError("precision=bf16 of a model without twins is FSDP2's work: one process has none, use 2 ranks.")


def _refuse_schedule(layout: ParallelLayout) -> None:
    if layout.pp == 1:
        return
    if layout.schedule.startswith(FILE):
        raise LayoutError(f"{layout}: schedules from files run models with twins; use one of {', '.join(SCHEDULES)}.")
    why = SCHEDULES[layout.schedule].refusal(layout.pieces, layout.pp, layout.stages)
    if why is not None:
        raise LayoutError(f"schedule={layout.schedule}: {why}.")


def _refuse_stages(layout: ParallelLayout, skeleton: nn.Module, split: str | Sequence[int] | Sequence[str]) -> None:
    """More stages than blocks, or a split that does not add up to them."""
    if layout.pp == 1:
        return
    wanted = layout.stage_split if layout.stage_split is not None else split
    check_split(layout.stages, wanted, find_blocks(skeleton), type(skeleton).__name__)
