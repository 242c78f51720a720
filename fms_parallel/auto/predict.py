"""What a parallelised model gives for a batch: its logits, or what the caller picks of its output, on every rank.

It knows engines and batches; how a micro-batch goes through the stages is the schedule's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.auto.tasks import UserLoss, logits_of
from fms_parallel.errors import ConfigError

if TYPE_CHECKING:
    from fms_parallel.auto.engine import Engine


def predict(engine: Engine, batch: Mapping[str, Tensor], pick: Callable[[Any], Tensor] | None) -> Tensor:
    """As `Engine.predict`."""
    if pick is not None and engine.layout.pp > 1 and not isinstance(engine.task, UserLoss):
        raise ConfigError(
            f"pick= with pp={engine.layout.pp}: the stages carry what task {engine.task.name} reads, the logits, and "
            "nothing else for sure. Leave pick out, or make the engine with loss=, which carries the whole output."
        )
    rows = len(next(iter(batch.values())))
    found: list[Tensor] = []
    last = [stage for stage in engine.stages if stage.is_last]
    for stage in last:
        stage.look = lambda out: found.append((pick or logits_of)(out).detach())
    try:
        engine.forward_only(batch)
    finally:
        for stage in last:
            stage.look = None
    made = torch.cat(found)[:rows] if last else None
    return made if engine.layout.pp == 1 and made is not None else _to_all_stages(engine, made)


def _to_all_stages(engine: Engine, made: Tensor | None) -> Tensor:
    """From the rank with the last stage to the others of its pipeline."""
    assert engine.mesh is not None
    group, home = engine.mesh["pp"].get_group(), engine.layout.homes[-1]
    described: list[Any] = [None if made is None else (tuple(made.shape), made.dtype)]
    dist.broadcast_object_list(described, group=group, group_src=home)
    shape, dtype = described[0]
    whole = torch.empty(shape, dtype=dtype, device=engine.device) if made is None else made.contiguous()
    dist.broadcast(whole, group=group, group_src=home)
    return whole
