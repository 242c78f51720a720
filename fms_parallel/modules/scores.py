"""The core of attention on plain tensors: softmax(q k^T * scale) v, by torch's fused attention or with weights dropped.

It knows heads and masks; it knows no parameters, no positions and no ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool = True) -> Tensor:
    """Attention of `q [B, h, S, D]` over `k, v [B, k, T, D]`; without `mask` causal, aligned to the last key, or full.

    The S queries are the last S of the T positions: torch's own `is_causal` aligns to the first, which is wrong for
    every multi-token step with a cache.
    """
    s, t = q.shape[-2], k.shape[-2]
    causal = causal and mask is None and s > 1
    if causal and s < t:
        mask, causal = causal_mask(s, t, q.device), False
    grouped = q.shape[1] != k.shape[1]
    if s == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu" and not torch.is_grad_enabled():
        # torch's fused attention on a CPU takes three times as long for one query in bf16 as in fp32, casts included.
        q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out.to(torch.bfloat16)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def dropped_scores(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool, factors: Tensor
) -> Tensor:
    """`scores` with the attention weights multiplied by `factors [B, h, S, T]`.

    torch's fused attention draws its own bits, which would differ between layouts; this holds S x T weights instead.
    """
    s, t = q.shape[-2], k.shape[-2]
    if causal and mask is None:
        mask = causal_mask(s, t, q.device)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    weights = weights * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:  # a query that may see nothing gets zero, as from torch
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
        factors = factors * mask
    return (weights.softmax(-1).to(q.dtype) * factors) @ v


def causal_mask(s: int, t: int, device: torch.device) -> Tensor:
    """Bool `[s, t]`: the last s of t positions, each of which sees itself and what is before it."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)
