"""Sequences that ranks share, without ranks: what each holds, and that parts of attention merge to the whole."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.distributed.collectives import Axis
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.modules.block_attention import block, block_backward, merge
from fms_parallel.modules.context import Context
from fms_parallel.modules.context_attention import check_ulysses
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.ring import part
from fms_parallel.modules.scores import scores
from fms_parallel.modules.sequences import DropoutKey, Sequences
from tests.gradient import grad

B, H, K, D = 2, 4, 2, 8
SCALE = D**-0.5


def contexts(cp: int, length: int) -> list[Context]:
    """Of every rank of an axis that talks to nobody."""
    return [Context(Axis(None, cp, rank, "none"), "ring", length) for rank in range(cp)]  # type: ignore[arg-type]


def test_a_rank_holds_a_chunk_of_the_head_and_one_of_the_tail() -> None:
    first, second = contexts(2, 13)
    assert first.positions().tolist() == [0, 1, 2, 3, 12, 12, 12, 12]
    assert second.positions().tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert (first.real(0), first.real(1), first.held) == (5, 8, 8)


@pytest.mark.parametrize(("cp", "length"), list(product((1, 2, 3, 4), (1, 3, 8, 13, 24))))
def test_pieces_of_all_ranks_make_the_whole(cp: int, length: int) -> None:
    x, ranks = torch.randn(2, 3, length, 5), contexts(cp, length)
    cut = torch.stack([context.cut(x, -2) for context in ranks])
    assert torch.equal(ranks[0].whole(cut)[..., :length, :], x)
    assert torch.equal(ranks[0].pieces(x), cut)
    held = [context.positions()[: context.real(context.axis.rank)].tolist() for context in ranks]
    assert sorted(position for one in held for position in one) == list(range(length))
    assert all(one == sorted(one) for one in held)


def test_dropout_masks_are_those_of_the_whole_sequences() -> None:
    whole = Dropout(0.5)(torch.ones(B, 13, 7), Sequences(B, 13, dropout=DropoutKey(3, first_token=26)))
    for context in contexts(2, 13):
        seq = Sequences(B, context.held, dropout=DropoutKey(3, first_token=26), context=context)
        real = context.real(context.axis.rank)
        assert torch.equal(Dropout(0.5)(torch.ones(B, context.held, 7), seq)[:, :real], context.cut(whole, 1)[:, :real])


def tensors(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.randn(B, heads, length, D, dtype=dtype).requires_grad_() for heads in (H, K, K)
    )


def documents(length: int) -> Tensor:
    """Causal within documents of 5 tokens, and one query that sees nothing: bool `[1, 1, S, S]`."""
    numbers = torch.arange(length) // 5
    mask = (numbers[:, None] == numbers) & torch.ones(length, length, dtype=torch.bool).tril()
    mask[length // 2] = False
    return mask[None, None]


def merged(context: Context, qkv: tuple[Tensor, ...], causal: bool, mask: Tensor | None) -> tuple[Any, ...]:
    """What a ring gives one rank: its queries, out, sums and the parts it saw, rank by rank."""
    q, k, v = (x.detach() for x in qkv)
    q, rows = context.cut(q, 2), None if mask is None else context.cut(mask, -2)
    out, sums = torch.zeros(q.shape, dtype=q.dtype), torch.full(q.shape[:-1], float("-inf"), dtype=q.dtype)
    parts = []
    for source in range(context.axis.size):
        seen = part(context, source, causal and mask is None, rows)
        if seen is None:
            continue
        keys, values = (context.cut(x, 2, rank=source)[..., seen.keys, :] for x in (k, v))
        found = block(q[..., seen.queries, :], keys, values, seen.mask, SCALE, seen.causal)
        merge(out[..., seen.queries, :], sums[..., seen.queries], *found)
        parts.append((source, seen, keys, values))
    return q, out, sums, parts


RULES: list[tuple[str, bool, bool]] = [("causal", True, False), ("full", False, False), ("documents", True, True)]


@pytest.mark.parametrize(("cp", "length"), [(2, 16), (2, 13), (4, 13), (4, 3), (3, 1)])
@pytest.mark.parametrize(("causal", "masked"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_merged_parts_and_their_gradients_equal_the_whole(cp: int, length: int, causal: bool, masked: bool) -> None:
    qkv, mask = tensors(length), documents(length) if masked else None
    want = scores(*qkv, mask, None, causal)
    upper = torch.randn_like(want)
    want.backward(upper)
    ranks = contexts(cp, length)
    # cut() pads: a gradient is added up in pieces, and made whole at the end.
    found = [torch.stack([torch.zeros_like(c.cut(x.detach(), 2)) for c in ranks]) for x in qkv]
    for context in ranks:
        rank = context.axis.rank
        q, out, sums, parts = merged(context, qkv, causal, mask)
        real = context.real(rank)
        torch.testing.assert_close(out[:, :, :real], context.cut(want.detach(), 2)[:, :, :real], rtol=1e-12, atol=1e-12)
        above = context.cut(upper, 2)
        for source, seen, keys, values in parts:
            rows = (..., seen.queries, slice(None))
            given = above[rows], q[rows], keys, values, out[rows], sums[..., seen.queries]
            d_q, d_k, d_v = block_backward(*given, seen.mask, SCALE, seen.causal)
            found[0][rank][rows] += d_q
            found[1][source][..., seen.keys, :] += d_k
            found[2][source][..., seen.keys, :] += d_v
    for x, pieces in zip(qkv, found, strict=True):
        whole = ranks[0].whole(pieces)[..., :length, :]
        torch.testing.assert_close(whole, grad(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [8, 13])
def test_causal_parts_are_equally_large_on_all_ranks(length: int) -> None:
    """Scores that are computed, a causal square counted half: what the head-tail cut is for."""

    def size(context: Context, source: int) -> float:
        seen = part(context, source, True, None)
        assert seen is not None
        areas = [len(range(context.held)[piece]) for piece in (seen.queries, seen.keys)]
        return areas[0] * areas[1] / (2 if seen.causal else 1)

    ranks = contexts(4, length)
    assert len({size(context, source) for context in ranks for source in range(4)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_out_attention_equals_the_fused_one(dtype: torch.dtype) -> None:
    """A mask that says what `causal` says takes the other way; fp16 has no fused one on a CPU."""
    q, k, v = (x.detach() for x in tensors(9, dtype))
    mask, tolerance = torch.ones(9, 9, dtype=torch.bool).tril(), 1e-5 if dtype == torch.float32 else 2e-2
    fused, written = block(q, k, v, None, SCALE, True), block(q, k, v, mask, SCALE, False)
    for a, b in zip(fused, written, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)
    upper = torch.randn_like(q)
    given = upper, q, k, v, fused[0].to(dtype), fused[1]
    pairs = zip(block_backward(*given, None, SCALE, True), block_backward(*given, mask, SCALE, False), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LayoutError, match="3 query heads of a tp rank do not divide by 2"):
        check_ulysses(3, 2)
    with pytest.raises(ConfigError, match="cache"):
        Sequences(1, 4, cache=object(), context=contexts(2, 8)[0])  # type: ignore[arg-type]
