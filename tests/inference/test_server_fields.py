"""Requests that are refused: a 4xx with a sentence that names the field, and nothing of them is begun."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fms_parallel.errors import ConfigError
from fms_parallel.inference.server import Server, ServerOptions
from fms_parallel.inference.server.failure import Failure
from fms_parallel.inference.server.fields import CHAT, COMPLETION, LABELS, NEUTRAL, chat, completion
from tests.inference.served import NAME, get, idle, make_engine, metrics, post, serving

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}

BAD: list[tuple[str, Any, str | None, str]] = [
    (COMPLETIONS, {}, "prompt", "prompt is missing: a text, a list of token numbers"),
    (COMPLETIONS, {"prompt": []}, "prompt", "prompt=[]: must be a text, a list of token numbers"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", 'prompt=[1, "a"]: must be a text'),
    (COMPLETIONS, {"prompt": [True]}, "prompt", "prompt=[true]: must be"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "prompt is empty: start it with a token"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt", "prompt[1] is empty"),
    (COMPLETIONS, {"prompt": [37]}, "prompt", "prompt has token 37, but this model's tokens are 0..36"),
    (
        COMPLETIONS,
        {"prompt": "a", "temprature": 1},
        "temprature",
        "unknown field 'temprature'. Did you mean 'temperature'",
    ),
    (COMPLETIONS, {"prompt": "a", "messages": [HI]}, "messages", "unknown field 'messages'"),
    (COMPLETIONS, {"prompt": "a", "temperature": "1"}, "temperature", 'temperature="1": must be a finite number'),
    (COMPLETIONS, {"prompt": "a", "temperature": True}, "temperature", "temperature=true: must be a finite number"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "temperature=-1: must be a number >= 0"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, "top_p", "top_p=1.5: must be in (0, 1]"),
    (COMPLETIONS, {"prompt": "a", "top_k": 38}, "top_k", "top_k=38 of a vocabulary of 37"),
    (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k", "top_k=-2: must be a whole number >= 1"),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": 1000}, "frequency_penalty", "frequency_penalty=1000"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "n=0: must be a whole number in 1..128"),
    (COMPLETIONS, {"prompt": "a", "n": 1.5}, "n", "n=1.5: must be a whole number"),
    (COMPLETIONS, {"prompt": "a", "n": 128}, "n", "asks for 128 rows (prompts x n), but this server takes 6 at a time"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 41}, "max_tokens", "this server gives at most 40"),
    (
        COMPLETIONS,
        {"prompt": "a" * 30, "max_tokens": 35},
        "max_tokens",
        "has 30 tokens; with max_tokens=35 that makes 65",
    ),
    (
        COMPLETIONS,
        {"prompt": "a" * 64},
        "prompt",
        "prompt has 64 tokens, and max_seq_len=64 must hold at least one more",
    ),
    (COMPLETIONS, {"prompt": "a", "seed": 0.5}, "seed", "seed=0.5: must be a whole number"),
    (
        COMPLETIONS,
        {"prompt": "a", "stop": ""},
        "stop",
        'stop="": must be a text, or a list of texts, none of them empty',
    ),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop", "stop has 17 texts: at most 16"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream", 'stream="yes": must be true or false'),
    (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "stream_options without stream=true"),
    (
        COMPLETIONS,
        {"prompt": "a", "stream": True, "stream_options": {"include_usages": True}},
        "stream_options.include_usages",
        "Did you mean 'include_usage'",
    ),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "logprobs=21: must be a whole number in 0..20"),
    (COMPLETIONS, {"prompt": "a", "best_of": 1, "n": 2}, "best_of", "best_of=1 with n=2: must be at least n"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of", "best_of=2 with stream=true"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens=0 without echo=true asks for nothing"),
    (CHATS, {"messages": [HI], "max_tokens": 0}, "max_tokens", "max_tokens=0: must be a whole number >= 1"),
    (CHATS, {"messages": [HI], "best_of": 2}, "best_of", "unknown field 'best_of'"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens", "must be in 0..max_new_tokens=8"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [37]}, "stop_token_ids", "stop_token_ids has token 37"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": 3}, "stop_token_ids", "must be a list of token numbers"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "must be an object of token numbers"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"0": 101}}, "logit_bias", "logit_bias[0]=101: must be in -100..100"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"99": 1}}, "logit_bias", "logit_bias has token 99"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"\u0663": 1}}, "logit_bias", "must be an object of token numbers"),
    (COMPLETIONS, {"prompt": "a", "priority": 2**40}, "priority", "must be a whole number in -2,147,483,648.."),
    (CHATS, {"messages": [HI | {"name": 3}]}, "messages[0].name", "messages[0].name=3: must be a text"),
    ("/tokenize", {}, "prompt", "give one of prompt (a text) and messages"),
    ("/tokenize", {"prompt": "a", "messages": [HI]}, "prompt", "give one of prompt (a text) and messages"),
    ("/tokenize", {"prompt": [1]}, "prompt", "prompt=[1]: must be a text"),
    ("/tokenize", {"prompt": "a", "max_tokens": 3}, "max_tokens", "unknown field 'max_tokens'"),
    ("/detokenize", {}, "tokens", "tokens is missing: a list of token numbers"),
    ("/detokenize", {"tokens": [1, 37]}, "tokens", "tokens has token 37, but this model's tokens are 0..36"),
    ("/detokenize", b"[", None, "the body is not JSON"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", 'suffix="b" is not supported by this server'),
    (COMPLETIONS, {"prompt": "a", "model": 3}, "model", "model=3: must be a text"),
    (CHATS, {}, "messages", "messages is missing"),
    (CHATS, {"messages": []}, "messages", "messages=[]: must be a list of messages, at least one"),
    (CHATS, {"messages": ["hi"]}, "messages[0]", 'messages[0]="hi": must be an object with role and content'),
    (CHATS, {"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content=null: must be a text"),
    (
        CHATS,
        {"messages": [HI | {"role": "bot"}]},
        "messages[0].role",
        "role 'bot'. Known: assistant, developer, system",
    ),
    (CHATS, {"messages": [HI | {"tool_calls": [1]}]}, "messages[0].tool_calls", "unsupported field 'tool_calls'"),
    (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "only parts {'type': 'text', 'text': ...} are supported",
    ),
    (CHATS, {"messages": [HI], "tools": [{}]}, "tools", "tools=[{}] is not supported by this server: leave it out"),
    (CHATS, {"messages": [HI], "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    (CHATS, {"messages": [HI], "top_logprobs": 2}, "top_logprobs", "top_logprobs without logprobs=true"),
    (CHATS, {"messages": [HI], "logprobs": 2}, "logprobs", "logprobs=2: must be true or false"),
    (CHATS, {"messages": [HI], "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ: give one of them"),
    (CHATS, {"messages": [HI | {"content": "a" * 90}]}, "messages", "messages has 103 tokens, and max_seq_len=64"),
    (COMPLETIONS, b"", None, "the body is not JSON: Expecting value"),
    (COMPLETIONS, b'{"prompt": "a"', None, "the body is not JSON"),
    (COMPLETIONS, b"[1]", None, "the body must be one JSON object, not [1]"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', None, "NaN is no number of JSON"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', "temperature", "must be a finite number"),
    (COMPLETIONS, b'{"prompt": "\xff"}', None, "the body is not JSON: 'utf-8' codec"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000, None, "the body is not JSON"),
    (COMPLETIONS, b'{"prompt": [' + b"9" * 5000 + b"]}", None, "the body is not JSON"),
    (
        COMPLETIONS,
        b'{"prompt": ["\\ud800"], "\\udfff": 1}',
        "\udfff",
        "unknown field",
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Small: rows of 64 tokens, six at a time, bodies of 200 kB."""
    engine = make_engine(max_seq_len=64, max_batch_size=4)
    with serving(engine, max_queue=2, max_tokens=40, max_body_bytes=200_000, body_timeout=0.3) as server:
        yield server


