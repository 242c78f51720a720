"""What the server answers, asked with OpenAI's own client: the tokens of `engine.generate`, in both dialects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from fms_parallel.inference import Completion, InferenceEngine
from fms_parallel.inference.server import Server
from tests.inference.served import LONG, NAME, client, get, idle, make_engine, metrics, serving, wait_until

GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
PLAIN_PROMPT = "system: be brief\nuser: hello there\nassistant:"
"""What the plain template makes of them; of this, `Letters` reads the letters."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def ask(server: Server) -> openai.OpenAI:
    return client(server)


@pytest.fixture(scope="module")
def reference() -> Iterator[InferenceEngine]:
    """The same weights, without a server."""
    with make_engine() as engine:
        yield engine


def words(options: dict[str, Any], new: int) -> dict[str, Any]:
    return {**options, "max_new_tokens": new}


# ---- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", ["hello", [1, 2, 3], ["hello", "x"], [[1, 2], [7, 8, 9]]], ids=str)
def test_completions_are_those_of_the_engine(
    ask: openai.OpenAI, reference: InferenceEngine, prompt: Any, options: dict[str, Any]
) -> None:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    expected = reference.generate(prompt if several else [prompt], **words(options, 12))
    found = ask.completions.create(model=NAME, prompt=prompt, max_tokens=12, **options)
    assert [one.text for one in found.choices] == [one.text for one in expected]
    assert [one.finish_reason for one in found.choices] == [one.finish for one in expected]
    assert found.usage is not None and found.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    assert found.usage.prompt_tokens == sum(len(one.prompt) for one in expected)
    streamed = ask.completions.create(model=NAME, prompt=prompt, max_tokens=12, stream=True, **options)
    texts, finishes = [""] * len(expected), [""] * len(expected)
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [one.text for one in expected] and finishes == [one.finish for one in expected]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chats_are_those_of_the_engine(ask: openai.OpenAI, reference: InferenceEngine, options: dict[str, Any]) -> None:
    expected = reference.generate(PLAIN_PROMPT, **words(options, 12))[0]
    body: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 12, **options}
    found = ask.chat.completions.create(**body)
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert found.usage is not None and found.usage.prompt_tokens == len(expected.prompt)
    chunks = list(ask.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.tokens) and chunks[0].usage is None


