"""A server over a tiny model, and the client's side of it: what several test files share."""

from __future__ import annotations

import http.client
import json
import re
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai

from fms_parallel.inference import InferenceEngine
from fms_parallel.inference.server import Server, ServerOptions
from fms_parallel.tokenizers import Tokenizer
from tests.inference.models import tiny_llama

NAME = "tiny"
LONG = 4000
"""New tokens of a request that does not end by itself while a test looks at it."""


class Letters(Tokenizer):
    """One letter or figure per token, so that texts show tokens; 0 is eos."""

    letters = string.ascii_lowercase + string.digits
    vocab_size = 37
    eos_id = 0
    special_ids = frozenset((0,))
    fingerprint = "letters"

    def _encode(self, text: str) -> list[int]:
        return [self.letters.index(one) + 1 for one in text.lower() if one in self.letters]

    def _decode(self, ids: list[int]) -> str:
        return "".join(self.letters[token - 1] for token in ids)


def make_engine(kind: type[InferenceEngine] = InferenceEngine, **words: Any) -> InferenceEngine:
    """With weights that are the same every time."""
    model = tiny_llama(max_positions=LONG + 100).double()
    return kind(model, Letters(), **{"max_batch_size": 4, "max_seq_len": LONG + 50, **words})


@contextmanager
def serving(engine: InferenceEngine | None = None, **options: Any) -> Iterator[Server]:
    """A server on a free port of this machine, in a thread."""
    with Server(engine or make_engine(), NAME, ServerOptions(port=0, **options)) as server:
        yield server


def client(server: Server, **words: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "-", "max_retries": 0, "timeout": 60.0, **words})


def post(server: Server, path: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request that no client library would send."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, sent, {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def get(server: Server, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def metrics(server: Server) -> dict[str, float]:
    """The page, checked line by line for the text format."""
    found: dict[str, float] = {}
    for line in get(server, "/metrics")[1].splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r'([a-z_]+(?:\{\w+="[^"]*"(?:,\w+="[^"]*")*\})?) ([-+.\deE]+)', line)
            assert match, line
            found[match[1]] = float(match[2])
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it has not come to be"
        time.sleep(0.01)


def idle(server: Server) -> bool:
    """Whether nothing of any request is left."""
    now = metrics(server)
    names = ("rows_in_flight", "rows_running", "rows_waiting", "cache_used_tokens")
    return not any(now[f"fms_{name}"] for name in names)
