"""Too much at a time, too late, at the end, and after the engine's death: every client is told, none hangs."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference import InferenceEngine
from fms_parallel.inference.server import ChatTemplate, Server, ServerOptions
from fms_parallel.inference.server.__main__ import FACTORIES, end_tokens, find_factory
from fms_parallel.inference.server.app import Application
from tests.inference.served import (
    LONG,
    NAME,
    Letters,
    client,
    get,
    idle,
    make_engine,
    metrics,
    post,
    serving,
    wait_until,
)

ENDLESS: dict[str, Any] = {
    **{"model": NAME, "prompt": "hello", "max_tokens": LONG, "stream": True},
    "logit_bias": {"0": -100},
}
"""Does not end by itself while a test looks at it: eos is never drawn."""


class Mortal(InferenceEngine):
    """Dies, or stops, in a step when it is told to."""

    dies = False
    waits = threading.Event()

    def step(self) -> bool:
        if self.dies:
            raise RuntimeError("Connection closed by peer")
        while self.waits.is_set():
            time.sleep(0.005)
        return super().step()


def begun(ask: openai.OpenAI) -> openai.Stream[Any]:
    stream = ask.completions.create(**ENDLESS)
    next(iter(stream))
    return stream


def test_a_full_queue_is_429_until_somebody_leaves() -> None:
    with serving(make_engine(max_batch_size=2), max_queue=1) as server:
        ask = client(server)
        streams = [begun(ask), begun(ask)]
        waiting = threading.Thread(target=lambda: post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2}))
        waiting.start()
        wait_until(lambda: metrics(server)["fms_rows_in_flight"] == 3)
        with pytest.raises(
            openai.RateLimitError, match="3 of 3 rows are running or waiting, no room for 1 more"
        ) as said:
            ask.completions.create(model=NAME, prompt="b", max_tokens=2)
        assert said.value.response.headers["retry-after"] == "1" and said.value.code == "queue_full"
        wait_until(lambda: [metrics(server)[f"fms_rows_{name}"] for name in ("running", "waiting")] == [2, 1])
        for stream in streams:
            stream.close()
        waiting.join(60)
        assert not waiting.is_alive()
        assert ask.completions.create(model=NAME, prompt="b", max_tokens=2).choices[0].finish_reason
        wait_until(lambda: idle(server))


def test_what_takes_too_long_is_504_and_ends() -> None:
    with serving(request_timeout=0.3) as server:
        with pytest.raises(openai.APIStatusError, match=r"not answered within 0.3 s \(request_timeout\)") as said:
            client(server).completions.create(**{**ENDLESS, "stream": False})
        assert said.value.status_code == 504
        with pytest.raises(openai.APIError, match="not answered within"):
            for _ in begun(client(server)):
                pass
        wait_until(lambda: idle(server))
        assert metrics(server)['fms_requests_total{path="/v1/completions",status="504"}'] == 2


def test_at_the_end_requests_get_time_to_end() -> None:
    with serving(drain_timeout=60) as server:
        stream = client(server).completions.create(**{**ENDLESS, "max_tokens": 150})
        texts = [next(iter(stream)).choices[0].text]
        end = threading.Thread(target=server.stop)
        end.start()
        choices = [one.choices[0] for one in stream]
        assert sum(len(one.text) for one in choices) + len(texts[0]) == 150
        assert choices[-1].finish_reason == "length"
        end.join(60)
        assert not end.is_alive()
    with pytest.raises(ConfigError, match="this engine is closed"):
        server.application.engine.submit([1])


def test_at_the_end_what_takes_longer_is_cancelled_and_told() -> None:
    with serving(drain_timeout=1) as server:
        stream = begun(client(server))
        answers: list[Any] = []
        body = {"prompt": "a", "max_tokens": LONG, "logit_bias": {"0": -100}}
        whole = threading.Thread(target=lambda: answers.append(post(server, "/v1/completions", body)))
        whole.start()
        wait_until(lambda: metrics(server)["fms_rows_in_flight"] == 2)
        threading.Thread(target=server.stop).start()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            for _ in stream:
                pass
        whole.join(60)
        assert answers[0][0] == 503 and "shutting down" in answers[0][1]["error"]["message"]


def test_a_dead_engine_is_told_to_all() -> None:
    engine = make_engine(Mortal)
    assert isinstance(engine, Mortal)
    with serving(engine) as server:
        ask, answers = client(server), list[Any]()
        stream = begun(ask)
        body = {"prompt": "a", "max_tokens": LONG, "logit_bias": {"0": -100}}
        whole = threading.Thread(target=lambda: answers.append(post(server, "/v1/completions", body)))
        whole.start()
        wait_until(lambda: metrics(server)["fms_rows_in_flight"] == 2)
        engine.dies = True
        with pytest.raises(openai.APIError, match="the engine has died: Connection closed by peer"):
            for _ in stream:
                pass
        whole.join(60)
        assert answers[0][0] == 500 and "the engine has died" in answers[0][1]["error"]["message"]
        assert get(server, "/health")[0] == 503 and "has died" in get(server, "/health")[1]
        assert post(server, "/v1/completions", {"prompt": "a"})[0] == 503
        assert metrics(server)["fms_engine_up"] == 0


def test_an_engine_that_stops_in_a_step_is_not_healthy() -> None:
    engine = make_engine(Mortal)
    assert isinstance(engine, Mortal)
    with serving(engine, stall_timeout=0.2, request_timeout=0.6) as server:
        assert get(server, "/health")[0] == 200
        engine.waits.set()
        try:
            status, said = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2})
            assert status == 504 and "not answered within 0.6 s" in said["error"]["message"]
            assert "more than stall_timeout=0.2" in get(server, "/health")[1]
        finally:
            engine.waits.clear()
        wait_until(lambda: get(server, "/health")[0] == 200 and idle(server))


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be sent to it any more, not even that its time is over; its rows are freed before that."""
    monkeypatch.setattr("fms_parallel.inference.server.exchange.GRACE", 0.3)
    engine = make_engine()
    template = ChatTemplate.find(Letters(), None)
    application = Application(engine, NAME, template, ServerOptions(request_timeout=0.3))
    path = "/v1/completions"
    body = json.dumps({"prompt": "a", "max_tokens": LONG, "logit_bias": {"0": -100}, "stream": True}).encode()
    sent: list[str] = []

    async def deaf() -> None:
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) == 3:
                await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": headers,
            "query_string": b"",
            "root_path": "",
        }
        application.driver.start()
        await asyncio.wait_for(application.asgi(scope, receive, send), 60)
        while application.driver.in_flight:
            await asyncio.sleep(0.01)
        assert await application.driver.stop()

    asyncio.run(deaf())
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
    assert application.metrics.requests == {(path, 504): 1}


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_model_is_made_by_the_installed_factory_or_a_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fms_parallel.inference.server import __main__ as command
    from fms_parallel.models import get_model

    class Entry:
        value = "fms_parallel.models:get_model"

    monkeypatch.setattr(command, "entry_points", lambda group: [Entry] if group == FACTORIES else [])
    assert find_factory(None) is get_model
    monkeypatch.setattr(command, "entry_points", lambda group: [])
    with pytest.raises(ConfigError, match=r"must say what makes the model\. Installed: none"):
        find_factory(None)
    assert find_factory("tests.inference.served:make_engine") is make_engine
    for name, said in (
        ("nothing", "write module:callable"),
        ("no.such:x", "No module"),
        ("json:x", "nothing callable"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_factory(name)


@pytest.mark.parametrize(("words", "copies"), [("", False), ("--fast_weights", True)])
def test_matrices_are_laid_out_when_the_command_says_so(words: str, copies: bool) -> None:
    from fms_parallel.inference.server import __main__ as command
    from fms_parallel.layout import ParallelLayout
    from fms_parallel.models import get_model

    given = "--architecture llama --variant micro --override layers=1 --max_seq_len 32"
    args = command.build_parser().parse_args(f"{given} {words}".split())
    assert args.fast_weights == ("copies" if copies else None)
    with command.make_engine(args, get_model, ParallelLayout(), "char") as engine:
        assert (engine._fast is not None) == copies
    with pytest.raises(SystemExit):
        command.build_parser().parse_args([*given.split(), "--fast_weights", "more"])


def test_signals_end_a_server_that_runs_in_the_main_thread() -> None:
    """It ends in order, gives the handlers back, and says what its engine died of."""
    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    server = Server(make_engine(), NAME, ServerOptions(port=0))

    def ready() -> None:
        said.append(server.url)
        signal.raise_signal(signal.SIGTERM)

    server.run(ready)
    assert said == [server.url] and signal.getsignal(signal.SIGTERM) is before
    engine = make_engine(Mortal)
    assert isinstance(engine, Mortal)
    engine.dies = True
    server = Server(engine, NAME, ServerOptions(port=0))
    with pytest.raises(FmsError, match="the engine has died: Connection closed by peer"):
        server.run(lambda: signal.raise_signal(signal.SIGINT))


def test_an_engine_without_a_tokenizer_is_not_served() -> None:
    with make_engine() as engine:
        engine.tokenizer = None
        with pytest.raises(ConfigError, match="this engine has no tokenizer: a server needs one"):
            Server(engine, NAME, ServerOptions(port=0))


def test_tokens_that_end_a_row_are_those_of_tokenizer_and_model(tmp_path: Path) -> None:
    with make_engine() as engine:
        assert end_tokens(engine, None) == end_tokens(engine, str(tmp_path)) == {0}
        for given, expected in ([5, 7], {0, 5, 7}), (6, {0, 6}), (None, {0}):
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
            assert end_tokens(engine, str(tmp_path)) == expected
        (tmp_path / "generation_config.json").write_text("{")
        with pytest.raises(ConfigError, match="is not a JSON object"):
            end_tokens(engine, str(tmp_path))
