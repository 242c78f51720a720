"""Cross-entropy of a linear head, without ever holding all logits: forward and backward in one pass over chunks.

For a chunk of tokens the logits are made, turned into their own gradient in place, multiplied back, and dropped; the
backward pass only scales what is there. It costs no extra matrix product, since loss is always followed by its
gradient. With the vocabulary cut over an axis each rank sends three numbers a token: its largest logit, its sum of
exponentials and the wanted logit if it has it.

    loss_t = log sum_v exp(l_tv) - l_t,label        d loss_t / d l_tv = softmax(l_t)_v - [v = label]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fms_parallel.compat import assert_on_device
from fms_parallel.distributed.collectives import Axis, TokenRun, all_gather
from fms_parallel.modules.first_order import first_order

IGNORE = -100
"""Label of a position that has no wanted token."""

_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits held at a time. On a CPU 32 MiB of fp32: each chunk reads and writes the weight's whole gradient, so that many
small ones are slow (2 Mi: a fifth slower at V = 32000). On a GPU enough for it to be busy.
"""


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of `[.., n]` against `[..]`, in fp32 at least, summed over the labels that ask for something."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    return torch.nn.functional.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE, reduction="sum")


class VocabularyShard(NamedTuple):
    """The part of a vocabulary of `vocab` whose rows this rank holds, from `start`; `axis` None means all of it."""

    axis: Axis | None
    start: int
    vocab: int


def linear_cross_entropy(
    x: Tensor | TokenRun, weight: Tensor, labels: Tensor, shard: VocabularyShard, bias: Tensor | None = None
) -> Tensor:
    """Sum over tokens of the cross-entropy of `x @ weight.T + bias` against `labels`.

    Args:
        x: `[T, E]`, or a run of the tokens. weight: `[V/tp, E]`.
        labels: `[T]`, global token ids, `IGNORE` where there is none.
        bias: `[V/tp]`, or none.
    Returns:
        a scalar in fp32 (fp64 for fp64 input), the same on every rank of the axis. The gradient of a whole `x` covers
        this rank's part of the vocabulary only: the caller's region sums it. That of a run is summed here, as soon as
        it is known, so that a run is all that is kept of it.
    Raises:
        RuntimeError: a label that is no token, which no rank would find among its rows.
    """
    known = (labels == IGNORE) | ((labels >= 0) & (labels < shard.vocab))
    assert_on_device(known.all(), f"a label is neither {IGNORE} nor a token id in [0, {shard.vocab}).")
    tokens, source = (x.run, x) if isinstance(x, TokenRun) else (x, None)
    return _LinearCrossEntropy.apply(tokens, weight, bias, labels, shard, torch.is_grad_enabled(), source)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: VocabularyShard,
        with_gradient: bool,
        source: TokenRun | None,
    ) -> Tensor:
        if source is not None:
            x = source._replace(run=x).gathered()
        # Under no_grad the inputs still say that they need a gradient: nobody would use it.
        need_x, need_w, need_b = (with_gradient and need for need in ctx.needs_input_grad[:3])
        wide = torch.promote_types(x.dtype, torch.float32)
        d_x = torch.empty_like(x) if need_x else None
        d_w = torch.zeros_like(weight, dtype=wide) if need_w else None
        d_b = torch.zeros_like(bias, dtype=wide) if need_b and bias is not None else None
        total = torch.zeros((), dtype=wide, device=x.device)
        rows = max(1, _CHUNK_ELEMENTS.get(x.device.type, 1 << 23) // max(1, weight.shape[0]))
        for start in range(0, x.shape[0], rows):
            piece = slice(start, start + rows)
            logits = torch.nn.functional.linear(x[piece], weight, bias)
            loss, gradient = _chunk(logits, labels[piece], shard, wide, need_x or need_w or need_b)
            total += loss
            if gradient is not None and d_x is not None:
                torch.mm(gradient.to(x.dtype), weight, out=d_x[piece])
            if gradient is not None and d_w is not None:
                _accumulate(d_w, gradient, x[piece])
            if gradient is not None and d_b is not None:
                d_b += gradient.sum(0)
            del logits, gradient  # before the next chunk is made, or two would be held
        if source is not None and d_x is not None:
            d_x = source.scattered(d_x)
        ctx.save_for_backward(d_x, d_w, d_b)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_w, d_b = ctx.saved_tensors
        x = None if d_x is None else d_x * grad.to(d_x.dtype)
        w, b = (None if d is None else (d * grad).to(ctx.weight_dtype) for d in (d_w, d_b))
        return x, w, b, None, None, None, None


def _accumulate(d_w: Tensor, gradient: Tensor, x: Tensor) -> None:
    if x.dtype == d_w.dtype:
        d_w.addmm_(gradient.t(), x)
    else:
        d_w += gradient.to(x.dtype).t() @ x


def _chunk(
    logits: Tensor, labels: Tensor, shard: VocabularyShard, wide: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of one chunk, and its gradient with respect to the logits in their own memory."""
    logits = logits.to(wide)
    valid = labels != IGNORE
    mine = labels - shard.start
    here = valid & (mine >= 0) & (mine < logits.shape[1])
    index = mine.where(here, 0).unsqueeze(1)
    wanted = logits.gather(1, index).squeeze(1).where(here, 0) if logits.shape[1] else logits.new_zeros(len(labels))
    peak = logits.amax(1) if logits.shape[1] else logits.new_full((len(labels),), float("-inf"))
    logits = logits.sub_(peak.unsqueeze(1)).exp_()
    mass = logits.sum(1)
    top, total, wanted = _over_axis(peak, mass, wanted, shard.axis)
    loss = (top + total.log() - wanted).where(valid, 0).sum()
    if not with_gradient:
        return loss, None
    scale = ((peak - top).exp() / total).where(valid, 0)
    logits.mul_(scale.unsqueeze(1))
    if logits.shape[1]:
        logits.scatter_add_(1, index, -here.to(wide).unsqueeze(1))
    return loss, logits


def _over_axis(peak: Tensor, mass: Tensor, wanted: Tensor, axis: Axis | None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge each rank's (largest logit, sum of exponentials below it, wanted logit): one collective."""
    if axis is None or axis.size == 1:
        return peak, mass, wanted
    peaks, masses, wants = all_gather(torch.stack([peak, mass, wanted]), axis).unflatten(0, (axis.size, 3)).unbind(1)
    top = peaks.amax(0)
    return top, (masses * (peaks - top).exp()).sum(0), wants.sum(0)
