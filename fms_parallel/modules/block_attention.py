"""Attention over a part of the keys, with what is needed to merge parts: the log of the sum of exponentials.

    s = q k^T * scale      sums = log sum_t exp(s_t)      out = sum_t exp(s_t - sums) v_t

Two parts merge to `exp(sums_1 - sums) out_1 + exp(sums_2 - sums) out_2` with `sums = logaddexp(sums_1, sums_2)`. The
backward pass of a part takes the *merged* out and sums: then its weights are those of the whole softmax. torch's fused
kernels are used where they give their sums; anything else (a mask, fp32 on a GPU) is written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fms_parallel import compat

Part = tuple[Tensor, Tensor]
"""out `[B, h, S, D]` and sums `[B, h, S]`."""


def block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Part:
    """Attention of `q [B, h, S, D]` over `k, v [B, k, T, D]`.

    Args:
        mask: bool, broadcast to `[B, h, S, T]`, or None. causal: S = T and query i sees keys up to i.
    Returns:
        out in the dtype of `q` or wider, and sums, at least fp32; a query that sees nothing has 0 and -inf.
    """
    if mask is None and compat.has_attention_sums(q):
        return compat.attention_sums(q, k, v, causal, scale)
    weights, sums = _weights(q, k, mask, scale, causal)
    return (weights @ v.to(weights.dtype)).view(q.shape), sums


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `sums` of all parts merged, `grad` of `out`."""
    if mask is None and compat.has_attention_sums(q):
        return compat.attention_sums_backward(grad, q, k, v, out, sums, causal, scale)
    weights, _ = _weights(q, k, mask, scale, causal, sums)
    wide, kv_heads = weights.dtype, k.shape[1]
    keys, values, upper, queries = k.to(wide), v.to(wide), _grouped(grad, kv_heads, wide), _grouped(q, kv_heads, wide)
    d_v = weights.transpose(-1, -2) @ upper
    mean = (upper * _grouped(out, kv_heads, wide)).sum(-1, keepdim=True)
    d_s = weights * (upper @ values.transpose(-1, -2) - mean) * scale
    return (d_s @ keys).view(q.shape), d_s.transpose(-1, -2) @ queries, d_v


def merge(out: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> None:
    """Add a part to what was found so far, in place."""
    total = torch.logaddexp(sums, more_sums)
    finite = total.where(total > float("-inf"), 0)  # -inf - -inf would be NaN
    out.mul_((sums - finite).exp_().unsqueeze(-1)).addcmul_(
        more.to(out.dtype), (more_sums - finite).exp_().unsqueeze(-1)
    )
    sums.copy_(total)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """exp(s - sums), `[B, k, H/K * S, T]`, and the sums `[B, h, S]`: those given, or of this part alone."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, length, _ = q.shape
    s = _grouped(q, k.shape[1], wide) @ k.to(wide).transpose(-1, -2) * scale
    s = s.view(batch, heads, length, -1)
    if causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if sums is None:
        sums = s.logsumexp(-1)
    weights = (s - sums.where(sums > float("-inf"), 0).unsqueeze(-1)).exp_()
    return weights.view(batch, k.shape[1], -1, k.shape[2]), sums


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """`[B, h, S, D]` -> `[B, k, h/k * S, D]`: the queries of one kv head under each other, so that none is copied."""
    return x.to(dtype).reshape(x.shape[0], kv_heads, -1, x.shape[-1])
