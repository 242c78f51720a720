"""`ContextStrategy`: context parallelism, where the ranks of an axis hold parts of the same rows.

Nothing in the model is replaced: its forward is told a `Context`, and attention does the rest. Parameters are whole on
every rank as far as cp is concerned, so FSDP cuts and averages over cp as it does over the ranks with other rows
(`shard_mesh`). Where a batch becomes a rank's part is `share_of`, called once per micro-batch by training.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel.distributed.mesh import context_axis
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.attention import Attention
from fms_parallel.modules.context import Context
from fms_parallel.modules.context_attention import check_ulysses
from fms_parallel.modules.loss import IGNORE
from fms_parallel.strategy.base import Strategy, parallel_of


class ContextStrategy(Strategy):
    """The sequence axis of a model.

    Args:
        mesh: with a cp dimension. layout: its cp method.
    """

    def __init__(self, mesh: DeviceMesh, layout: ParallelLayout) -> None:
        self.layout, self.axis = layout, context_axis(mesh)
        self.row_labels = False

    def distribute(self, model: nn.Module) -> nn.Module:
        """Check that `model` can be told about its context; it stays as it is.

        Raises:
            LayoutError: its forward takes no `context`, or heads that ulysses cannot hand out.
        """
        refuse_without_context(type(model), self.layout)
        self.row_labels = bool(getattr(model, "row_labels", False))
        if self.layout.cp_method == "ulysses":
            for module in model.modules():
                if isinstance(module, Attention):
                    check_ulysses(module.shape.heads // self.layout.tp, self.axis.size)
        return model

    def share(self, batch: Any) -> ContextBatch:
        """This rank's part of a batch, `[B, S]` -> `[B, held]`; labels of whole rows belong to the first rank."""
        context = Context(self.axis, self.layout.cp_method, batch.input_ids.shape[1])
        if not self.row_labels:
            labels = context.cut(batch.labels, 1, fill=IGNORE)
        else:
            labels = batch.labels if self.axis.rank == 0 else torch.full_like(batch.labels, IGNORE)
        more = {name: context.cut(tensor, 1) for name, tensor in more_of(batch).items()}
        return ContextBatch(context.cut(batch.input_ids, 1), labels, context, more)


@dataclass(frozen=True)
class ContextBatch:
    """A part of every row of a batch: ids and labels `[B, held]`, padded with 0 and -100; `more`: see `more_of`."""

    input_ids: Tensor
    labels: Tensor
    context: Context
    more: Mapping[str, Tensor]


def share_of(model: nn.Module, batch: Any) -> Any:
    """What this rank reads of a batch: all of it, or with cp a part of every row.

    Raises:
        TrainingError: with the first batch, when ranks that share rows were given different ones; see `SameRows`.
    """
    parallel = parallel_of(model)
    if parallel.same_rows is not None:
        parallel.same_rows.check((batch.input_ids, batch.labels))
    return batch if parallel.context is None else parallel.context.share(batch)


def context_of(batch: Any) -> Context | None:
    """What longer sequences the rows of a batch are parts of; None: they are whole."""
    return getattr(batch, "context", None)


def more_of(batch: Any) -> Mapping[str, Tensor]:
    """What a batch says of each token besides id and label, `[B, S]` by the name of the model's argument (`mask`,
    `token_types`); most say nothing."""
    return getattr(batch, "more", {})


def refuse_without_context(model: Any, layout: ParallelLayout) -> None:
    """Raises LayoutError when cp is asked of a class whose forward takes no `context`; what is no class passes."""
    forward = getattr(model, "forward", None) if isinstance(model, type) else None
    if layout.cp > 1 and forward is not None and "context" not in inspect.signature(forward).parameters:
        raise LayoutError(
            f"cp={layout.cp}: {model.__name__} computes whole sequences only, its forward takes no `context`. Use "
            "dp, fsdp or tp, or hand a `context` on to `Sequences` as LLaMA does."
        )
