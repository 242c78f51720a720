"""The server over several ranks: the tokens of one process, and a rank that dies."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import torch.distributed as dist

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.start import abandon
from fms_parallel.inference import InferenceEngine
from fms_parallel.inference.server import Server, ServerOptions
from tests.inference.models import tiny_llama
from tests.inference.served import LONG, NAME, Letters, client, get, idle, make_engine, post, wait_until

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["hello", "x", "what is this about then"]
GREEDY: dict[str, Any] = {"model": NAME, "prompt": PROMPTS, "max_tokens": 5, "temperature": 0}
SAMPLED = GREEDY | {"temperature": 1.3, "seed": 5, "top_p": 0.9}
ENDLESS: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": LONG, "logit_bias": {"0": -100}}


def answers(ask: openai.OpenAI) -> list[list[str]]:
    """Texts of rows: whole and streamed, greedy and sampled."""
    found = [[one.text for one in ask.completions.create(**body).choices] for body in (GREEDY, SAMPLED)]
    texts = [""] * len(PROMPTS)
    for chunk in ask.completions.create(**GREEDY, stream=True):
        for one in chunk.choices:
            texts[one.index] += one.text
    return [*found, texts]


def over_ranks(layouts: list[str]) -> dict[str, Any]:
    """What each layout answers, and what is left of it."""
    return {layout: served(layout) for layout in layouts}


def served(layout: str) -> dict[str, Any]:
    model = tiny_llama(max_positions=LONG + 100).double()
    engine = InferenceEngine(model, Letters(), layout=layout, max_batch_size=4, max_seq_len=LONG + 50)
    if dist.get_rank():
        engine.follow()
        return {"used": engine.memory_report().used}
    with Server(engine, NAME, ServerOptions(port=0)) as server:
        ask = client(server)
        texts = answers(ask)
        stream = ask.completions.create(**ENDLESS, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: idle(server))
    return {"texts": texts, "trouble": server.application.driver.trouble}


def with_a_death() -> dict[str, Any]:
    """The other rank leaves in the middle of a stream."""
    model = tiny_llama(max_positions=LONG + 100).double()
    engine = InferenceEngine(model, Letters(), layout="tp=2", max_batch_size=4, max_seq_len=LONG + 50)
    if dist.get_rank():
        while engine.counts().steps < 20:
            engine.step()
        abandon()
        return {}
    found: dict[str, Any] = {}
    with Server(engine, NAME, ServerOptions(port=0, linger_timeout=1.0)) as server:
        whole = threading.Thread(target=lambda: found.update(whole=post(server, "/v1/completions", ENDLESS)))
        whole.start()
        try:
            for _ in client(server).completions.create(**ENDLESS, stream=True):
                pass
        except openai.APIError as error:
            found["stream"] = str(error)
        whole.join(60)
        found |= {"health": get(server, "/health"), "after": post(server, "/v1/completions", ENDLESS)[0]}
        thread = next(one for one in threading.enumerate() if one.name == "http")
        thread.join(30)
        found["ended"] = not thread.is_alive()
    abandon()
    return found


def test_ranks_answer_as_one_process() -> None:
    with Server(make_engine(), NAME, ServerOptions(port=0)) as server:
        expected = answers(client(server))
    assert expected[0] == expected[2] != expected[1]
    layouts = ["tp=2", "pp=2"]
    first, second = run_ranks(over_ranks, 2, layouts, timeout=240)
    assert first == {layout: {"texts": expected, "trouble": None} for layout in layouts}
    assert second == {layout: {"used": 0} for layout in layouts}


def test_a_rank_that_dies_fails_requests_and_health_at_once() -> None:
    found = run_ranks(with_a_death, 2)[0]
    noticed = re.compile("the model failed|has died")  # in a forward, or between two
    assert found["whole"][0] == 500 and noticed.search(found["whole"][1]["error"]["message"])
    assert noticed.search(found["stream"])
    assert found["health"][0] == 503 and "the engine has died" in found["health"][1]
    assert found["after"] == 503 and found["ended"]


def test_the_command_under_torchrun_serves_and_ends_in_order() -> None:
    words = "--architecture llama --variant micro --override layers=1 --tokenizer char --distributed tp=2 --port 0"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "fms_parallel.inference.server", "--factory", "fms_parallel.models:get_model", *words.split()]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        said = re.fullmatch(r"serving (\S+) on (\S+)/v1\n", process.stdout.readline())
        assert said is not None and said[1] == "llama-micro"
        ask = openai.OpenAI(base_url=f"{said[2]}/v1", api_key="-", max_retries=0, timeout=60)
        found = ask.completions.create(model="llama-micro", prompt="def f(", max_tokens=8)
        assert found.usage is not None and found.usage.total_tokens <= 7 + 8
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(ranks) == 2
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "SIGKILL" not in err and err.count("Traceback") == 1, err  # torchrun's own
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
