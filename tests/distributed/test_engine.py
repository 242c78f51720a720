"""The engine on several ranks: the tokens of one process everywhere, and ranks that follow the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.errors import FmsError
from fms_parallel.inference import DraftModel, InferenceEngine, PromptLookup
from fms_parallel.inference.options import Options
from fms_parallel.inference.sampler import Ask, Sampler
from fms_parallel.inference.setup import CACHES
from fms_parallel.inference.vocabulary import Vocabulary
from tests.inference.models import PROMPTS, tiny_llama
from tests.inference.test_sampler import RULES
from tests.poison import poisoned_memory

NEW = 6
FEW = 5
"""Tokens, of which the last of four ranks has none."""
TWO = ("tp=2,sp", "tp=2,sp,tp_parts=attention", "fsdp=2", "dp=2", "cp=2")
LAYOUTS = {
    2: [("tp=2", 1), ("tp=2", 2), *((layout, 2) for layout in TWO)],
    4: [("tp=4", 2), ("fsdp=2,tp=2", 2)],
}
CASES = [(world, layout, kv) for world, several in LAYOUTS.items() for layout, kv in several]
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "to eos": {"eos_id": [5, 24]},
    "sampled": {"temperature": 1.2, "seed": 3},
    "top_k, top_p": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3},
    "top_p, min_p": {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "seed": 3},
    "mixed": {"temperature": [0.0, 1.0, 0.7], "top_k": [None, 3, None], "seed": 1},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {3: 4.0, 36: 1.0}},
}
Results = dict[Any, Any]


def answers(kv: int, layout: str) -> Results:
    """What every rank must agree on, and with one process."""
    model = tiny_llama(kv, layout).double()
    found: Results = {}
    for cache in CACHES:
        with InferenceEngine(model, cache=cache, max_batch_size=2, max_seq_len=40, max_step_tokens=6) as engine:
            for name, options in CALLS.items() if cache == "paged" else [("mixed", CALLS["mixed"])]:
                found[cache, name] = [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=NEW, **options)]
    with InferenceEngine(model, max_seq_len=40, block_size=4) as engine:
        logprobs = engine.generate(PROMPTS, max_new_tokens=3, logprobs=3, prompt_logprobs=2)
        told = [[*one.prompt_logprobs, *one.logprobs] for one in logprobs]
        found["logprobs"] = [[(one.token, one.logprob, one.top) for one in row] for row in told]
        found["beams"] = [one.tokens for one in engine.beam_search(PROMPTS[0], beams=3, max_new_tokens=NEW, returned=3)]
        logits = engine.prefill(PROMPTS)
        found["phases"] = engine.decode_step(logits.argmax(-1), [len(p) for p in PROMPTS]).argmax(-1).tolist()
    draft = tiny_llama(1, layers=1, width=16).double()
    for speculative in (PromptLookup(2), DraftModel(draft, 2)):
        with InferenceEngine(model, speculative=speculative, max_seq_len=40) as engine:
            name = type(speculative).__name__
            found[name] = [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=NEW)]
            found[name, "sampled"] = [
                one.tokens for one in engine.generate(PROMPTS, max_new_tokens=NEW, temperature=1.0)
            ]
    return found


def in_parts(logits: Tensor) -> Tensor:
    """Tokens of rows with every kind of rule, each rank having its run of the vocabulary only."""
    axis = Axis(dist.group.WORLD, dist.get_world_size(), dist.get_rank(), "gloo")  # type: ignore[arg-type]
    start, stop = axis.chunk(logits.shape[-1])
    sampler = Sampler(Vocabulary(logits.shape[-1], axis, start))
    asks = [Ask(Options(**rule, seed=7, row=row), (), ()) for row, rule in enumerate(RULES)]
    return sampler.tokens(logits[:, start:stop], asks)


def followed(layout: str = "tp=2") -> Results:
    """Requests on the first rank only; the others follow."""
    engine = InferenceEngine(tiny_llama(2).double(), layout=layout, max_batch_size=2, max_seq_len=40)
    if dist.get_rank():
        engine.follow()
        return {"used": engine.memory_report().used, "steps": engine.counts().steps, "refused": refused(engine)}
    first = [engine.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    tokens = [handle.result(timeout=60).tokens for handle in first]
    long = engine.submit([1, 2], max_new_tokens=30)
    engine.step()
    long.cancel()
    with_thread = engine.start().submit(PROMPTS[0], max_new_tokens=NEW).result(timeout=60)
    bad = refused(engine, [99])
    steps = engine.counts().steps
    engine.close()
    return {
        **{"tokens": tokens, "thread": with_thread.tokens, "cancelled": long.result(timeout=1).finish, "bad": bad},
        **{"used": engine.memory_report().used, "steps": steps},
    }


def refused(engine: InferenceEngine, prompt: list[int] | None = None) -> str:
    try:
        engine.submit(prompt or [1])
    except FmsError as error:
        return str(error)
    return ""


def disagreeing() -> list[str]:
    engine, rank = InferenceEngine(tiny_llama(2, "tp=2")), dist.get_rank()
    said = []
    for prompts in ([[1], [2 + rank]], [[1], [] if rank else [1]], [[1], []]):
        try:
            engine.generate(prompts, max_new_tokens=2)
        except FmsError as error:
            said.append(str(error))
    return said


def run_world(logits: Tensor) -> Results:
    found: Results = {"parts": in_parts(logits), "few": in_parts(logits[:, :FEW])}
    with poisoned_memory():
        for layout, kv in LAYOUTS[dist.get_world_size()]:
            found[layout, kv] = answers(kv, layout)
    if dist.get_world_size() == 2:
        found |= {"followed": followed(), "disagreeing": disagreeing()}
    return found


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """With many equal ones: a vocabulary that does not divide by the ranks."""
    torch.manual_seed(0)
    return (torch.randn(len(RULES), 301) * 6).round() / 2


@pytest.fixture(scope="module")
def by_world(logits: Tensor) -> dict[int, list[Results]]:
    return {world: run_ranks(run_world, world, logits) for world in LAYOUTS}


@pytest.fixture(scope="module")
def one_process() -> dict[int, Results]:
    return {kv: answers(kv, "") for kv in (1, 2)}


@pytest.mark.parametrize(("world", "layout", "kv"), CASES)
def test_every_rank_has_the_tokens_of_one_process(
    world: int, layout: str, kv: int, by_world: dict[int, list[Results]], one_process: dict[int, Results]
) -> None:
    for found in by_world[world]:
        for name, wanted in one_process[kv].items():
            if name == "logprobs":
                assert_close(found[layout, kv][name], wanted)
            else:
                assert found[layout, kv][name] == wanted, name


def assert_close(found: Any, wanted: Any) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        for (token, logprob, top), (other, value, others) in zip(mine, theirs, strict=True):
            assert token == other
            assert logprob == pytest.approx(value, abs=1e-5)
            assert [t for t, _ in top] == [t for t, _ in others]
            assert [p for _, p in top] == pytest.approx([p for _, p in others], abs=1e-5)


@pytest.mark.parametrize("world", LAYOUTS)
def test_tokens_chosen_from_parts_are_those_chosen_from_the_whole(
    world: int, logits: Tensor, by_world: dict[int, list[Results]]
) -> None:
    asks = [Ask(Options(**rule, seed=7, row=row), (), ()) for row, rule in enumerate(RULES)]
    whole = Sampler(Vocabulary(logits.shape[-1])).tokens(logits, asks).tolist()
    assert [found["parts"].tolist() for found in by_world[world]] == [whole] * world
    few = Sampler(Vocabulary(FEW)).tokens(logits[:, :FEW], asks).tolist()
    assert [found["few"].tolist() for found in by_world[world]] == [few] * world


def test_others_follow_the_first_rank(by_world: dict[int, list[Results]], one_process: dict[int, Results]) -> None:
    first, other = (found["followed"] for found in by_world[2])
    assert first["tokens"] == one_process[2]["paged", "greedy"]
    assert first["thread"] == first["tokens"][0]
    assert first["cancelled"] == "cancelled"
    assert "has token 99" in first["bad"]
    assert (first["used"], other["used"], first["steps"]) == (0, 0, other["steps"])
    assert other["refused"] == "submit is for the first rank; the others call engine.follow()."


def test_calls_that_differ_are_refused_on_every_rank(by_world: dict[int, list[Results]]) -> None:
    for found in by_world[2]:
        different, one_bad, both_bad = found["disagreeing"]
        assert "differ between ranks" in different
        assert "differ between ranks" in one_bad
        assert both_bad.startswith("prompt 1 of 2 is empty")
