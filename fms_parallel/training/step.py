"""One optimizer step, the same in every layout: gradients of the mean loss over the step's global batch.

    loss = sum over all valid tokens of all micro-batches of all ranks / number of those tokens

so micro-batching, accumulation, padding and unequal rows never change the result. It knows batches and gradients; it
never asks which strategies are on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fms_parallel import compat
from fms_parallel.errors import TrainingError
from fms_parallel.modules.linear_types import refuse_quantised
from fms_parallel.modules.loss import IGNORE, summed_cross_entropy
from fms_parallel.modules.sequences import DropoutKey
from fms_parallel.strategy.base import parallel_of
from fms_parallel.strategy.context import context_of, more_of, share_of
from fms_parallel.training.gradients import check_every_gradient, clip_gradients_, complete_gradients, squared_norm


class TokenBatch(Protocol):
    """What a step reads of a batch."""

    @property
    def input_ids(self) -> Tensor:
        """`[B, S]`."""
        ...

    @property
    def labels(self) -> Tensor:
        """`[B, S]`, the token wanted at each position, -100 for none; or what else the model asks of each row."""
        ...


def to_device(batch: TokenBatch, device: torch.device | None) -> TokenBatch:
    """The batch where the model is; None leaves it."""
    if device is None or device.type == "cpu":
        return batch
    more = {name: tensor.to(device, non_blocking=True) for name, tensor in more_of(batch).items()}
    return Moved(batch.input_ids.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True), more)


@dataclass(frozen=True)
class Moved:
    """A `TokenBatch` on another device."""

    input_ids: Tensor
    labels: Tensor
    more: Mapping[str, Tensor]


LossFunction = Callable[[nn.Module, TokenBatch, DropoutKey | None], Tensor]
"""(model, micro-batch, names of its random bits) -> loss *summed* over valid tokens."""


def model_loss(model: nn.Module, batch: TokenBatch, key: DropoutKey | None) -> Tensor:
    """For models that compute their own summed loss, as all of `fms_parallel.models` do."""
    options: dict[str, Any] = {} if key is None else {"dropout": key}
    loss: Tensor = model(batch.input_ids, labels=batch.labels, **options, **_told(batch))
    return loss


def logits_loss(model: nn.Module, batch: TokenBatch, key: DropoutKey | None) -> Tensor:
    """For any module that maps `input_ids [B, S]` to logits `[B, S, V]` (or to something with `.logits`)."""
    logits = model_logits(model, batch)
    return summed_cross_entropy(logits, batch.labels)


def model_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """What the model says of this batch, or of this part of its rows: its output, or the output's `.logits`."""
    out = model(batch.input_ids, **_told(batch))
    logits: Tensor = getattr(out, "logits", out)
    return logits


def _told(batch: TokenBatch) -> dict[str, Any]:
    """What a model must know besides ids and labels: what the batch says, and of what longer rows these are parts."""
    context = context_of(batch)
    return {**more_of(batch), **({} if context is None else {"context": context})}


def check_loss_function(model: nn.Module, loss_function: LossFunction) -> None:
    """Raises TrainingError for a loss function of the caller's own where it would not see what it expects."""
    parallel = parallel_of(model)
    if parallel.pipeline is not None and loss_function is not model_loss:
        raise TrainingError(
            "a loss_function of its own does not run over pipeline stages: the last stage has the loss."
        )
    if parallel.context is not None and loss_function not in (model_loss, logits_loss):
        raise TrainingError(
            "a loss_function of its own does not run with cp: a rank has a part of every row. Use model_loss or "
            "logits_loss, or a layout without cp."
        )


def dropout_keys(batches: Sequence[TokenBatch], seed: int, shard: int) -> list[DropoutKey | None]:
    """Names of the random bits of this rank's micro-batches: the step's seed, and each one's place in its global batch.

    Args:
        shard: index of this rank among those that read different rows; all have as many micro-batches of one size.
    """
    tokens = batches[0].input_ids.numel()
    return [DropoutKey(seed, (shard * len(batches) + index) * tokens) for index in range(len(batches))]


@dataclass(frozen=True)
class StepResult:
    """Of one step, over the whole job: mean loss per valid token, global gradient norm before clipping, tokens."""

    loss: float
    grad_norm: float
    tokens: int


def count_tokens(model: nn.Module, batches: Sequence[TokenBatch]) -> int:
    """Valid tokens of the step over all data-parallel ranks.

    Raises:
        TrainingError: there is none, so the mean loss does not exist; an earlier step left gradients behind.
    """
    _refuse_waiting_gradients(model)
    count = sum((batch.labels != IGNORE).sum() for batch in batches)
    assert isinstance(count, Tensor)
    layout = parallel_of(model).layout
    if layout.data_parallel > 1:
        count = count.clone()
        dist.all_reduce(count)
        count = count // (layout.world_size // layout.data_parallel)
    if (tokens := int(count)) == 0:
        raise TrainingError("this step's batch holds no valid token (every label is -100): nothing to learn from.")
    return tokens


def _refuse_waiting_gradients(model: nn.Module) -> None:
    """Raises TrainingError when FSDP keeps gradients of an earlier step: it would add them to this one's."""
    if parallel_of(model).layout.gradient_ranks > 1 and compat.has_unreduced_gradients(model):
        raise TrainingError(
            "gradients of an earlier step were never summed over the ranks, so its optimizer step had none: let each "
            "step's last backward pass run under set_requires_gradient_sync(True). After a step that failed half-way "
            "build the model anew, from a checkpoint."
        )


