"""The layout of a job that has lost or gained ranks, when no planner is asked. It knows layouts; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from fms_parallel.errors import FmsError, LayoutError
from fms_parallel.fit import check_fit
from fms_parallel.layout import ParallelLayout
from fms_parallel.shape import ModelShape

PIPELINE = {"schedule": "1f1b", "microbatches": 1, "virtual_stages": 1, "stage_split": None}


def remaining_layout(
    asked: ParallelLayout, world: int, batch_size: int, micro_batches: int = 1, shape: ModelShape | None = None
) -> ParallelLayout:
    """The layout for `world` ranks that is nearest to the one a person asked for, and that batch and model allow.

    In this order: what was asked for; other replicas (dp), then other shards (fsdp), with pp, cp and tp as they are;
    without cp; tp and shards; stages and shards; shards alone; any stages, tp and shards.

    Args:
        batch_size: rows of a step over all ranks. shape: of the model, when it is known.
    Raises:
        LayoutError: no layout of exactly so many ranks fits.
    """
    seen: list[str] = []
    for layout in _candidates(asked, world):
        try:
            if shape is not None:
                check_fit(layout, shape)
        except FmsError:
            continue
        if batch_size % (layout.data_parallel * micro_batches) == 0:
            return layout
        seen.append(str(layout))
    tried = f"; {', '.join(seen[:4])} do not divide {batch_size} rows" if seen else ""
    raise LayoutError(
        f"no layout of {world} ranks fits batch size {batch_size} in {micro_batches} micro-batches{tried}: choose one "
        "(choose=), or a batch size that more numbers divide."
    )


def _candidates(asked: ParallelLayout, world: int) -> Iterator[ParallelLayout]:
    with suppress(LayoutError):
        yield asked.resolve(world)
    if not asked.resolved:
        return
    for pp, cp, tp in dict.fromkeys(
        [
            (asked.pp, asked.cp, asked.tp),
            (asked.pp, 1, asked.tp),
            (1, 1, asked.tp),
            (asked.pp, 1, 1),
            (1, 1, 1),
            *((stages, 1, shards) for shards in _divisors(world) for stages in _divisors(world // shards)),
        ]
    ):
        rest, left = divmod(world, pp * cp * tp)
        if left or not rest:
            continue
        for dp, fsdp in dict.fromkeys([(rest // asked.fsdp, asked.fsdp), (asked.dp, rest // asked.dp), (1, rest)]):
            if dp * fsdp == rest:
                yield _with(asked, pp, dp, fsdp, cp, tp)


def _with(asked: ParallelLayout, pp: int, dp: int, fsdp: int, cp: int, tp: int) -> ParallelLayout:
    """The asked layout in other degrees, without the words that then mean nothing."""
    words: dict[str, object] = {} if pp == asked.pp else dict(PIPELINE)
    if tp == 1:
        words |= {"sp": False, "loss_parallel": True, "tp_parts": "all"}
    if cp == 1:
        words["cp_method"] = "ring"
    if fsdp == 1 or pp > 1:
        words["keep_gathered"] = 0
    if fsdp == 1 and asked.offload == "params":
        words["offload"] = "none"
    return replace(asked, pp=pp, dp=dp, fsdp=fsdp, cp=cp, tp=tp, **words)  # type: ignore[arg-type]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
