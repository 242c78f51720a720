"""Filters against set arithmetic in plain Python, draws against the distribution they are drawn from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.inference.sampling import NOT_FINITE, Sampling, keep_top_p, pick, uniform

V = 11


def expected(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The definition, one row, token by token."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: weights[token], reverse=True)[: top_k or len(logits)]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if top_p is not None and mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return [weights[token] / total / mass if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, V])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(20, V) * 3
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    wanted = [expected(row, temperature, top_k, top_p) for row in logits.double().tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4), (1e-9, 1)]
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: int) -> None:
    found = Sampling(1.0, top_p=top_p).probabilities(log(0.1, 0.4, 0.2, 0.3))
    assert (found > 0).tolist() == [[rank < kept for rank in (3, 0, 2, 1)]]
    assert found.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("p", "kept"), [(0.5, [1, 0, 0]), (0.75, [2 / 3, 1 / 3, 0]), (0.76, [0.5, 0.25, 0.25])])
def test_top_p_that_is_just_reached_keeps_no_more(p: float, kept: list[float]) -> None:
    found = keep_top_p(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64), p)
    assert found[0].tolist() == pytest.approx(kept)


def test_top_k_of_equal_logits_keeps_exactly_k() -> None:
    found = Sampling(1.0, top_k=3).probabilities(torch.zeros(1, 8))
    assert sorted(found[0].tolist()) == pytest.approx([0] * 5 + [1 / 3] * 3)


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # Of all tokens 0.5 + 0.2 would reach 0.65; of the two likeliest, 0.5 / 0.7 does so alone.
    found = Sampling(1.0, top_k=2, top_p=0.65).probabilities(log(0.2, 0.5, 0.15, 0.15))
    assert found.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-308, 1e-3])
def test_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    assert Sampling(temperature).probabilities(torch.tensor([[10.0, 30.0, 20.0]])).tolist() == [[0, 1, 0]]


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.randn(50, V)
    assert torch.equal(Sampling().choose(logits, step=0), logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(0.7, seed=1), Sampling(1.5, top_k=5, seed=2), Sampling(1.0, top_p=0.8)])
def test_frequencies_of_draws_are_the_probabilities(sampling: Sampling) -> None:
    draws, logits = 20000, torch.randn(1, V)
    counts = torch.bincount(sampling.choose(logits.expand(draws, V), step=4), minlength=V)
    wanted = sampling.probabilities(logits)[0]
    assert (counts[wanted == 0] == 0).all()
    deviation = (counts / draws - wanted).abs() / (wanted * (1 - wanted) / draws).sqrt().clamp(min=1e-9)
    assert deviation.max() < 4  # standard deviations


def test_pick_takes_the_token_whose_interval_holds_the_draw() -> None:
    row = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert pick(row.expand(6, 6), draws).tolist() == [1, 1, 3, 3, 4, 4]


def test_uniform_numbers_are_uniform_and_differ_by_seed_row_and_step() -> None:
    numbers = [uniform(seed, row, step) for seed in (0, 1, -7, 2**80) for row in range(50) for step in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    tenths = torch.histc(torch.tensor(numbers), bins=10, min=0, max=1)
    assert (tenths - 1000).abs().max() < 4 * math.sqrt(1000 * 0.9)


def test_a_row_draws_the_same_whatever_its_batch_mates_are() -> None:
    sampling, logits = Sampling(1.0, top_k=8, top_p=0.95, seed=3), torch.randn(6, V)
    whole = [sampling.choose(logits, step) for step in range(40)]
    others = logits.clone()
    others[[0, 1, 3, 4, 5]] = torch.randn(5, V)
    assert [row[2] for row in whole] == [sampling.choose(others, step)[2] for step in range(40)]
    assert [row[2] for row in whole] == [sampling.choose(logits[:3], step)[2] for step in range(40)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=2, top_p=0.5)])
def test_rows_without_a_distribution_are_marked_and_no_others(sampling: Sampling) -> None:
    logits = torch.zeros(5, 4)
    logits[0, 1], logits[1, 2], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 0] = -math.inf  # a token that is not allowed
    chosen = sampling.choose(logits, step=0).tolist()
    assert chosen[:3] == [NOT_FINITE] * 3
    assert chosen[3] in (1, 2, 3)
    assert chosen[4] in (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be a number >= 0"),
        ({"temperature": math.nan}, "temperature=nan: must be"),
        ({"temperature": math.inf}, "temperature=inf: must be"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be >= 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: must be in"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p=1.01: must be in"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p=nan: must be in"),
        ({"top_k": 5}, "top_k=5 with temperature=0"),
        ({"top_p": 0.5}, "top_p=0.5 with temperature=0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**settings)  # type: ignore[arg-type]
    assert str(error.value).startswith(sentence)


def test_top_k_beyond_the_vocabulary_names_both() -> None:
    with pytest.raises(ConfigError, match=r"top_k=12 of a vocabulary of 11 keeps every token; use at most 11"):
        Sampling(1.0, top_k=12).choose(torch.zeros(1, V), step=0)
