"""Decoding over pipeline stages: the tokens of one process, several groups under way, and ranks that fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fms_parallel import compat
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.start import abandon
from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference import InferenceEngine, generate
from fms_parallel.layout import ParallelLayout
from fms_parallel.models.gpt_bigcode import GPTBigCode, GPTBigCodeConfig
from fms_parallel.models.mistral import Mistral, MistralConfig
from fms_parallel.strategy.base import parallel_of
from fms_parallel.strategy.compose import compose
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import train_step
from tests.distributed.test_engine import answers, assert_close, followed
from tests.inference.models import PROMPTS, tiny_llama
from tests.poison import poisoned_memory

NEW = 6
SMALL: dict[str, Any] = {"vocab_size": 37, "width": 32, "heads": 4, "ffn_width": 48, "max_positions": 64, "std": 0.4}
LAYOUTS = {2: ("pp=2",), 4: ("pp=2,tp=2",)}
"""World size -> layouts that must give all answers."""

Results = dict[Any, Any]


def mistral(layout: str) -> nn.Module:
    """A window shorter than the rows."""
    with torch.device("meta"):
        model = Mistral(MistralConfig(layers=2, kv_heads=2, window=4, **SMALL))
    return compose(model, ParallelLayout.parse(layout))


def gpt_bigcode(layout: str) -> nn.Module:
    """Tied ends, a table of positions, one kv head."""
    with torch.device("meta"):
        model = GPTBigCode(GPTBigCodeConfig(layers=3, **SMALL))
    return compose(model, ParallelLayout.parse(layout))


def tied(layout: str) -> nn.Module:
    """First and last stage share a weight."""
    return tiny_llama(2, layout, layers=4, tied=True)


def deep(layout: str) -> nn.Module:
    return tiny_llama(2, layout, layers=4)


Build = Callable[[str], nn.Module]
SHORT: dict[int, list[tuple[Build, str]]] = {
    2: [
        *((tied, "pp=2"), (mistral, "pp=2"), (gpt_bigcode, "pp=2,stage_split=2,1")),
        *((tied, "pp=2,schedule=zbv,virtual_stages=2"), (deep, "pp=2,schedule=interleaved1f1b,virtual_stages=2")),
    ],
    4: [(deep, "pp=4"), (mistral, "pp=2,tp=2,sp"), (tied, "pp=2,fsdp=2"), (gpt_bigcode, "pp=2,cp=2")],
}
"""World size -> models and layouts that must give a few."""


def few_answers(build: Build, layout: str) -> Results:
    """Chunked prompts, a full cache whose rows must wait, and `generate`."""
    model = build(layout).double()
    tokens = 12 if getattr(model.config, "window", None) else 20  # rows with a window give blocks back
    sizes = {"max_batch_size": 3, "max_seq_len": 16, "max_step_tokens": 4, "block_size": 2, "cache_tokens": tokens}
    with InferenceEngine(model, **sizes) as engine:
        found = {"engine": [one.tokens for one in engine.generate(PROMPTS, max_new_tokens=NEW)]}
        preempted = engine.counts().preemptions
    with InferenceEngine(model, cache="none", max_seq_len=16, speculative=None) as engine:
        options = {"temperature": [0.0, 1.0, 0.7], "seed": 1, "max_new_tokens": [2, NEW, 4]}
        found["no cache"] = [one.tokens for one in engine.generate(PROMPTS, **options)]
    found["generate"] = generate(model, PROMPTS, max_new_tokens=NEW, temperature=1.0, top_k=9, stop=[[3, 4]], seed=2)
    found["without"] = generate(model, PROMPTS, max_new_tokens=3, use_cache=False)
    return found | {"preempted": preempted}


def under_way() -> list[str]:
    """What a rank does, in order: `+` begins a step, `-` takes the tokens of one."""
    engine = InferenceEngine(tiny_llama(2, "pp=2"), max_seq_len=40)
    said: list[str] = []
    begin: Any = engine.runner.begin

    def noted(*arguments: Any) -> Any:
        said.append("+" + "".join(str(piece.tokens[0]) for piece in arguments[0] if piece.start == 0))
        answers = begin(*arguments)
        return lambda: said.append("-") or answers()

    engine.runner.begin = noted  # type: ignore[method-assign]
    engine.generate([[1], [2], [3], [4]], max_new_tokens=3)
    engine.close()
    return said


def broken_rows() -> list[str]:
    """NaN in the last stage, seen only there: the rows that meet it end everywhere, the others go on."""
    model = tiny_llama(2, "pp=2")
    if parallel_of(model).runs_last_stage:
        head: Any = model.get_submodule("head")
        plain = head.forward
        head.forward = lambda x, seq, labels, last: plain(x, seq, labels, last).masked_fill(
            (last.tokens == 4).view(1, -1, 1), float("nan")
        )
    with InferenceEngine(model, max_seq_len=40) as engine:
        rows = engine.generate([[1, 2, 3, 4, 5], [7, 8]], max_new_tokens=2, errors="return")
        return [f"{one.finish} {len(one.tokens)} {one.error or ''}" for one in rows]


def memory() -> tuple[int, int]:
    """Bytes of one token's cache here, and of what is held."""
    with InferenceEngine(deep("pp=2,stage_split=3,1"), max_seq_len=16, max_batch_size=2) as engine:
        engine.init_kv_cache(num_layers=4)
        report = engine.memory_report()
        return report.token, report.cache


