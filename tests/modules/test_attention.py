from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.modules import scores as room
from fms_parallel.modules.attention import Attention, AttentionShape, dropped_scores, scores
from fms_parallel.modules.dropout import Dropout
from fms_parallel.modules.norm import rms_norm
from fms_parallel.modules.positions import Rotary, rotate
from fms_parallel.modules.sequences import DropoutKey, Sequences
from tests.gradient import grad

E, D = 12, 4
SHAPES = {
    "MHA": AttentionShape(E, 4, 4, D),
    "GQA": AttentionShape(E, 4, 2, D),
    "MQA": AttentionShape(E, 4, 1, D),
    "biases": AttentionShape(E, 4, 2, D, qkv_bias=True, out_bias=True),
    "odd D": AttentionShape(E, 3, 1, 5),
    "own scale": AttentionShape(E, 4, 2, D, scale=0.3),
    "qk-norm": AttentionShape(E, 4, 2, D, qk_norm_eps=1e-5),
}


def build(shape: AttentionShape) -> Attention:
    attention = Attention(shape)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    return attention.double()


def naive_scores(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """softmax(q k^T) v with every number written out: q `[B, H, S, D]`, k, v `[B, K, T, D]`, allowed `[.., S, T]`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    weights = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -math.inf).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v


def naive(attention: Attention, x: Tensor, allowed: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """The whole module, from its separate matrices."""
    shape = attention.shape
    q, k, v = (m(x).unflatten(-1, (-1, shape.head_width)) for m in (attention.query, attention.key, attention.value))
    if shape.qk_norm_eps is not None:
        q = rms_norm(q, attention.query_norm, shape.qk_norm_eps)
        k = rms_norm(k, attention.key_norm, shape.qk_norm_eps)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    scale = shape.scale or shape.head_width**-0.5
    out = naive_scores(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allowed, scale)
    return attention.out(out.transpose(1, 2).flatten(2))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


class Cache:
    """The simplest `KVStore` that is right."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (keys, values), strict=True))
        self.kept[layer] = keys, values
        return keys, values


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_and_gradients_equal_naive(name: str, rotary: bool) -> None:
    shape = SHAPES[name]
    tables = None
    if rotary:
        part = 0.8 if shape.head_width % 2 else 1.0  # four of five features
        cos, sin = Rotary(shape.head_width, partial=part).tables(torch.arange(6), 6)
        tables = cos.double(), sin.double()
    attention = build(shape)
    x = torch.randn(2, 6, E, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attention.parameters()]
    got = attention(x, Sequences(2, 6, tables))
    want = naive(attention, x, causal(6), tables)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    for g, w in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def fuse(separate: Attention) -> Attention:
    """The same attention with query, key and value in one parameter."""
    shape = separate.shape
    fused = Attention(replace(shape, fused=True)).double()
    rows = [
        m.weight.view(shape.kv_heads, -1, shape.head_width, E) for m in (separate.query, separate.key, separate.value)
    ]
    with torch.no_grad():
        fused.qkv.weight.copy_(torch.cat(rows, dim=1))
        fused.out.load_state_dict(separate.out.state_dict())
        if shape.qkv_bias:
            biases = [
                m.bias.view(shape.kv_heads, -1, shape.head_width)
                for m in (separate.query, separate.key, separate.value)
            ]
            fused.qkv.bias.copy_(  # type: ignore[union-attr]
                torch.cat(biases, dim=1)
            )
        if shape.qk_norm_eps is not None:
            fused.query_norm.copy_(separate.query_norm)
            fused.key_norm.copy_(separate.key_norm)
    return fused


@pytest.mark.parametrize("name", SHAPES)
def test_fused_equals_separate(name: str) -> None:
    separate = build(SHAPES[name])
    x, seq = torch.randn(2, 6, E, dtype=torch.float64), Sequences(2, 6)
    torch.testing.assert_close(fuse(separate)(x, seq), separate(x, seq), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pieces", [(6,), (1,) * 6, (4, 2), (1, 5), (2, 1, 3)])
def test_steps_with_a_cache_equal_one_forward(kv_heads: int, pieces: tuple[int, ...]) -> None:
    """Defect W6 of the reference: the causal mask of a step of several tokens was aligned to the first key."""
    attention = build(AttentionShape(E, 4, kv_heads, D))
    x = torch.randn(2, 6, E, dtype=torch.float64)
    cache, steps = Cache(), []
    for piece in x.split(pieces, dim=1):
        steps.append(attention(piece, Sequences(2, piece.shape[1], cache=cache)))
    torch.testing.assert_close(torch.cat(steps, 1), naive(attention, x, causal(6), None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_as_many_tokens_as_kv_heads(kv_heads: int) -> None:
    """Defect W5 of the reference: it guessed the layout of keys from sizes, wrong and non-causal when S == K."""
    attention = build(AttentionShape(E, 4, kv_heads, D))
    x = torch.randn(2, kv_heads, E, dtype=torch.float64)
    want = naive(attention, x, causal(kv_heads), None)
    torch.testing.assert_close(attention(x, Sequences(2, kv_heads)), want, rtol=1e-12, atol=1e-12)
    later = x.clone()
    later[:, -1] += 1.0
    changed = attention(later, Sequences(2, kv_heads)) != attention(x, Sequences(2, kv_heads))
    assert not changed[:, :-1].any() and changed[:, -1].any()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_padded_rows_equal_the_rows_alone(kv_heads: int) -> None:
    """Defect W7 of the reference: of a padded batch's mask only the last row was kept, so tokens saw the future."""
    attention = build(AttentionShape(E, 4, kv_heads, D))
    x = torch.randn(2, 6, E, dtype=torch.float64)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)  # padded on the left
    mask = (causal(6) & real[:, None, :])[:, None]
    got = attention(x, Sequences(2, 6, mask=mask))
    torch.testing.assert_close(got[0, 2:], attention(x[:1, 2:], Sequences(1, 4))[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], attention(x[1:], Sequences(1, 6))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_may_see_nothing_gives_zero_and_finite_gradients(dtype: torch.dtype) -> None:
    """Padding on the left has such queries; a NaN there would reach every token through the next layer's values."""
    q, k, v = (torch.randn(1, heads, 3, D, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    mask = causal(3).clone()
    mask[:2] = False
    out = scores(q, k, v, mask, None)
    out.sum().backward()
    assert not out[:, :, :2].any() and out[:, :, 2].any()
    assert all(grad(x).isfinite().all() for x in (q, k, v))


def test_a_mask_with_a_cache_equals_naive() -> None:
    q, k, v = (torch.randn(2, heads, n, D, dtype=torch.float64) for heads, n in ((4, 2), (2, 5), (2, 5)))
    mask = torch.rand(2, 1, 2, 5) > 0.4
    mask[..., 0] = True
    torch.testing.assert_close(scores(q, k, v, mask, 0.7), naive_scores(q, k, v, mask, 0.7), rtol=1e-12, atol=1e-12)


def test_keys_are_not_repeated_for_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect W12 of the reference: keys and values were expanded to all query heads in every step."""
    seen = []
    real = room.F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k.shape[1], v.shape[1]))
        return real(q, k, v, **options)

    monkeypatch.setattr(room.F, "scaled_dot_product_attention", spy)
    build(SHAPES["GQA"])(torch.randn(1, 3, E, dtype=torch.float64), Sequences(1, 3))
    assert seen == [(2, 2)]


def test_each_layer_keeps_its_own_keys() -> None:
    cache = Cache()
    for layer in (0, 1):
        attention = Attention(SHAPES["MHA"], layer)
        torch.nn.init.zeros_(attention.query.weight)
        attention(torch.randn(1, 2, E), Sequences(1, 2, cache=cache))
    assert cache.kept.keys() == {0, 1}


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 heads do not divide by 3 kv heads"):
        AttentionShape(E, 4, 3, D)


@pytest.mark.parametrize("name", SHAPES)
def test_without_causality_every_token_sees_all(name: str) -> None:
    attention = build(replace(SHAPES[name], causal=False))
    x = torch.randn(2, 6, E, dtype=torch.float64)
    everything = torch.ones(6, 6, dtype=torch.bool)
    want = naive(attention, x, everything, None)
    torch.testing.assert_close(attention(x, Sequences(2, 6)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropped_scores_equal_naive(masked: bool, is_causal: bool) -> None:
    q, k, v = (torch.randn(2, heads, 5, D, dtype=torch.float64) for heads in (4, 2, 2))
    mask = (torch.rand(2, 1, 1, 5) > 0.3) if masked else None
    allowed = mask.expand(2, 1, 5, 5) if mask is not None else causal(5) if is_causal else torch.ones(5, 5).bool()
    got = dropped_scores(q, k, v, mask, 0.7, is_causal, factors := torch.rand(2, 4, 5, 5, dtype=torch.float64))
    weights = naive_scores(q, k, torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5), allowed, 0.7)
    want = (weights * factors) @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        dropped_scores(q, k, v, mask, 0.7, is_causal, torch.ones_like(factors)),
        scores(q, k, v, mask, 0.7, is_causal),
        rtol=1e-12,
        atol=1e-12,
    )


def test_dropout_of_attention_is_of_its_weights_while_training() -> None:
    attention = build(replace(SHAPES["GQA"], dropout=0.4))
    x, seq = torch.randn(2, 6, E, dtype=torch.float64), Sequences(2, 6, dropout=DropoutKey(1))
    factors = attention.score_dropout.factors(4, 0, 6, seq, x)
    assert set(factors.unique().tolist()) == {0.0, 1 / 0.6}
    with_factors = attention(x, seq)
    attention.score_dropout.p = 0.0
    assert not torch.allclose(with_factors, attention(x, seq))
    attention.score_dropout.p = 0.4
    torch.testing.assert_close(attention.eval()(x, Sequences(2, 6)), naive(attention, x, causal(6), None))


def test_a_rank_drops_of_its_heads_what_one_process_does() -> None:
    dropout, seq, like = Dropout(0.4, salt=-1), Sequences(2, 6, dropout=DropoutKey(1)), torch.empty(0)
    whole = dropout.factors(4, 0, 6, seq, like)
    halves = [dropout.factors(2, first, 6, seq, like) for first in (0, 2)]
    assert torch.equal(whole, torch.cat(halves, dim=1))
    assert not torch.equal(halves[0], halves[1])