@pytest.mark.parametrize(("path", "body", "field", "sentence"), BAD, ids=lambda one: str(one)[:50])
def test_a_bad_body_is_refused_by_name(server: Server, path: str, body: Any, field: str | None, sentence: str) -> None:
    status, said = post(server, path, body)
    assert status == 400 and sentence in said["error"]["message"], said
    assert said["error"]["type"] == "invalid_request_error"
    assert said["error"]["param"] == (field and field.encode("utf-8", "replace").decode())


def test_what_is_refused_leaves_nothing_behind(server: Server) -> None:
    for path, body, _, _ in BAD:
        post(server, path, body)
    assert idle(server) and metrics(server)["fms_generated_tokens_total"] == 0
    assert post(server, COMPLETIONS, {"prompt": "a" * 24, "max_tokens": 40})[0] == 200


def test_labels_and_neutral_values_are_taken_and_null_is_absent(server: Server) -> None:
    neutral = {name: values[0] for name, values in NEUTRAL.items() if values} | dict.fromkeys(LABELS, "mine")
    nothing = dict.fromkeys([name for name in CHAT if name != "messages"])
    assert post(server, CHATS, {**nothing, **neutral, "messages": [HI]})[0] == 200
    nothing = dict.fromkeys([name for name in COMPLETION if name != "prompt"])
    assert post(server, COMPLETIONS, {**nothing, **neutral, "prompt": "a", "best_of": 1})[0] == 200
    for name in NEUTRAL:
        with pytest.raises(Failure, match="is not supported"):
            chat({"messages": [HI], name: "something else"})