def test_choices_of_one_prompt_are_rows_of_one_seed(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    found = ask.completions.create(model=NAME, prompt=["hello", "x"], n=2, max_tokens=8, **SAMPLED)
    expected = reference.generate(["hello", "hello", "x", "x"], **words(SAMPLED, 8))
    assert [(one.index, one.text) for one in found.choices] == [(n, one.text) for n, one in enumerate(expected)]
    assert len({one.text for one in found.choices}) > 2
    assert found.usage is not None and found.usage.prompt_tokens == 6  # each prompt once


def test_without_a_seed_answers_differ_and_sixteen_tokens_come(ask: openai.OpenAI) -> None:
    found = [ask.completions.create(model=NAME, prompt="hello", extra_body={"ignore_eos": True}) for _ in range(2)]
    assert found[0].choices[0].text != found[1].choices[0].text
    assert [one.usage.completion_tokens for one in found if one.usage] == [16, 16]


def test_stop_texts_and_eos_end_an_answer(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    free = reference.generate("hello", max_new_tokens=20)[0].text
    stop = free[5:7]
    for given in (stop, ["?", stop]):
        found = ask.completions.create(model=NAME, prompt="hello", max_tokens=20, stop=given, **GREEDY).choices[0]
        assert (found.text, found.finish_reason) == (free[: free.index(stop)], "stop")
    ended = ask.completions.create(model=NAME, prompt="hello", max_tokens=20, logit_bias={"0": 100}, **GREEDY)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage is not None and ended.usage.completion_tokens == 1


def test_echo_begins_with_the_prompt(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    expected = "hello" + reference.generate("hello", max_new_tokens=4)[0].text
    for prompt in ("hello", reference.intake.ids("hello")):
        body: dict[str, Any] = {"model": NAME, "prompt": list(prompt) if prompt != "hello" else prompt, "echo": True}
        assert ask.completions.create(**body, max_tokens=4, **GREEDY).choices[0].text == expected
        streamed = ask.completions.create(**body, max_tokens=4, stream=True, **GREEDY)
        assert "".join(one.choices[0].text for one in streamed) == expected


def test_logprobs_are_those_of_the_engine_in_both_dialects(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    expected = reference.generate("hello", max_new_tokens=6, logprobs=2)[0]
    letters = reference.tokenizer.decode(expected.tokens)  # type: ignore[union-attr]
    told = [one.logprob for one in expected.logprobs]
    body: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 6, "logprobs": 2, **GREEDY}
    whole = ask.completions.create(**body).choices[0].logprobs
    parts = [one.choices[0].logprobs for one in ask.completions.create(**body, stream=True) if one.choices[0].logprobs]
    assert whole is not None and "".join(whole.tokens or []) == letters
    assert whole.token_logprobs == pytest.approx(told) and whole.text_offset == list(range(6))
    assert [max(top.values()) for top in whole.top_logprobs or []] == pytest.approx(told)  # greedy
    assert [set(map(len, [top])) for top in whole.top_logprobs or []] == [{2}] * 6
    assert [x for part in parts for x in part.token_logprobs or []] == whole.token_logprobs
    assert [x for part in parts for x in part.text_offset or []] == whole.text_offset

    expected = reference.generate(PLAIN_PROMPT, max_new_tokens=6, logprobs=2)[0]
    chat: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 6, **GREEDY}
    content = ask.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert content is not None and content.content is not None
    told = [one.logprob for one in expected.logprobs[: len(expected.text)]]  # this one ends with eos
    assert [one.logprob for one in content.content] == pytest.approx(told)
    first, best = content.content[0], expected.logprobs[0].top
    assert first.bytes == list(first.token.encode())
    assert [one.logprob for one in first.top_logprobs] == pytest.approx([logprob for _, logprob in best])
    streamed = ask.chat.completions.create(**chat, logprobs=True, stream=True)
    tokens = [x.token for one in streamed if (found := one.choices[0].logprobs) for x in found.content or []]
    assert tokens == [one.token for one in content.content]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_echo_with_logprobs_tells_the_prompt_too(
    ask: openai.OpenAI, reference: InferenceEngine, options: dict[str, Any]
) -> None:
    """As programs that score texts ask for it: the choice's logprobs begin with the prompt's tokens."""
    for prompt in ("hello", [8, 5, 12, 12, 15]):
        for new in (0, 4):
            words = options | {"max_new_tokens": new, "prompt_logprobs": 2, "logprobs": 2}
            expected = reference.generate([prompt], **words)[0]
            told = [*expected.prompt_logprobs, *expected.logprobs]
            body: dict[str, Any] = {"model": NAME, "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": new}
            found = ask.completions.create(**body, **options).choices[0]
            assert found.text == "hello" + expected.text and found.logprobs is not None
            assert "".join(found.logprobs.tokens or []) == found.text
            assert found.logprobs.token_logprobs == [None, *(pytest.approx(one.logprob) for one in told)]
            first, *top = found.logprobs.top_logprobs or []
            assert first is None and found.logprobs.text_offset == list(range(5 + len(expected.tokens)))
            for one, values in zip(told, top, strict=True):
                best = {reference.tokenizer.decode([t]): p for t, p in one.top}  # type: ignore[union-attr]
                assert values.items() >= best.items() and len(values) in (2, 3)
                assert one.logprob in values.values()
            parts = [one.choices[0] for one in ask.completions.create(**body, **options, stream=True)]
            assert "".join(part.text for part in parts) == found.text
            pieces = [part.logprobs for part in parts if part.logprobs]
            assert [x for piece in pieces for x in piece.token_logprobs or []] == found.logprobs.token_logprobs
            assert [x for piece in pieces for x in piece.text_offset or []] == found.logprobs.text_offset
    assert ask.completions.create(model=NAME, prompt="hello", echo=True, max_tokens=0).choices[0].text == "hello"


def test_scoring_does_as_an_evaluation_harness_reads_it(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    """Two contexts with continuations in one request of token lists: sums behind the context, and whether greedy."""
    context = [8, 5, 12, 12]
    greedy = list(reference.generate([context], max_new_tokens=3, ignore_eos=True)[0].tokens)
    rows = [context + greedy, [*context, 1, 2, 3]]
    body: dict[str, Any] = {"model": NAME, "prompt": rows, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1}
    choices = sorted(ask.completions.create(**body, **GREEDY).choices, key=lambda one: one.index)
    was_greedy = []
    for row, choice in zip(rows, choices, strict=True):
        told = choice.logprobs
        assert told is not None
        # A row that ends with eos has no log-probability of it; others have one for the new token.
        count = len(row)
        values = (told.token_logprobs or [])[len(context) : count]
        expected = reference.generate([row], max_new_tokens=0, prompt_logprobs=1)[0].prompt_logprobs
        assert sum(values) == pytest.approx(sum(one.logprob or 0.0 for one in expected[len(context) - 1 :]))
        words = (told.tokens or [])[len(context) : count]
        pairs = zip(words, (told.top_logprobs or [])[len(context) : count], strict=True)
        was_greedy.append(all(token == max(top, key=lambda x: top[x]) for token, top in pairs))
    assert was_greedy == [True, False]


def test_the_best_of_several_are_the_likeliest_in_the_mean(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    body: dict[str, Any] = {"model": NAME, "prompt": ["hello", "x"], "max_tokens": 6, **SAMPLED}
    found = ask.completions.create(**body, n=2, best_of=5)
    rows = reference.generate(["hello"] * 5 + ["x"] * 5, max_new_tokens=6, logprobs=0, **SAMPLED)
    expected = []
    for group in (rows[:5], rows[5:]):
        mean = {n: sum(x.logprob or 0.0 for x in one.logprobs) / len(one.logprobs) for n, one in enumerate(group)}
        expected += [group[n].text for n in sorted(mean, key=lambda n: -mean[n])[:2]]
    assert [one.text for one in found.choices] == expected and [one.index for one in found.choices] == [0, 1, 2, 3]
    assert all(one.logprobs is None for one in found.choices)
    assert found.usage is not None and found.usage.completion_tokens == sum(len(one.tokens) for one in rows)


def test_rows_end_at_given_tokens_and_not_before_the_least(ask: openai.OpenAI, reference: InferenceEngine) -> None:
    free = list(reference.generate("hello", max_new_tokens=12, ignore_eos=True)[0].tokens)
    last = free[5]
    more: dict[str, Any] = {"stop_token_ids": [last], "ignore_eos": True}
    body: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 12, **GREEDY}
    found = ask.completions.create(**body, extra_body=more)
    expected = reference.generate("hello", max_new_tokens=12, eos_id=[last])[0]
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected.text, "stop")
    body |= {"logit_bias": {"0": 50}}  # eos at once
    assert ask.completions.create(**body).usage.completion_tokens == 1  # type: ignore[union-attr]
    found = ask.completions.create(**body, extra_body={"min_tokens": 7})
    assert found.usage is not None and found.usage.completion_tokens == 8 and len(found.choices[0].text) == 7


def test_an_eos_token_is_no_text_and_has_no_logprob(ask: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": NAME, "prompt": "hello", "logprobs": 0, "logit_bias": {"0": 100}, **GREEDY}
    told = ask.completions.create(**body).choices[0].logprobs
    assert told is not None and told.tokens == []
    streamed = [one.choices[0] for one in ask.completions.create(**body, stream=True)]
    assert [one.finish_reason for one in streamed][-1] == "stop"
    assert not any(one.logprobs and one.logprobs.tokens for one in streamed)


# ---- who leaves ---------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_cache_at_once(server: Server, ask: openai.OpenAI) -> None:
    """Four that stream, one that waits behind them, one that waits for a whole answer."""
    body: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": LONG, "extra_body": {"ignore_eos": True}}
    wait_until(lambda: idle(server))
    before = metrics(server).get('fms_rows_ended_total{finish="cancelled"}', 0)
    streams = [ask.completions.create(**body, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        ask.with_options(timeout=0.3).completions.create(**body)
    with pytest.raises(openai.APITimeoutError):
        ask.with_options(timeout=0.3).completions.create(**body, stream=True)
    assert metrics(server)["fms_cache_used_tokens"] > 0
    for stream in streams:
        stream.close()
    wait_until(lambda: idle(server))
    now = metrics(server)
    assert now['fms_rows_ended_total{finish="cancelled"}'] == before + 6
    assert now['fms_requests_total{path="/v1/completions",status="499"}'] == 6
    assert now["fms_generated_tokens_total"] < 6 * LONG


# ---- pages --------------------------------------------------------------------------------------------------------


def test_models_health_and_metrics(server: Server, ask: openai.OpenAI) -> None:
    assert [one.id for one in ask.models.list()] == [NAME] and ask.models.retrieve(NAME).object == "model"
    assert get(server, "/health") == (200, '{"status":"ok"}')
    wait_until(lambda: idle(server))
    before = metrics(server)
    ask.completions.create(model=NAME, prompt="hello", n=2, max_tokens=5, extra_body={"ignore_eos": True})
    with pytest.raises(openai.NotFoundError, match="no model \"other\": this server has 'tiny'"):
        ask.completions.create(model="other", prompt="hello")
    wait_until(lambda: idle(server))
    now = metrics(server)
    grown = {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name)}
    assert grown['fms_requests_total{path="/v1/completions",status="200"}'] == 1
    assert grown["fms_generated_tokens_total"] == 10 and grown["fms_prompt_tokens_total"] == 10
    assert grown["fms_time_to_first_token_seconds_count"] == grown["fms_time_per_output_token_seconds_count"] == 2
    assert grown['fms_row_seconds_bucket{le="+Inf"}'] == 2 and grown['fms_rows_ended_total{finish="length"}'] == 2
    assert now["fms_engine_up"] == 1 and now["fms_cache_tokens"] >= 4 * LONG


def test_a_row_without_a_distribution_fails_alone(reference: InferenceEngine) -> None:
    """The error of one row is a 500 with the engine's sentence; the server goes on."""
    engine = make_engine()
    with serving(engine) as server:
        ask = client(server)
        good = ask.completions.create(model=NAME, prompt="hello", max_tokens=3, **GREEDY).choices[0].text
        weight = next(engine.model.parameters())
        kept = weight.data[1].clone()
        weight.data[1] = float("nan")
        for stream in (False, True):
            with pytest.raises(openai.APIError, match="logits are NaN"):
                for _ in ask.completions.create(model=NAME, prompt="aaa", stream=stream):
                    pass
        weight.data[1] = kept
        assert ask.completions.create(model=NAME, prompt="hello", max_tokens=3, **GREEDY).choices[0].text == good
    expected: Completion = reference.generate("hello", max_new_tokens=3)[0]
    assert good == expected.text
