"""Many clients that stream at the same time: every stream ends, with the tokens of one process.

`python -m pytest --slow -s tests/inference/test_server_load.py` is 64 clients for a minute, against a server in a
process of its own, and prints what they saw.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest

from fms_parallel.inference import InferenceEngine
from fms_parallel.models import get_model
from fms_parallel.tokenizers import get_tokenizer
from tests.inference.served import NAME, idle, make_engine, metrics, serving, wait_until

ROOT = Path(__file__).resolve().parents[2]
NEW = 24
PROMPTS = [("hello" * (1 + 3 * number))[: 4 + 11 * number] for number in range(8)]
"""Of 4 to 81 letters."""


@dataclass
class Seen:
    """What clients saw."""

    requests: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def percentile(self, part: float) -> float:
        return sorted(self.first)[int(part * (len(self.first) - 1))]


async def one_client(
    ask: openai.AsyncOpenAI, model: str, number: int, until: float, right: list[str], seen: Seen
) -> None:
    """Asks for one stream after the other until the time is over; a stream that ends early raises."""
    turn = number
    while time.monotonic() < until:
        place = turn % len(PROMPTS)
        turn += 1
        began, text, finish, waits = time.monotonic(), "", None, True
        stream = await ask.completions.create(
            model=model, prompt=PROMPTS[place], max_tokens=NEW, temperature=0, stream=True, logprobs=0
        )
        async for chunk in stream:
            if waits and chunk.choices[0].logprobs:
                waits = False
                seen.first.append(time.monotonic() - began)
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason or finish
            seen.tokens += len((chunk.choices[0].logprobs and chunk.choices[0].logprobs.tokens) or ())
        if text != right[place] or finish is None:
            seen.wrong.append(f"{place}: {text!r} {finish}")
        seen.requests += 1


async def many_clients(url: str, model: str, clients: int, seconds: float, right: list[str]) -> Seen:
    seen, until = Seen(), time.monotonic() + seconds
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=300) as ask:
        await asyncio.gather(*(one_client(ask, model, n, until, right, seen) for n in range(clients)))
    return seen


def test_sixteen_clients_stream_at_a_time() -> None:
    """For five seconds, on eight rows of a cache that cannot hold all of them: rows are preempted and go on."""
    with make_engine() as alone:
        right = [one.text for one in alone.generate(PROMPTS, max_new_tokens=NEW)]
    engine = make_engine(max_batch_size=8, max_seq_len=128, cache_tokens=320)
    with serving(engine, max_queue=16) as server:
        seen = asyncio.run(many_clients(server.url, NAME, 16, 5.0, right))
        assert not seen.wrong and seen.requests >= 16 and len(seen.first) == seen.requests
        wait_until(lambda: idle(server))
        now = metrics(server)
        assert now['fms_requests_total{path="/v1/completions",status="200"}'] == seen.requests
        assert now["fms_time_to_first_token_seconds_count"] == seen.requests


@contextmanager
def command(*words: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fms_parallel.inference.server", "--port", "0", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = re.fullmatch(r"serving (\S+) on (\S+)/v1\n", process.stdout.readline())
        assert said is not None
        yield said[2], process.pid
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0


def cpu_seconds(process: int) -> float:
    """That a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_sixty_four_clients_stream_for_a_minute() -> None:
    model = get_model("llama", "micro", data_type="fp64")
    with InferenceEngine(model, get_tokenizer("char")) as alone:
        right = [one.text for one in alone.generate(PROMPTS, max_new_tokens=NEW)]
    model_words = "--factory fms_parallel.models:get_model --architecture llama --variant micro --data_type fp64"
    words = f"{model_words} --tokenizer char --max_batch_size 64 --max_seq_len 256 --served_model_name micro"
    with command(*words.split()) as (url, process):
        before = cpu_seconds(process)
        seen = asyncio.run(many_clients(url, "micro", 64, 60.0, right))
        used = cpu_seconds(process) - before
    assert not seen.wrong and len(seen.first) == seen.requests >= 64
    times = ", ".join(f"p{part} {seen.percentile(part / 100) * 1000:.0f} ms" for part in (50, 99))
    print(f"\n64 clients, 60 s: {seen.requests} requests, {seen.tokens} tokens, first token {times}")
    print(f"the server used {used:.1f} s of CPU: {seen.tokens / used:.0f} tokens per CPU second")
