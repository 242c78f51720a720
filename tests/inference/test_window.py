"""Rows of a model whose every layer has a window: blocks behind it come back, tokens stay what they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference import DraftModel, InferenceEngine, PromptLookup, ScheduleGeneration, generate
from fms_parallel.inference.paged import most_blocks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models.mistral import Mistral, MistralConfig
from fms_parallel.strategy.compose import compose
from tests.inference.models import PROMPTS, tiny_llama

WINDOW, SIZE, NEW, LONGEST = 6, 4, 40, 128
LONG = [(7 * n * n + 3 * n) % 37 for n in range(60)]
"""A prompt of ten windows."""


def mistral(window: int | None = WINDOW) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 37, "width": 32, "layers": 2, "heads": 4, "ffn_width": 48, "std": 0.4}
    with torch.device("meta"):
        model = Mistral(MistralConfig(kv_heads=2, window=window, max_positions=LONGEST, **sizes))
    return compose(model, ParallelLayout.parse("")).double()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return mistral()


def engine_of(model: nn.Module, **options: Any) -> InferenceEngine:
    return InferenceEngine(model, block_size=SIZE, **options)


def tokens_of(engine: InferenceEngine, prompts: Any, **options: Any) -> list[list[int]]:
    return [list(one.tokens) for one in engine.generate(prompts, **{"max_new_tokens": NEW, **options})]


WAYS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "little memory, small chunks": {"max_batch_size": 3, "max_step_tokens": 5, "cache_tokens": 32},
    "one row's memory": {"cache_tokens": most_blocks(LONGEST, SIZE, WINDOW) * SIZE, "max_step_tokens": 9},
    "not shared": {"share_prefixes": False, "max_step_tokens": 16},
    "prompt lookup": {"speculative": PromptLookup(4), "max_step_tokens": 48, "cache_tokens": 64},
}


RULES: list[dict[str, Any]] = [{}, {"temperature": 1.2, "seed": 5}]
ROWS = [*PROMPTS, LONG, LONG[:41]]


@pytest.fixture(scope="module")
def wanted(model: nn.Module) -> list[list[list[int]]]:
    """Of a loop whose mask says the window."""
    found = [generate(model, ROWS, max_new_tokens=NEW, **rules) for rules in RULES]
    assert generate(mistral(None), ROWS, max_new_tokens=NEW) != found[0] != found[1]
    return found


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_a_masked_loop_far_beyond_the_window(
    way: str, model: nn.Module, wanted: list[list[list[int]]]
) -> None:
    with engine_of(model, **WAYS[way]) as engine:
        for rules, tokens in zip(RULES, wanted, strict=True):
            assert tokens_of(engine, ROWS, **rules) == tokens
            assert engine.memory_report().used == 0


def test_a_long_request_is_admitted_and_holds_a_window_of_blocks(model: nn.Module) -> None:
    """A cache of 16 tokens, for a row of 100."""
    most = most_blocks(LONGEST, SIZE, WINDOW)
    with engine_of(model, cache_tokens=16, max_batch_size=1, max_step_tokens=4) as engine:
        handle = engine.submit(LONG, max_new_tokens=NEW)
        held = []
        while not handle.done:
            engine.step()
            held.append(engine.memory_report().used // SIZE)
        assert list(handle.result().tokens) == generate(model, [LONG], max_new_tokens=NEW)[0]
        assert 1 < max(held) < most + 1 and held[-1] == 0
        assert engine.counts().preemptions == 0
        assert "of which 6 are kept (window)" in str(engine.memory_report())


def test_by_default_memory_is_what_windows_need(model: nn.Module) -> None:
    with engine_of(model, max_batch_size=2, max_step_tokens=8) as engine, engine_of(mistral(None)) as other:
        assert engine.memory_report().tokens == 2 * most_blocks(LONGEST, SIZE, WINDOW, 8) * SIZE < 2 * LONGEST
        assert engine.memory_report().window == WINDOW
        assert other.memory_report().tokens == 8 * LONGEST and other.memory_report().window is None


def test_a_cache_below_the_window_refuses_with_the_sizes(model: nn.Module) -> None:
    with engine_of(model, cache_tokens=8) as engine:
        with pytest.raises(
            ConfigError, match=r"window=6: 12 of them at a time.*whole cache has 8 tokens.*cache_tokens"
        ):
            engine.submit(LONG, max_new_tokens=2)
        assert tokens_of(engine, [[1, 2]], max_new_tokens=7) == generate(model, [[1, 2]], max_new_tokens=7)


def test_the_latest_blocks_of_a_prompt_are_found_again(model: nn.Module) -> None:
    with engine_of(model, cache_tokens=4 * LONGEST) as engine:
        first = engine.generate([LONG], max_new_tokens=3)[0]
        again, other = engine.generate([[*LONG, 1], [*LONG, 2]], max_new_tokens=9)
        assert (first.shared, again.shared, other.shared) == (0, 60, 60)
        assert [list(one.tokens) for one in (again, other)] == generate(
            model, [[*LONG, 1], [*LONG, 2]], max_new_tokens=9
        )


def test_nothing_leaks_when_rows_come_go_and_wait(model: nn.Module) -> None:
    draw = random.Random(0)
    with engine_of(model, cache_tokens=24, max_batch_size=4, max_step_tokens=7) as engine:
        short = [[n] for n in range(4)]
        handles = [(prompt, engine.submit(prompt, max_new_tokens=17)) for prompt in short]  # all find a block at first
        for number in range(60):
            prompt = LONG[: draw.randrange(1, 50)]
            handles.append((prompt, engine.submit(prompt, max_new_tokens=1 + number % 17)))
            for _ in range(draw.randrange(4)):
                engine.step()
            if number % 5 == 0:
                handles[draw.randrange(len(handles))][1].cancel()
        found = [(prompt, handle.result()) for prompt, handle in handles]
        report = engine.memory_report()
        assert (report.used, report.free) == (0, 24) and engine.counts().preemptions > 0
        whole = {tuple(p): generate(model, [p], max_new_tokens=17)[0] for p, _ in found}
        for prompt, one in found:
            assert list(one.tokens) == whole[tuple(prompt)][: len(one.tokens)]
            assert one.finish in ("length", "cancelled")


def test_a_draft_model_changes_no_token(model: nn.Module) -> None:
    draft = DraftModel(tiny_llama(1, layers=1, width=16, max_positions=LONGEST).double(), 3)
    with engine_of(model, speculative=draft, cache_tokens=48, max_step_tokens=48) as engine:
        assert tokens_of(engine, [LONG, [1]]) == generate(model, [LONG, [1]], max_new_tokens=NEW)
        assert engine.memory_report().used == 0 and engine.counts().accepted > 0


def test_a_row_that_never_gets_enough_ends_with_an_error(model: nn.Module) -> None:
    """Should blocks not come back, a request fails; it is not begun again for ever."""
    with engine_of(model, cache_tokens=16, max_batch_size=2, max_step_tokens=4) as engine:
        assert engine.pool is not None
        engine.pool.slide = lambda table, start: None  # type: ignore[method-assign]
        short = engine.submit([1, 2], max_new_tokens=9)
        found = engine.generate([LONG], max_new_tokens=NEW, errors="return")[0]
        assert found.finish == "error" and "had the whole cache and could not go on" in str(found.error)
        assert list(short.result().tokens) == generate(model, [[1, 2]], max_new_tokens=9)[0]
        assert engine.memory_report().used == 0


# ---- by hand ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole(model: nn.Module, rows: list[list[int]]) -> Tensor:
    return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


@pytest.mark.parametrize("share", [True, False])
def test_two_phases_go_on_and_far_back(share: bool, model: nn.Module) -> None:
    with engine_of(model, max_batch_size=2, max_step_tokens=8, share_prefixes=share) as engine:
        rows = ScheduleGeneration(engine)
        torch.testing.assert_close(rows.prefill([LONG, [3]]), whole(model, [LONG, [3]]), rtol=1e-12, atol=1e-12)
        assert engine.memory_report().used < len(LONG)
        for places in ([60, 1], [61, 2], [20, 2], [21, 3], [19, 1]):
            logits = rows.decode_step([5, 6], places)
            wanted = whole(model, [row.tokens for row in rows.rows])
            torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
        rows.close()
        assert engine.memory_report().used == 0


def test_beams_are_those_of_a_cache_of_whole_rows(model: nn.Module) -> None:
    with engine_of(model, max_step_tokens=9) as engine, engine_of(model, cache="manager") as plain:
        for prompt in (LONG, [1, 2]):
            words: dict[str, Any] = {"beams": 3, "max_new_tokens": 30, "returned": 3, "eos_id": 4}
            found, wanted = engine.beam_search(prompt, **words), plain.beam_search(prompt, **words)
            assert [one.tokens for one in found] == [one.tokens for one in wanted]
            assert [one.score for one in found] == pytest.approx([one.score for one in wanted], rel=1e-12)
        assert engine.memory_report().used == 0


# ---- whose layers have which window -------------------------------------------------------------------------------


def test_a_config_whose_window_is_less_than_the_layers_is_an_error(model: nn.Module) -> None:
    wrong = mistral()
    with engine_of(wrong, cache_tokens=64) as engine:
        assert engine.pool is not None
        engine.pool.kinds[0].window = 3
        found = engine.generate([LONG], max_new_tokens=20, errors="return")[0]
        assert isinstance(found.error, FmsError) and "whose blocks were given back" in str(found.error)


transformers = pytest.importorskip("transformers", reason="the reference: pip install fms_parallel[hf]")
SIZES: dict[str, Any] = {
    **{"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.4},
    **{"max_position_embeddings": LONGEST, "tie_word_embeddings": False, "intermediate_size": 48},
    **{"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}


def theirs(name: str, config: str | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, config or f"{name}Config")(**SIZES, **more)
    return getattr(transformers, f"{name}ForCausalLM")(made).double().eval()


def their_tokens(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def test_mistral_gives_the_tokens_of_transformers_in_a_cache_of_three_windows(tmp_path: Any) -> None:
    from fms_parallel.models import get_model

    model = theirs("Mistral", sliding_window=WINDOW)
    model.save_pretrained(tmp_path)
    wanted = [their_tokens(model, prompt) for prompt in (LONG, PROMPTS[0])]
    for one in (get_model("hf_pretrained", model_path=tmp_path, data_type="fp64"), model):
        with engine_of(one, cache_tokens=20, max_step_tokens=9) as engine:
            assert engine.memory_report().window == WINDOW
            assert tokens_of(engine, [LONG, PROMPTS[0]]) == wanted


@pytest.mark.parametrize(
    ("name", "more", "window"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, None),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}, WINDOW),
        ("Llama", {}, None),
    ],
)
def test_blocks_go_where_every_layer_has_a_window_only(name: str, more: dict[str, Any], window: int | None) -> None:
    model = theirs(name, **more)
    with engine_of(model, max_batch_size=2, cache_tokens=128) as engine:
        assert engine.memory_report().window == window
        assert tokens_of(engine, [LONG, [1]]) == [their_tokens(model, prompt) for prompt in (LONG, [1])]