def test_temperature_zero_takes_the_likeliest_whatever_else_is_asked() -> None:
    options = completion({"prompt": "a", "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}).options
    assert options == {"temperature": 0}
    assert completion({"prompt": "a", "top_k": -1}).options == {"temperature": 1.0}


def test_wrong_paths_methods_and_kinds(server: Server) -> None:
    status, said = post(server, "/v1/embeddings", {})
    assert status == 404 and "no path /v1/embeddings. Known: /v1/completions" in said["error"]["message"]
    status, text = get(server, COMPLETIONS)
    assert status == 405 and "Method Not Allowed" in json.loads(text)["error"]["message"]
    status, said = post(server, COMPLETIONS, b"prompt=a", **{"content-type": "application/x-www-form-urlencoded"})
    assert status == 415 and "send application/json" in said["error"]["message"]


def test_a_body_that_is_too_large_or_too_slow(server: Server) -> None:
    status, said = post(server, COMPLETIONS, {"prompt": "a" * 250_000})
    assert status == 413 and "max_body_bytes=200,000" in said["error"]["message"]
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            line.sendall(b"186a0\r\n" + b" " * 100_000 + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(head + b"content-length: 100\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(b"nonsense\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 400 ")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(head + b"content-length: 100\r\n\r\n{")  # and leaves
    time.sleep(0.05)
    assert idle(server)


def test_texts_become_the_tokens_that_requests_have_and_texts_again(server: Server) -> None:
    status, found = post(server, "/tokenize", {"prompt": "b 4", "model": NAME})
    assert (status, found) == (200, {"count": 2, "max_model_len": 64, "tokens": [2, 31]})
    assert post(server, "/detokenize", {"tokens": [2, 31]}) == (200, {"prompt": "b4"})
    chat_tokens = post(server, "/tokenize", {"messages": [HI]})[1]["count"]
    answer = post(server, CHATS, {"messages": [HI], "max_tokens": 1})[1]
    assert answer["usage"]["prompt_tokens"] == chat_tokens
    assert post(server, "/tokenize", {"prompt": "a", "model": "other"})[0] == 404


def test_scripts_of_pages_may_ask_where_that_is_said() -> None:
    def asked(server: Server, method: str, origin: str) -> tuple[int, str | None]:
        line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        line.request(method, COMPLETIONS, headers={"origin": origin, **(wants if method == "OPTIONS" else {})})
        said = line.getresponse()
        said.read()
        line.close()
        return said.status, said.headers["access-control-allow-origin"]

    own = "http://localhost:3000"
    with serving(make_engine(max_seq_len=64), api_key="k", allowed_origins=f"https://a.example/, {own}") as server:
        assert asked(server, "OPTIONS", own) == (200, own)  # without the key
        assert asked(server, "POST", own) == (401, own)  # the script may read why
        assert asked(server, "OPTIONS", "http://evil.example")[1] is None
    with serving(make_engine(max_seq_len=64)) as server:
        assert asked(server, "OPTIONS", own) == (405, None)


def test_a_key_is_asked_for_but_of_health_and_metrics() -> None:
    with serving(make_engine(max_seq_len=64), api_key="sesame") as server:
        for sent in ({}, {"authorization": "Bearer other"}, {"authorization": "sesame"}):
            status, said = post(server, COMPLETIONS, {"prompt": "a"}, **sent)
            assert (status, said["error"]["type"]) == (401, "authentication_error")
            assert "Authorization: Bearer KEY" in said["error"]["message"]
        assert post(server, COMPLETIONS, {"prompt": "a"}, authorization="Bearer sesame")[0] == 200
        assert post(server, "/tokenize", {"prompt": "a"})[0] == get(server, "/nothing")[0] == 401
        assert get(server, "/v1/models")[0] == 401 and get(server, "/health")[0] == get(server, "/metrics")[0] == 200


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"max_queue": -1}, "max_queue=-1: must be >= 0"),
        ({"port": 65536}, "port=65536: must be <= 65535"),
        ({"drain_timeout": float("nan")}, "drain_timeout=nan: must be a number of seconds"),
        ({"api_key": ""}, "api_key is empty"),
    ],
)
def test_impossible_options_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ServerOptions(**words)


def test_a_taken_port_is_said(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1 port {port}: Address already in use"):
        Server(make_engine(max_seq_len=64), "other", ServerOptions(port=port))
