"""The mean loss over held-out rows: every row once, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.data.feed import Batch
from fms_parallel.data.rows import IGNORE, RowDataset
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.strategy.base import parallel_of
from fms_parallel.strategy.context import share_of
from fms_parallel.strategy.stages import Judge
from fms_parallel.training.step import LossFunction, check_loss_function, model_logits, model_loss, to_device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: RowDataset,
    *,
    rows: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    loss_function: LossFunction = model_loss,
    judge: Judge | None = None,
) -> float:
    """Mean loss per valid token over the first `rows` rows (None: all). Collective over all ranks.

    Args:
        batch_size: rows of one forward over all ranks that read different rows.
        judge: maps logits and labels of some rows, or parts of rows, to the sum that is wanted in place of the loss;
            it runs in every layout.
    """
    if judge is None:
        check_loss_function(model, loss_function)
    parallel = parallel_of(model)
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in _batches(data, min(rows or len(data), len(data)), batch_size, data_shard(parallel.mesh)):
        mine = share_of(model, to_device(batch, device))
        if parallel.pipeline is not None:
            loss = parallel.pipeline.evaluate(mine, judge)
        else:
            loss = loss_function(model, mine, None) if judge is None else judge(model_logits(model, mine), mine.labels)
        tokens = int((mine.labels != IGNORE).sum())
        totals += torch.tensor([float(loss), tokens * parallel.runs_last_stage], dtype=torch.float64)
    model.train(was_training)
    if parallel.layout.world_size > 1:
        totals = totals.to(device or "cpu")
        dist.all_reduce(totals)
    # Ranks that see the same tokens count them equally often in both sums.
    return float(totals[0] / totals[1])


def _batches(data: RowDataset, rows: int, batch_size: int, shard: tuple[int, int]) -> Iterator[Batch]:
    """This shard's rows. Every shard makes the same number of batches: a row past the end has no valid label."""
    index, count = shard
    per_shard = max(batch_size // count, 1)
    for start in range(0, rows, per_shard * count):
        numbers = range(start + index * per_shard, start + (index + 1) * per_shard)
        pairs = [data.row(min(number, rows - 1)) for number in numbers]
        inputs = torch.stack([ids for ids, _ in pairs])
        labels = torch.stack([wanted for _, wanted in pairs])
        labels[[number >= rows for number in numbers]] = IGNORE
        yield Batch(inputs, labels)
