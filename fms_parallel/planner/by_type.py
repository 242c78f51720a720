"""Whether a tensor layout that differs by block type can pay: attention cut over tp, feed-forwards data-parallel.

Between the two the tokens change hands: a reduce-scatter after attention, a gather before the next one, which together
send what attention's all-reduce sends. So redistribution itself is free, and what counts is, per block, step and rank
of a tp group that works on T tokens, as a multiple of (tp - 1) / tp elements:

    tp for both              8 T E             two all-reduces forward, two backward
    attention tp, rest dp    4 T E + 2 P_ffn   the feed-forward's gradients are summed over the group instead
    dp (or fsdp) for both    2 P_attention + 2 P_ffn

The one in the middle sends least only where P_ffn < 2 T E < P_attention: in blocks whose attention has more parameters
than their feed-forward. It knows shapes and counts; no devices.
"""

from __future__ import annotations

from fms_parallel.shape import ModelShape

TP, MIXED, DP = "tp", "attention tp, feed-forward dp", "dp"


def sent_by_type(shape: ModelShape, tokens: int) -> dict[str, int]:
    """Elements that a rank sends for one block and step, times tp / (tp - 1), under each of the three.

    Args:
        tokens: of a step, over all rows that a tp group works on.
    """
    once = 4 * tokens * shape.width
    attention, ffn = 2 * shape.attention_parameters, 2 * shape.ffn_parameters
    return {TP: 2 * once, MIXED: once + ffn, DP: attention + ffn}


def can_pay(shape: ModelShape) -> bool:
    """Whether there is any number of tokens for which the mixed layout sends least."""
    return shape.ffn_parameters < shape.attention_parameters
