"""Log-probabilities of prompts: those of a plain forward, however the prompt is cached, cut, shared or interrupted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.errors import FmsError
from fms_parallel.inference import Completion, Event, InferenceEngine, PromptLookup
from fms_parallel.inference.setup import CACHES
from tests.inference.models import PROMPTS, tiny_llama

TOP = 3
LONG = [(7 * n * n + 3 * n) % 37 for n in range(40)]
ALL = [*PROMPTS, LONG]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "in chunks": {"max_step_tokens": 5, "max_batch_size": 2},
    "prompt lookup": {"speculative": PromptLookup(3), "max_step_tokens": 40},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama().double()


@torch.no_grad()
def check(model: nn.Module, one: Completion, close: float = 1e-12) -> None:
    """Against log_softmax of all logits of the row."""
    row = torch.tensor([[*one.prompt, *one.tokens]])
    wanted = model(row)[0].double().log_softmax(-1)
    assert [told.token for told in one.prompt_logprobs] == list(one.prompt[1:])
    told = [*one.prompt_logprobs, *one.logprobs]
    places = range(len(told)) if one.logprobs else range(len(one.prompt) - 1)
    for place, here in zip(places, told, strict=True):
        values, tokens = wanted[place].topk(TOP)
        assert here.logprob == pytest.approx(float(wanted[place, here.token]), abs=close)
        assert [token for token, _ in here.top] == tokens.tolist()
        assert [value for _, value in here.top] == pytest.approx(values.tolist(), abs=close)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", CACHES)
def test_they_are_those_of_a_plain_forward(cache: str, way: str, model: nn.Module) -> None:
    with InferenceEngine(model, cache=cache, **WAYS[way]) as engine:
        plain = engine.generate(ALL, max_new_tokens=5)
        found = engine.generate(ALL, max_new_tokens=5, logprobs=TOP, prompt_logprobs=TOP)
        assert [one.tokens for one in found] == [one.tokens for one in plain]
        for one in found:
            assert len(one.logprobs) == 5
            check(model, one)
        assert engine.memory_report().used == 0


def test_fp32_is_close(model: nn.Module) -> None:
    narrow = tiny_llama()
    with InferenceEngine(narrow) as engine:
        check(model, engine.generate([LONG], max_new_tokens=1, logprobs=TOP, prompt_logprobs=TOP)[0], 1e-4)
        check(narrow, engine.generate([LONG], max_new_tokens=1, logprobs=TOP, prompt_logprobs=TOP)[0], 1e-5)


def test_prompts_found_in_the_cache_are_computed_again(model: nn.Module) -> None:
    with InferenceEngine(model, block_size=4) as engine:
        engine.generate([LONG], max_new_tokens=2)
        shared = engine.generate([LONG], max_new_tokens=2)[0]
        found = engine.generate([LONG, LONG], max_new_tokens=2, logprobs=TOP, prompt_logprobs=TOP)
        assert shared.shared == 36 and [one.shared for one in found] == [0, 0]
        for one in found:
            check(model, one)
        assert engine.generate([LONG], max_new_tokens=2)[0].shared == 36


def test_rows_that_must_wait_tell_each_token_once(model: nn.Module) -> None:
    """Rows that give their blocks back in the middle of a prompt, or behind it."""
    with InferenceEngine(model, block_size=4, cache_tokens=44, max_batch_size=4, max_step_tokens=7) as engine:
        prompts = [[n + 1, *LONG[:9]] for n in range(4)]
        found = engine.generate(prompts, max_new_tokens=20, logprobs=TOP, prompt_logprobs=TOP)
        assert engine.counts().preemptions > 0
        for one in found:
            check(model, one)


def test_a_prompt_may_be_all_that_is_asked_about(model: nn.Module) -> None:
    events: list[Event] = []
    with InferenceEngine(model, max_step_tokens=11) as engine:
        found = engine.generate(ALL, max_new_tokens=0, prompt_logprobs=TOP, stream=events.append)
        for one in found:
            assert (one.tokens, one.finish, one.logprobs) == ((), "length", ())
            check(model, one)
        assert engine.counts().new_tokens == 0 and engine.memory_report().used == 0
    assert {event.row: event.prompt_logprobs for event in events} == {
        row: one.prompt_logprobs for row, one in enumerate(found) if one.prompt_logprobs
    }
    longest = InferenceEngine(model, max_seq_len=40).generate([LONG], max_new_tokens=0, prompt_logprobs=0)[0]
    assert len(longest.prompt_logprobs) == 39 and not any(one.top for one in longest.prompt_logprobs)


def test_the_first_event_brings_them(model: nn.Module) -> None:
    events: list[Event] = []
    with InferenceEngine(model, max_step_tokens=9) as engine:
        found = engine.generate([LONG], max_new_tokens=3, prompt_logprobs=1, stream=events.append)[0]
    assert [len(event.prompt_logprobs) for event in events] == [39, 0, 0]
    assert events[0].prompt_logprobs == found.prompt_logprobs


def test_a_prompt_without_a_distribution_fails_alone() -> None:
    model = tiny_llama().double()
    with torch.no_grad():
        model.get_parameter("embedding.weight")[7] = torch.nan
    with InferenceEngine(model, max_step_tokens=9) as engine:
        bad, good = [engine.submit([1, 2, token, 3], max_new_tokens=2, prompt_logprobs=1) for token in (7, 5)]
        assert good.result().finish == "length"
        assert isinstance(bad.result().error, FmsError)
        assert "NaN or infinite behind prompt token" in str(bad.result().error)
        assert engine.memory_report().used == 0
