"""Which boxes every rank of a layout would hold, worked out without ranks, memory or process groups.

So the cost of a change of layout is known in exact bytes before anything is built, and plans are tested by the hundred.
It follows what `strategy/` does: stages, then the twins' cuts, then fsdp (with cp) over the first dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard

from fms_parallel.distributed.boxes import Box
from fms_parallel.distributed.collectives import Axis
from fms_parallel.dynamic.plan import Table
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.tp import own_parameters, twin_of
from fms_parallel.strategy.stages import cut

Cuts = Mapping[str, int | None]
"""Parameter -> the dimension that tp cuts, None for one that every rank of tp holds whole."""


def predict_tables(model: nn.Module, layout: ParallelLayout) -> list[Table]:
    """What each rank of `layout` holds of a native model's parameters and persistent buffers, by their first names.

    Args:
        model: undistributed; the meta device is enough. layout: resolved.
    Raises:
        LayoutError: the model cannot be cut this way, or says not where tp cuts it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    cuts = tensor_cuts(model, layout.tp, layout.tp_parts) if layout.tp > 1 else {}
    held = [_names_of(model, layout, rank) for rank in range(layout.pp)]
    trained = {name for name, _ in model.named_parameters()}
    tables: list[Table] = []
    for pp, _, fsdp, cp, tp in product(*map(range, layout.degrees)):
        shards = layout.fsdp * layout.cp if layout.fsdp > 1 else 1
        place = (fsdp * layout.cp + cp, shards) if shards > 1 else (0, 1)
        table = {}
        for name in shapes:
            if name in held[pp]:
                box = _part(Box.whole(shapes[name]), cuts.get(name), tp, layout.tp)
                table[name] = (_part(box, 0, *place) if name in trained else box,)
        tables.append(table)
    return tables


def tensor_cuts(model: nn.Module, tp: int, parts: str = "all") -> Cuts:
    """Where `tp` ranks cut each parameter, as the model's twins declare it. `parts`: `tp_parts` of the layout."""
    model = copy.deepcopy(model)
    found: dict[str, int | None] = {}
    for prefix, module in list(model.named_modules()):
        twin: Any = twin_of(module, parts)
        if twin is None:
            continue
        names = own_parameters(module)
        module.__class__ = twin
        module.axis = Axis(None, tp, 0, "")  # type: ignore[assignment, arg-type]
        placements = twin.placements(module)
        for name in names:
            where = placements[name]
            found[f"{prefix}.{name}" if prefix else name] = where.dim if isinstance(where, Shard) else None
    if unknown := sorted(name for name, _ in model.named_parameters() if name not in found):
        raise LayoutError(
            f"tp={tp}: no module with a tensor-parallel twin holds {unknown[0]}, so its cut is not known."
        )
    return found


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor under its first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def _names_of(model: nn.Module, layout: ParallelLayout, rank: int) -> set[str]:
    """First names of what pipeline rank `rank` holds."""
    if layout.pp == 1:
        return set(_tensors(model))
    stage = copy.deepcopy(model)
    cut(stage, layout, layout.stages_of(rank))
    return set(_tensors(stage))


def _part(box: Box, dim: int | None, index: int, count: int) -> Box:
    """The index-th of `count` runs of a box along `dim`, as `torch.chunk` cuts it; None: the whole box."""
    if dim is None or count == 1:
        return box
    run = -(-box.size[dim] // count)
    start = min(index * run, box.size[dim])
    length = min(run, box.size[dim] - start)
    offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
    return Box(offset, (*box.size[:dim], length, *box.size[dim + 1 :]))