def refusals() -> list[str]:
    said = []
    for make in (
        lambda: InferenceEngine(tiny_llama(2, "pp=2"), groups=0),
        lambda: InferenceEngine(tiny_llama(2, "tp=2"), groups=2),
        lambda: InferenceEngine(tiny_llama(2, "pp=2"), max_seq_len=20).generate([[1] * 30]),
    ):
        try:
            make()
        except ConfigError as error:
            said.append(str(error))
    return said


def trained(layout: str) -> Results:
    """Generation between optimizer steps sees each step's weights, and the next step sees nothing of it."""
    model = tied(f"{layout},precision=fp64".strip(","))
    optimizer = make_optimizer(model, TrainOptions(lr=0.05))
    ids = torch.arange(4 * 9).view(4, 9) % 37
    shard = parallel_of(model).layout.data_parallel
    rows = ids if shard == 1 else ids.chunk(shard)[dist.get_rank() % shard]
    found: Results = {"tokens": [], "losses": []}
    for _ in range(3):
        result = train_step(model, optimizer, [Rows(rows[:, :-1], rows[:, 1:])])
        found["losses"].append(float(result.loss))
        found["tokens"].append(generate(model, PROMPTS, max_new_tokens=3))
    with torch.no_grad():
        for parameter in model.parameters():  # written to without a backward pass, as loading a checkpoint does
            parameter.mul_(-1.5 if parameter.ndim == 2 else 1.0)
    found["tokens"].append(generate(model, PROMPTS, max_new_tokens=3))
    return found


class Rows:
    """A batch."""

    def __init__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        self.input_ids, self.labels = input_ids, labels


def run_world() -> Results:
    world = dist.get_world_size()
    found: Results = {}
    with poisoned_memory():
        for layout in LAYOUTS[world]:
            found[layout] = answers(2, layout)
        for build, layout in SHORT[world]:
            found[build.__name__, layout] = few_answers(build, layout)
    found["trained"] = trained("pp=2" if world == 2 else "pp=2,fsdp=2")
    if world == 2:
        found |= {"under way": under_way(), "broken": broken_rows(), "memory": memory(), "refused": refusals()}
        found["followed"] = followed("pp=2")
    return found


@pytest.fixture(scope="module")
def by_world() -> dict[int, list[Results]]:
    return {world: run_ranks(run_world, world) for world in LAYOUTS}


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_stage_has_the_tokens_of_one_process(world: int, by_world: dict[int, list[Results]]) -> None:
    wanted = answers(2, "")
    for found in by_world[world]:
        for layout in LAYOUTS[world]:
            assert_close(found[layout].pop("logprobs"), wanted["logprobs"])
            assert found[layout] == {name: value for name, value in wanted.items() if name != "logprobs"}


