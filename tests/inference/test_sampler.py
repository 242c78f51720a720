"""Tokens of rows with different rules, against the rules one row at a time and against transformers' processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fms_parallel.inference.options import Options
from fms_parallel.inference.sampler import Ask, Sampler
from fms_parallel.inference.sampling import NOT_FINITE, Sampling, pick, uniform
from fms_parallel.inference.vocabulary import Vocabulary

V = 300
SAMPLER = Sampler(Vocabulary(V))

RULES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 2.0, "top_k": V},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 9.0, "top_p": 0.97},  # far more than the first look's candidates
    {"temperature": 1.3, "top_k": 100, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 1},
]


def asks(rules: list[dict[str, Any]], prompt: tuple[int, ...] = (), new: tuple[int, ...] = ()) -> list[Ask]:
    return [Ask(Options(**rule, seed=7, row=row), prompt, new) for row, rule in enumerate(rules)]


def one_by_one(logits: Tensor, row: int, rule: dict[str, Any]) -> int:
    """The same draw from the whole distribution."""
    sampling = Sampling(**rule)
    if sampling.temperature == 0:
        return int(logits[row].argmax())
    draw = torch.tensor([uniform(7, row, 0)], dtype=torch.float64)
    return int(pick(sampling.probabilities(logits[row : row + 1]), draw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_with_different_rules_get_what_each_would_get_alone(dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(len(RULES), V, dtype=dtype) * 3
        found = SAMPLER.tokens(logits, asks(RULES)).tolist()
        assert found == [one_by_one(logits, row, rule) for row, rule in enumerate(RULES)]


def test_equal_logits_are_kept_in_the_order_of_the_vocabulary() -> None:
    logits = torch.zeros(1, V)
    drawn = {int(SAMPLER.tokens(logits, [Ask(Options(temperature=1.0, top_k=4, seed=s), (), ())])) for s in range(60)}
    assert drawn == {0, 1, 2, 3}
    assert SAMPLER.tokens(logits, asks([{}])).tolist() == [0]


def test_row_without_a_distribution_is_told_and_others_are_right() -> None:
    logits = torch.randn(4, V)
    logits[1, 5] = torch.nan
    logits[2] = -torch.inf
    rules = [{}, {"temperature": 1.0}, {}, {"temperature": 1.0, "top_p": 0.9}]
    found = SAMPLER.tokens(logits, asks(rules)).tolist()
    assert found[1:3] == [NOT_FINITE, NOT_FINITE]
    assert [found[0], found[3]] == [one_by_one(logits, row, rules[row]) for row in (0, 3)]


def test_min_p_drops_what_is_unlikely_beside_the_likeliest() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0, -3.0]])
    sampler = Sampler(Vocabulary(4))
    ask = Ask(Options(temperature=1.0, min_p=0.2), (), ())
    wanted = torch.tensor([1.0, 0.36787944117144233, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities(logits, [ask])[0], wanted / wanted.sum())
    drawn = {int(sampler.tokens(logits, [Ask(Options(temperature=1.0, min_p=0.2, seed=s), (), ())])) for s in range(50)}
    assert drawn == {0, 1}


def test_repetition_penalty_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(1, V)
    prompt, new = (3, 8, 3), (8, 9)
    wanted = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + new]), logits.clone())
    ask = Ask(Options(repetition_penalty=1.7), prompt, new)
    torch.testing.assert_close(SAMPLER.penalised(logits, [ask]), wanted)


def test_presence_frequency_and_bias_are_of_new_tokens_only() -> None:
    logits = torch.zeros(2, V)
    options = Options(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((4, 2.0), (9, 1.0)))
    found = SAMPLER.penalised(logits, [Ask(options, (1,), (9, 9, 2)), Ask(Options(), (1,), (9,))])
    assert found[1].count_nonzero() == 0
    assert {n: float(found[0, n]) for n in (2, 4, 9)} == {2: -0.75, 4: 2.0, 9: 0.0}
    assert found[0].count_nonzero() == 2
    assert logits.count_nonzero() == 0


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    logits = torch.randn(3, V)
    several = [Ask(Options(logprobs=n, temperature=t), (), ()) for n, t in ((0, 0.0), (3, 2.0), (5, 1.0))]
    found = SAMPLER.with_logprobs(logits, several, [4, 5, 6])
    wanted = logits.double().log_softmax(-1)
    for row, (chosen, token, count) in enumerate(zip(found, (4, 5, 6), (0, 3, 5), strict=True)):
        assert chosen.token == token
        assert chosen.logprob == pytest.approx(float(wanted[row, token]), abs=1e-12)
        values, tokens = wanted[row].topk(count)
        assert [t for t, _ in chosen.top] == tokens.tolist()
        assert [p for _, p in chosen.top] == pytest.approx(values.tolist(), abs=1e-12)


def test_nothing_is_told_that_nobody_asked_for() -> None:
    found = SAMPLER.with_logprobs(torch.randn(1, V), [Ask(Options(), (), ())], [4])
    assert (found[0].logprob, found[0].top) == (None, ())
