"""Attention cut over tp beside data-parallel feed-forwards: for which models and tokens it would send least."""

from __future__ import annotations

from dataclasses import replace

from fms_parallel.models.build import get_shape
from fms_parallel.planner.by_type import DP, MIXED, TP, can_pay, sent_by_type
from fms_parallel.shape import ModelShape

MODELS = [
    ("llama", "micro"),
    ("llama", "7b"),
    ("llama", "70b"),
    ("gpt_bigcode", None),
    ("mistral", None),
    ("granite", None),
]


def best(shape: ModelShape, tokens: int) -> str:
    sent = sent_by_type(shape, tokens)
    return min(sent, key=sent.__getitem__)


def test_for_no_model_of_the_library_and_no_number_of_tokens_it_sends_least() -> None:
    for architecture, variant in MODELS:
        shape = get_shape(architecture, variant)
        assert not can_pay(shape)
        assert {best(shape, 1 << power) for power in range(26)} == {TP, DP}


def test_where_attention_outweighs_the_feed_forward_there_are_tokens_for_which_it_does() -> None:
    shape = get_shape("llama", "7b")
    shape = replace(shape, ffn_width=shape.width // 4)
    assert can_pay(shape)
    between = (shape.ffn_parameters + shape.attention_parameters) // (4 * shape.width)
    assert best(shape, between) == MIXED
    assert best(shape, between // 100) == TP and best(shape, between * 100) == DP


def test_it_beats_tp_alone_above_one_and_a_half_widths_of_a_gated_feed_forward() -> None:
    shape = get_shape("llama", "7b")
    least = 3 * shape.ffn_width // 2
    for tokens, pays in ((least - 1, False), (least + 1, True)):
        sent = sent_by_type(shape, tokens)
        assert (sent[MIXED] < sent[TP]) == pays and (not pays or sent[DP] < sent[MIXED])
