"""Rows of models in which only some layers have a window: those give blocks back, tokens stay what they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fms_parallel.errors import ConfigError
from fms_parallel.inference import InferenceEngine, PromptLookup, ScheduleGeneration
from fms_parallel.inference.paged import BlockPool, Table, most_blocks
from tests.inference.models import PROMPTS
from tests.inference.test_window import LONG, LONGEST, NEW, SIZE, WINDOW, their_tokens, theirs, tokens_of

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "gemma3": (
        "Gemma3",
        {
            **{"config": "Gemma3TextConfig", "sliding_window": WINDOW},
            **{"layer_types": ["sliding_attention", "full_attention"]},
        },
    ),
    "cohere2": ("Cohere2", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
}
"""One layer that sees all, one with a window."""

ROWS = [*PROMPTS, LONG, LONG[:41]]
ROW = most_blocks(LONGEST, SIZE, WINDOW, 9) * SIZE
"""Tokens that a row holds in the layer with a window, at chunks of 9."""


@pytest.fixture(scope="module")
def model() -> Any:
    return theirs(MODELS["qwen2"][0], **MODELS["qwen2"][1])


@pytest.fixture(scope="module")
def wanted(model: Any) -> list[list[int]]:
    return [their_tokens(model, prompt) for prompt in ROWS]


def engine_of(model: Any, **options: Any) -> InferenceEngine:
    return InferenceEngine(model, **{"block_size": SIZE, "max_step_tokens": 9, **options})


def used(engine: InferenceEngine) -> list[int]:
    return [kind.used for kind in engine.memory_report().kinds]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers_and_windowed_layers_take_less_memory(name: str) -> None:
    one = theirs(MODELS[name][0], **MODELS[name][1])
    with engine_of(one, max_batch_size=2) as engine:
        kinds = [(kind.window, kind.layers, kind.tokens) for kind in engine.memory_report().kinds]
        assert kinds == [(None, 1, 2 * LONGEST), (WINDOW, 1, 2 * ROW)] and ROW < LONGEST / 4
        assert tokens_of(engine, [LONG, [1]]) == [their_tokens(one, prompt) for prompt in (LONG, [1])]
        report = engine.memory_report()
        assert report.cache == report.cache_whole == report.token // 2 * 2 * (LONGEST + ROW)
        assert (report.window, used(engine)) == (None, [0, 0])
        assert f"1 with window {WINDOW}: 0 tokens used" in str(report)


WAYS: dict[str, dict[str, Any]] = {
    "little memory": {"max_batch_size": 3, "cache_tokens": 128},
    "not shared": {"share_prefixes": False, "max_step_tokens": 16},
    "prompt lookup": {"speculative": PromptLookup(3), "max_batch_size": 4, "max_step_tokens": 48},
    "rows in one run": {"cache": "manager"},
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers_in_any_cache(way: str, model: Any, wanted: list[list[int]]) -> None:
    with engine_of(model, **WAYS[way]) as engine:
        for _ in range(2):  # the second time what the first left is found
            assert tokens_of(engine, ROWS) == wanted
            assert not any(used(engine))


def test_a_row_keeps_all_of_one_layer_and_a_window_of_the_other(model: Any) -> None:
    with engine_of(model, max_batch_size=1, max_step_tokens=4) as engine:
        handle = engine.submit(LONG, max_new_tokens=NEW)
        held = []
        while not handle.done:
            engine.step()
            held.append(used(engine))
        assert max(whole for whole, _ in held) >= len(LONG) + NEW - 1
        assert max(part for _, part in held) <= most_blocks(LONGEST, SIZE, WINDOW, 4) * SIZE
        assert held[-1] == [0, 0] and engine.counts().preemptions == 0


def test_a_conversation_goes_on_with_the_blocks_of_both_kinds(model: Any) -> None:
    """The windowed layer has forgotten the beginning, which no query to come sees."""
    with engine_of(model, max_batch_size=1) as engine:
        first = engine.generate([LONG], max_new_tokens=5)[0]
        again = engine.generate([[*LONG, *first.tokens, 3]], max_new_tokens=9)[0]
        assert (first.shared, again.shared) == (0, 64)
        assert list(again.tokens) == their_tokens(model, [*LONG, *first.tokens, 3])[:9]
        other = engine.generate([[*LONG[:32], 5]], max_new_tokens=9)[0]  # its window was overwritten long ago
        assert other.shared == 0 and list(other.tokens) == their_tokens(model, [*LONG[:32], 5])[:9]


def test_nothing_leaks_when_rows_come_go_and_wait(model: Any) -> None:
    draw = random.Random(0)
    with engine_of(model, cache_tokens=72, max_batch_size=4, max_step_tokens=7) as engine:
        tokens = [kind.tokens for kind in engine.memory_report().kinds]
        assert tokens == [72, 4 * most_blocks(LONGEST, SIZE, WINDOW, 7) * SIZE] == [72, 64]
        handles = []
        for number in range(60):
            prompt = LONG[: draw.choice((1, 5, 16, 23, 33, 40, 48, 49))]
            handles.append((prompt, engine.submit(prompt, max_new_tokens=1 + number % 17)))
            for _ in range(draw.randrange(4)):
                engine.step()
            if number % 5 == 0:
                handles[draw.randrange(len(handles))][1].cancel()
        found = [(prompt, handle.result()) for prompt, handle in handles]
        assert used(engine) == [0, 0] and engine.counts().preemptions > 0
        whole = {length: their_tokens(model, LONG[:length]) for length in {len(p) for p, _ in found}}
        for prompt, one in found:
            assert list(one.tokens) == whole[len(prompt)][: len(one.tokens)]
        engine.release_kv_cache()
        assert engine.memory_report().cache == 0


def test_a_cache_that_is_too_small_for_all_of_a_row_is_refused(model: Any) -> None:
    with (
        engine_of(model, cache_tokens=32) as engine,
        pytest.raises(ConfigError, match=r"62 tokens \(.*whole cache has 32 tokens.*cache_tokens"),
    ):
        engine.submit(LONG, max_new_tokens=2)


@pytest.mark.parametrize("share", [True, False])
@torch.no_grad()
def test_two_phases_and_beams_are_those_of_whole_rows(share: bool, model: Any) -> None:
    words: dict[str, Any] = {"max_batch_size": 3, "share_prefixes": share}
    with engine_of(model, **words) as engine, engine_of(model, cache="manager", max_batch_size=3) as plain:
        rows = ScheduleGeneration(engine)
        for places in (None, [60, 1], [20, 2], [21, 3], [19, 1]):
            logits = rows.prefill([LONG, [3]]) if places is None else rows.decode_step([5, 6], places)
            whole = torch.stack([model(torch.tensor([row.tokens])).logits[0, -1] for row in rows.rows])
            torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
        rows.close()
        words = {"beams": 3, "max_new_tokens": 20, "returned": 3, "eos_id": 4}
        found, wanted = engine.beam_search(LONG, **words), plain.beam_search(LONG, **words)
        assert [one.tokens for one in found] == [one.tokens for one in wanted]
        assert used(engine) == [0, 0]


# ---- the pool by itself -------------------------------------------------------------------------------------------


def test_random_rows_read_what_was_written_in_both_kinds_and_all_blocks_and_names_come_back() -> None:
    draw, window = random.Random(2), 7
    pool = BlockPool({None: 60, window: 18}, 4)
    memory: list[dict[int, tuple[int, ...]]] = [{}, {}]
    rows: list[tuple[Table, list[int], int]] = []
    for _ in range(4000):
        if rows and draw.random() < 0.08:
            pool.end(rows.pop(draw.randrange(len(rows)))[0])
        elif rows and draw.random() < 0.8:
            at = draw.randrange(len(rows))
            table, tokens, done = rows[at]
            stop = min(len(tokens), done + draw.randrange(1, 6))
            if not pool.grow(table, stop):
                continue
            for kind, where in zip(memory, pool.where(table, done, stop), strict=True):
                for place, position in zip(where.places, range(done, stop), strict=True):
                    kind[place] = tuple(tokens[: position + 1])
            pool.computed(table, tokens, stop)
            pool.slide(table, stop)
            rows[at] = table, [*tokens, draw.randrange(2)], stop
        elif (new := pool.begin(tokens := [draw.randrange(2) for _ in range(draw.randrange(1, 30))], 40)) is not None:
            rows.append((new[0], tokens, new[1]))
        for table, tokens, done in rows:
            for kind, seen, n in zip(memory, (done, window - 1), (0, 1), strict=True):
                first = max(0, done - seen)
                places = pool.where(table, first, done)[n].places
                assert [kind[p] for p in places] == [tuple(tokens[: k + 1]) for k in range(first, done)]
    for table, _, _ in rows:
        pool.end(table)
    assert pool.in_use == 0 and pool.shared_tokens > 0
    for number, kind in enumerate(pool.kinds):  # new content in every block: no old name is left
        big = [pool.empty() for _ in range(kind.blocks)]
        for table in big:
            kind.grow(table.held[number], 1)
    assert len(pool.prefixes) == 0


def test_rows_begin_with_blocks_that_every_kind_still_has() -> None:
    tokens = list(range(24))
    pool = BlockPool({None: 12, 6: 6}, 4)
    found = pool.begin(tokens)
    assert found is not None
    table, done = found[0], 0
    for done in range(4, 25, 4):
        assert pool.grow(table, done)
        pool.computed(table, tokens, done)
        pool.slide(table, done)
    assert [kind.in_use for kind in pool.kinds] == [6, 2]
    pool.end(table)
    again = pool.begin([*tokens, 99])
    assert again is not None and again[1] == 24 and [kind.in_use for kind in pool.kinds] == [7, 3]
    pool.end(again[0])
    taken = pool.empty()
    pool.kinds[1].grow(taken.held[1], 12)  # three blocks: the two free ones and the oldest, the row's first
    assert pool.begin([*tokens[:8], 99]) is not None
    pool.kinds[1].grow(taken.held[1], 20)
    short, whole = pool.begin([*tokens[:8], 98]), pool.prefixes.path(tokens)
    assert short is None or short[1] == 0
    assert len(whole) == 6
