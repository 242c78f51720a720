"""Speculative decoding: the model's own tokens or distribution, whatever is proposed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.errors import ConfigError
from fms_parallel.inference import DraftModel, InferenceEngine, PromptLookup, generate
from fms_parallel.inference.draft import ModelProposer
from fms_parallel.inference.options import Options
from fms_parallel.inference.sampler import Ask
from fms_parallel.inference.setup import CACHES
from fms_parallel.inference.speculative import rejection
from tests.inference.models import PROMPTS, tiny_llama

NEW = 14


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama().double()


def drafts(model: nn.Module) -> dict[str, PromptLookup | DraftModel]:
    return {
        "lookup": PromptLookup(3),
        "itself": DraftModel(model, 3),
        "another": DraftModel(tiny_llama(1, layers=1, width=16).double(), 4),
        "short of positions": DraftModel(tiny_llama(1, layers=1, width=16, max_positions=12).double(), 2),
    }


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["lookup", "itself", "another", "short of positions"])
def test_greedy_tokens_are_those_without_a_draft(name: str, cache: str, model: nn.Module) -> None:
    prompts = [*PROMPTS, [3, 4, 3, 4, 3], [1] * 9]
    options: dict[str, Any] = {"cache": cache, "max_batch_size": 3, "max_seq_len": 40, "max_step_tokens": 18}
    with InferenceEngine(model, speculative=drafts(model)[name], **options) as engine:
        found = engine.generate(prompts, max_new_tokens=NEW, eos_id=24)
        counts = engine.counts()
        assert engine.memory_report().used == 0
        assert not isinstance(engine.proposer, ModelProposer) or engine.proposer.pool.in_use == 0
    assert [list(one.tokens) for one in found] == generate(model, prompts, max_new_tokens=NEW, eos_id=24)
    assert counts.drafted > 0
    assert (counts.accepted == counts.drafted) == (name == "itself")


def test_cache_too_small_for_all_changes_nothing(model: nn.Module) -> None:
    prompts = [[n + 1, 2, 3] for n in range(5)]
    for draft in drafts(model).values():
        with InferenceEngine(
            model, speculative=draft, cache_tokens=44, block_size=4, max_seq_len=40, max_step_tokens=50
        ) as engine:
            found = engine.generate(prompts, max_new_tokens=20)
            assert engine.counts().preemptions > 0
        assert [list(one.tokens) for one in found] == generate(model, prompts, max_new_tokens=20)


def test_prompt_lookup_gives_the_sampled_tokens_of_decoding_without_it(model: nn.Module) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.7, "top_p": 0.9, "seed": 4}
    with InferenceEngine(model, speculative=PromptLookup(3)) as engine:
        found = [list(one.tokens) for one in engine.generate(PROMPTS, **options)]
        assert engine.counts().drafted > 0
    assert found == generate(model, PROMPTS, **options)


def test_logprobs_are_those_without_a_draft(model: nn.Module) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "logprobs": 2}
    with InferenceEngine(model) as plain, InferenceEngine(model, speculative=DraftModel(model, 3)) as engine:
        for one, other in zip(plain.generate(PROMPTS, **options), engine.generate(PROMPTS, **options), strict=True):
            assert one.tokens == other.tokens
            for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-12)


@pytest.mark.parametrize("close", [True, False])
def test_kept_tokens_have_the_models_distribution(close: bool) -> None:
    """Pearson's chi-square of 20000 draws with fixed seeds: a wrong rule misses by far more than chance."""
    torch.manual_seed(3)
    p = torch.randn(12, dtype=torch.float64).mul(1.5).softmax(-1)
    q = (p.log() + torch.randn(12, dtype=torch.float64) * (0.3 if close else 2.0)).softmax(-1)
    p[4], q[7] = 0.0, 0.0
    p, q = p / p.sum(), q / q.sum()
    drawn = torch.multinomial(q, 20000, replacement=True).tolist()
    asks = [Ask(Options(temperature=1.0, seed=n), (), ()) for n in range(20000)]
    kept = Counter(rejection(p[None], q[None], [token], [ask])[0] for token, ask in zip(drawn, asks, strict=True))
    assert kept[4] == 0
    assert chi_square(kept, p, 20000) < 31.3  # 99.9 % of chance at 11 degrees of freedom


@pytest.mark.parametrize(
    "rules", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 2.0, "top_p": 0.8}]
)
def test_sampled_pairs_of_tokens_have_the_models_distribution(rules: dict[str, Any]) -> None:
    """Of the second and third new token, which the draft proposes, given the first: against the exact distribution."""
    model = tiny_llama(1, layers=1, vocab_size=5, std=0.2).double()
    draft = DraftModel(tiny_llama(1, layers=1, width=16, vocab_size=5, std=0.3).double(), 2)
    count, prompt = 4000, [1, 2]
    with InferenceEngine(model, speculative=draft, max_batch_size=50, max_seq_len=8) as engine:
        found = engine.generate([prompt] * count, max_new_tokens=4, **rules, seed=11)
        counts = engine.counts()
    assert 0.1 < counts.accepted / counts.drafted < 1.0
    seen = Counter(one.tokens[:3] for one in found)
    exact = exact_triples(model, prompt, rules)
    triples = sorted(exact, key=lambda one: -exact[one])
    likely = [one for one in triples if exact[one] * count >= 5]
    rest = 1.0 - sum(exact[one] for one in likely)
    p = torch.tensor([*(exact[one] for one in likely), rest], dtype=torch.float64)
    observed = Counter({n: seen[one] for n, one in enumerate(likely)})
    observed[len(likely)] = count - sum(observed.values())
    assert chi_square(observed, p, count) < len(p) + 4 * (2 * len(p)) ** 0.5  # four standard deviations


@torch.no_grad()
def exact_triples(model: nn.Module, prompt: list[int], rules: dict[str, Any]) -> dict[tuple[int, ...], float]:
    sampling = Options(**rules).sampling
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for row, mass in found.items():
            p = sampling.probabilities(model(torch.tensor([[*prompt, *row]]))[:, -1])[0]
            longer.update({(*row, token): mass * float(p[token]) for token in range(5) if p[token] > 0})
        found = longer
    return found


def chi_square(observed: Counter[int], p: torch.Tensor, count: int) -> float:
    return sum((observed[n] - count * float(x)) ** 2 / (count * float(x)) for n, x in enumerate(p) if x > 1e-12)


@pytest.mark.parametrize(
    ("row", "proposed"),
    [([1, 2, 3, 1, 2], [3, 1, 2]), ([1, 2, 9, 5, 2, 7, 1, 2], [9, 5, 2]), ([1, 2, 3], []), ([4, 4], [4]), ([4], [])],
)
def test_lookup_proposes_what_followed_the_longest_latest_match(row: list[int], proposed: list[int]) -> None:
    assert PromptLookup(3).propose(row) == proposed


@pytest.mark.parametrize("options", [{"tokens": 0}, {"shortest": 0}, {"shortest": 4}])
def test_impossible_lookup_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        PromptLookup(**options)


def test_draft_with_other_tokens_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="the draft model has 40 tokens, the model 37"):
        InferenceEngine(model, speculative=DraftModel(tiny_llama(vocab_size=40)))
    with pytest.raises(ConfigError, match="propose at least 1"):
        DraftModel(model, 0)