def backward(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    tokens: int,
    *,
    loss_function: LossFunction = model_loss,
    keys: Sequence[DropoutKey | None] | None = None,
) -> Tensor:
    """Forward and backward of this rank's micro-batches; gradients accumulate into `.grad`.

    Args:
        batches: this rank's micro-batches. tokens: valid tokens of the step over all ranks.
        keys: names of the random bits of each micro-batch.
    Returns:
        this rank's summed loss, detached.
    """
    scale = _scale(model, tokens)
    total = None
    pipeline = parallel_of(model).pipeline
    check_loss_function(model, loss_function)
    for index, whole in enumerate(batches):
        batch = share_of(model, whole)
        key = keys[index] if keys else None
        with _gradient_sync(model, last=index == len(batches) - 1):
            if pipeline is not None:
                loss = pipeline.backward(batch, scale, key)
            else:
                loss = loss_function(model, batch, key)
                (loss * scale).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    complete_gradients(model.parameters())
    if pipeline is not None:
        pipeline.sum_shared_gradients()
    return total


def _scale(model: nn.Module, tokens: int) -> float:
    """Of a rank's summed loss: FSDP2 averages gradients over ranks with other tokens, the loss is a sum over them."""
    return parallel_of(model).layout.gradient_ranks / tokens


def mean_loss(
    model: nn.Module,
    batch: TokenBatch,
    tokens: int,
    *,
    loss_function: LossFunction = model_loss,
    key: DropoutKey | None = None,
) -> Tensor:
    """This rank's part of a step's mean loss, for a loop of one's own: `mean_loss(...).backward()` per micro-batch.

    After the last one `.grad` holds, as far as torch reads it, the gradient of the mean over all ranks' tokens; the
    average of the parts over the ranks, summed over the micro-batches, is the loss.

    Args:
        batch: this rank's rows (with cp whole rows: a part of them is cut here). tokens: of `count_tokens`.
        key: names the random bits of a model that drops something.
    Raises:
        TrainingError: pp, whose stages run forward and backward at once: use `compute_gradients`.
    """
    if parallel_of(model).pipeline is not None:
        raise TrainingError(
            f"pp={parallel_of(model).layout.pp}: stages run forward and backward at once, no rank has a loss to call "
            "backward() on. Use compute_gradients(model, batches, max_grad_norm=...), then optimizer.step()."
        )
    check_loss_function(model, loss_function)
    return loss_function(model, share_of(model, batch), key) * _scale(model, tokens)


def summarise(model: nn.Module, loss_sum: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(mean loss, gradient norm) of the step over the whole job: one collective."""
    parallel = parallel_of(model)
    layout, norm = parallel.layout, squared_norm(model).to(loss_sum.device)
    # Every rank that finds out the loss of the same tokens tells its part of it.
    weight = layout.gradient_ranks / parallel.ranks_per_stage if parallel.runs_last_stage else 0.0
    both = torch.stack([loss_sum.to(norm.dtype) * weight, norm])
    if layout.world_size > 1:
        dist.all_reduce(both)
    return both[0] / tokens, both[1].sqrt()


def compute_gradients(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    *,
    max_grad_norm: float | None = None,
    loss_function: LossFunction = model_loss,
    keys: Sequence[DropoutKey | None] | None = None,
    check_gradients: bool = False,
) -> StepResult:
    """Gradients of the mean loss, added to `.grad` and clipped over the whole mesh: a step without its optimizer.

    Args:
        batches: this rank's micro-batches. max_grad_norm: None or 0 does not clip.
        keys: names of their random bits, see `dropout_keys`.
    Raises:
        TrainingError: as `train_step`.
    """
    refuse_quantised(model)
    tokens = count_tokens(model, batches)
    loss_sum = backward(model, batches, tokens, loss_function=loss_function, keys=keys)
    if check_gradients:
        check_every_gradient(model)
    loss, norm = summarise(model, loss_sum, tokens)
    result = StepResult(float(loss), float(norm), tokens)
    if not (abs(result.loss) < float("inf") and result.grad_norm < float("inf")):
        raise TrainingError(
            f"loss {result.loss}, gradient norm {result.grad_norm}: not finite, the weights were left as they are. "
            "Lower the learning rate, look at the data of this step, or resume from the last checkpoint."
        )
    if max_grad_norm and result.grad_norm > max_grad_norm:
        clip_gradients_(model.parameters(), norm, max_grad_norm)
    return result


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[TokenBatch],
    *,
    max_grad_norm: float | None = 1.0,
    loss_function: LossFunction = model_loss,
    keys: Sequence[DropoutKey | None] | None = None,
    check_gradients: bool = False,
) -> StepResult:
    """Gradients of the mean loss, clipping over the whole mesh, one optimizer step.

    Raises:
        TrainingError: weights that take no gradient (int8); no valid token; a loss or gradient norm that is not finite
            (nothing is updated); with `check_gradients`, a trainable parameter without a gradient.
    """
    optimizer.zero_grad(set_to_none=True)
    result = compute_gradients(
        model,
        batches,
        max_grad_norm=max_grad_norm,
        loss_function=loss_function,
        keys=keys,
        check_gradients=check_gradients,
    )
    optimizer.step()
    return result


@contextmanager
def _accumulating(model: FSDPModule) -> Any:
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_is_last_backward(True)


def _gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients of all but the last micro-batch stay on the rank: FSDP reduces their sum once."""
    return _accumulating(model) if isinstance(model, FSDPModule) and not last else nullcontext()