@pytest.mark.parametrize("world", LAYOUTS)
def test_models_and_schedules_give_the_tokens_of_one_process(world: int, by_world: dict[int, list[Results]]) -> None:
    wanted = {build: few_answers(build, "") for build in {build for build, _ in SHORT[world]}}
    for build, layout in SHORT[world]:
        for found in by_world[world]:
            mine = dict(found[build.__name__, layout])
            assert mine.pop("preempted") > 0
            assert mine == {name: value for name, value in wanted[build].items() if name != "preempted"}, layout


@pytest.mark.parametrize("world", LAYOUTS)
def test_generation_between_steps_of_training_sees_their_weights(
    world: int, by_world: dict[int, list[Results]]
) -> None:
    wanted = trained("")
    assert wanted["tokens"][0] != wanted["tokens"][2] != wanted["tokens"][3]
    for found in by_world[world]:
        assert found["trained"]["tokens"] == wanted["tokens"]
        assert found["trained"]["losses"] == pytest.approx(wanted["losses"], rel=1e-12)


def test_two_groups_are_under_way_at_a_time(by_world: dict[int, list[Results]]) -> None:
    """A rank begins the other group's step before it waits for the first one's tokens."""
    for found in by_world[2]:
        assert found["under way"] == ["+12", "+34", "-", "+", "-", "+", "-", "+", "-", "+", "-", "-"]


def test_rows_that_meet_nan_end_on_every_rank(by_world: dict[int, list[Results]]) -> None:
    for found in by_world[2]:
        assert [said.split(":")[0] for said in found["broken"]] == [
            "error 0 the logits are NaN or infinite at new token 0",
            "length 2 ",
        ]


def test_a_stage_keeps_the_cache_of_its_own_layers(by_world: dict[int, list[Results]]) -> None:
    token = 2 * 2 * 8 * 4  # keys and values, kv heads, D, bytes
    assert [found["memory"] for found in by_world[2]] == [(n * token, n * token * 32) for n in (3, 1)]


def test_impossible_requests_are_refused_on_every_rank(by_world: dict[int, list[Results]]) -> None:
    for found in by_world[2]:
        none, without, long = found["refused"]
        assert none == "groups=0: at least 1 group of rows is under way."
        assert without.startswith("groups=2: only pipeline stages")
        assert "beyond max_seq_len=20" in long


def test_other_stages_follow_the_first_rank(by_world: dict[int, list[Results]]) -> None:
    first, other = (found["followed"] for found in by_world[2])
    assert first["tokens"] == answers(2, "")["paged", "greedy"]
    assert first["thread"] == first["tokens"][0]
    assert first["cancelled"] == "cancelled"
    assert "has token 99" in first["bad"]
    assert (first["used"], other["used"], first["steps"]) == (0, 0, other["steps"])


# ---- ranks that fail --------------------------------------------------------------------------------------------


def left_alone(how: str, told: Path) -> str:
    """What the first rank says when the other stops taking part; one that freezes stays so until then."""
    compat.set_group_timeout(dist.group.WORLD, timedelta(seconds=1.5))  # type: ignore[arg-type]
    model = tiny_llama(2, "pp=2")
    engine = InferenceEngine(model, max_seq_len=40)
    if dist.get_rank():
        begin, steps = engine.runner.begin, iter(range(3))

        def stopping(*arguments: Any) -> Any:
            if next(steps, None) is None:
                sleep_until(told if how == "freezes" else None)
                abandon()
                raise TimeoutError
            return begin(*arguments)

        engine.runner.begin = stopping  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            engine.generate([[1], [2]], max_new_tokens=20)
        return ""
    try:
        with engine:
            engine.generate([[1], [2]], max_new_tokens=20)
    except FmsError as error:
        told.touch()
        abandon()
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sleep_until(told: Path | None) -> None:
    """Asleep until the file exists; the watchdog ends who waits for ever."""
    while told is not None and not told.exists():
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["dies", "freezes"])
def test_a_rank_that_stops_is_an_error_elsewhere(how: str, tmp_path: Path) -> None:
    said = run_ranks(left_alone, 2, how, tmp_path / "told", timeout=60)[0]
    assert said.startswith("RankFailed: rank 1 said nothing within 1.5 s: it has died or hangs")
