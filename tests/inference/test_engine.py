"""The engine: the same tokens however rows are cached, batched and cut; requests that fail, join, leave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, FmsError, LayoutError
from fms_parallel.inference import Completion, Event, InferenceEngine, PromptLookup, ScheduleGeneration, generate
from fms_parallel.inference.handle import Handle
from fms_parallel.inference.setup import CACHES
from fms_parallel.tokenizers import get_tokenizer
from tests.inference.models import PROMPTS, tiny_llama

WAYS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "one at a time": {"max_batch_size": 1},
    "two, in chunks": {"max_batch_size": 2, "max_step_tokens": 4},
    "static batches of two": {"max_batch_size": 2, "static_batches": True},
    "prompt lookup": {"speculative": PromptLookup(3), "max_step_tokens": 64},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.2, "seed": 5},
    "top_k, top_p": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3},
    "to eos": {"eos_id": [5, 24]},
}
NEW = 12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama().double()


@pytest.fixture
def make(model: nn.Module) -> Any:
    """Engines on the model, closed afterwards."""
    made: list[InferenceEngine] = []

    def build(**options: Any) -> InferenceEngine:
        small: dict[str, Any] = {"max_seq_len": 48}
        if options.get("cache", "paged") == "paged":
            small["block_size"] = 4
        made.append(InferenceEngine(options.pop("model", model), options.pop("tokenizer", None), **small | options))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


Make = Callable[..., InferenceEngine]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [list(one.tokens) for one in completions]


# ---- the same tokens --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", CACHES)
def test_tokens_are_those_of_generate_in_every_cache_and_batch(
    cache: str, way: str, model: nn.Module, make: Make
) -> None:
    engine = make(cache=cache, **WAYS[way])
    for options in SAMPLED.values():
        wanted = generate(model, PROMPTS, max_new_tokens=NEW, **options)
        assert tokens_of(engine.generate(PROMPTS, max_new_tokens=NEW, **options)) == wanted
        assert engine.memory_report().used == 0


def test_ways_differ_so_that_equality_means_something(model: nn.Module, make: Make) -> None:
    found = {name: generate(model, PROMPTS, max_new_tokens=NEW, **options) for name, options in SAMPLED.items()}
    assert len({str(tokens) for tokens in found.values()}) == len(found)
    assert any(len(row) < NEW for row in found["to eos"])
    steps = {}
    for way, options in WAYS.items():
        engine = make(**options)
        engine.generate(PROMPTS, max_new_tokens=NEW)
        steps[way] = engine.counts().steps
    assert steps["all at once"] == NEW < min(steps["two, in chunks"], steps["static batches of two"])
    assert steps["one at a time"] == 3 * NEW


def test_row_does_not_depend_on_who_else_is_there(model: nn.Module, make: Make) -> None:
    engine, options = make(max_batch_size=4), {"max_new_tokens": NEW, "temperature": 1.3, "seed": 9}
    alone = engine.generate([PROMPTS[0]], **options)[0].tokens
    others = [engine.submit(p, max_new_tokens=5 + n, temperature=0.5 + n, seed=n) for n, p in enumerate(PROMPTS)]
    for _ in range(3):
        engine.step()
    handle = engine.submit(PROMPTS[0], **options)
    others += [engine.submit([n + 1] * 20, max_new_tokens=3) for n in range(3)]
    assert handle.result().tokens == alone
    assert [other.result().finish for other in others] == ["length"] * 6


def test_rows_have_their_own_options_and_seeds(model: nn.Module, make: Make) -> None:
    engine = make()
    found = engine.generate(
        PROMPTS, max_new_tokens=[3, 7, 5], temperature=[0.0, 1.0, 1.0], seed=[1, 2, 2], top_k=[None, 5, None]
    )
    assert [len(one.tokens) for one in found] == [3, 7, 5]
    assert list(found[0].tokens) == generate(model, [PROMPTS[0]], max_new_tokens=3)[0]
    alone = generate(model, [PROMPTS[1]], max_new_tokens=7, temperature=1.0, top_k=5, seed=2)
    assert list(found[1].tokens) == alone[0]
    with pytest.raises(ConfigError, match="seed has 2 values for 3 prompts"):
        engine.generate(PROMPTS, max_new_tokens=2, seed=[1, 2])


def test_model_is_left_in_the_mode_it_was_in(make: Make) -> None:
    model = tiny_llama().train()
    model.get_submodule("layers.0").eval()
    with make(model=model) as engine:
        assert not model.training
        engine.generate(PROMPTS, max_new_tokens=2)
        assert not model.training
    assert model.training and not model.get_submodule("layers.0").training
    other = make(model=model)
    other.generate(PROMPTS, max_new_tokens=2)
    assert model.training
    ids = torch.tensor([[1, 2, 3]])
    model(ids, ids).backward()  # nothing is left behind that training could not use


# ---- the cache ----------------------------------------------------------------------------------------------------


def test_prompts_with_the_same_beginning_compute_it_once(model: nn.Module, make: Make) -> None:
    engine, plain = make(), make(share_prefixes=False)
    start = [n % 30 for n in range(21)]
    first = engine.generate([[*start, 1]], max_new_tokens=NEW)[0]
    second, third = engine.generate([[*start, 2], [*start, 1]], max_new_tokens=NEW)
    assert (first.shared, second.shared, third.shared) == (0, 20, 20)
    wanted = tokens_of(plain.generate([[*start, 2], [*start, 1]], max_new_tokens=NEW))
    assert tokens_of([second, third]) == wanted
    assert first.tokens == third.tokens
    again = engine.generate([[*start, 1, *first.tokens, 3]], max_new_tokens=2)[0]
    assert again.shared == (len(start) + 1 + NEW - 1) // 4 * 4  # new tokens are shared as well, but for the last


def test_cache_too_small_for_all_takes_turns_with_the_same_tokens(model: nn.Module, make: Make) -> None:
    prompts = [[n + 1, 2, 3] for n in range(5)]
    engine = make(cache_tokens=44, max_batch_size=5, max_step_tokens=8)
    wanted = generate(model, prompts, max_new_tokens=20)
    assert tokens_of(engine.generate(prompts, max_new_tokens=20)) == wanted
    assert engine.counts().preemptions > 0
    assert engine.memory_report().used == 0


@pytest.mark.parametrize("cache", ["paged", "manager", "internal"])
def test_memory_is_kept_in_serving_mode_and_freed_in_batch_mode(cache: str, make: Make) -> None:
    serving = make(cache=cache, max_batch_size=2)
    serving.generate(PROMPTS, max_new_tokens=2)
    whole = 2 * 2 * 2 * 48 * 8 * 2 * 8  # rows, layers, keys and values, tokens, D, kv heads, bytes
    assert serving.memory_report().cache == serving.memory_report().cache_whole == whole
    serving.release_kv_cache()
    assert serving.memory_report().cache == 0
    serving.close()
    batch = make(cache=cache, max_batch_size=2, serving_mode=False)
    batch.generate(PROMPTS, max_new_tokens=2)
    assert batch.memory_report().cache == 0


def test_cache_is_inside_the_attention_and_in_no_state_dict(model: nn.Module, make: Make) -> None:
    names = set(model.state_dict())
    engine = make(use_kv_cache=True)
    engine.generate(PROMPTS, max_new_tokens=2)
    assert model.get_submodule("layers.1.attention").kv_memory.keys.shape == (2, 8 * 48, 8)  # type: ignore[union-attr]
    assert set(model.state_dict()) == names
    with pytest.raises(ConfigError, match="another engine keeps its cache inside"):
        make(use_kv_cache=True)
    engine.close()
    make(use_kv_cache=True)


def test_manager_is_allocated_when_asked_and_numbers_are_checked(make: Make) -> None:
    engine = make(use_kv_manager=True, max_batch_size=2)
    with pytest.raises(ConfigError, match=r"num_layers=3.*is 2"):
        engine.init_kv_cache(num_layers=3)
    with pytest.raises(ConfigError, match=r"head_dim=16.*is 8"):
        engine.init_kv_cache(head_dim=16)
    engine.init_kv_cache(num_layers=2, num_heads=4, head_dim=8, batch_size=2)
    assert engine.memory_report().cache == engine.memory_report().cache_whole
    assert engine.storage.get_memory_usage()["rows"] == 2  # type: ignore[union-attr]


def test_two_phases_give_the_logits_of_whole_rows(model: nn.Module, make: Make) -> None:
    for cache in CACHES:
        engine = make(cache=cache)
        logits = engine.prefill(PROMPTS, chunk=2)
        tokens = [4, 5, 6]
        for _ in range(2):
            torch.testing.assert_close(logits, whole(model, PROMPTS), rtol=1e-12, atol=1e-12)
        logits = engine.decode_step(tokens, [len(p) for p in PROMPTS])
        longer = [[*p, t] for p, t in zip(PROMPTS, tokens, strict=True)]
        torch.testing.assert_close(logits, whole(model, longer), rtol=1e-12, atol=1e-12)
        logits = engine.decode_step(torch.tensor([9, 9, 9]), 1)  # back to where each has one token
        torch.testing.assert_close(logits, whole(model, [[p[0], 9] for p in PROMPTS]), rtol=1e-12, atol=1e-12)
        with pytest.raises(ConfigError, match="its next position is that, not 7"):
            engine.decode_step(tokens, 7)
        engine.close()
        assert engine.memory_report().used == 0


def test_rows_by_hand_keep_their_cache_in_batch_mode_and_leave_the_mode(make: Make) -> None:
    model = tiny_llama().double().train()
    engine = make(model=model, serving_mode=False)
    mine = ScheduleGeneration(engine)
    mine.prefill(PROMPTS)
    assert model.training
    engine.generate(PROMPTS, max_new_tokens=2)
    with pytest.raises(ConfigError, match="close every ScheduleGeneration"):
        engine.release_kv_cache()
    logits = mine.decode_step([4, 5, 6], [len(p) for p in PROMPTS])
    longer = [[*p, t] for p, t in zip(PROMPTS, [4, 5, 6], strict=True)]
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-12, atol=1e-12)
    mine.close()
    engine.generate(PROMPTS, max_new_tokens=2)
    assert engine.memory_report().cache == 0


def test_going_back_does_not_disturb_rows_that_share(model: nn.Module, make: Make) -> None:
    engine, start = make(), [n % 30 for n in range(16)]
    engine.prefill([[*start, 1], [*start, 2]])
    engine.prefill([[*start, 1], [*start, 2]])  # the second time both use the same blocks
    engine.decode_step([7, 2], [5, 16])
    logits = engine.decode_step([3, 3], [6, 17])
    torch.testing.assert_close(logits, whole(model, [[*start[:5], 7, 3], [*start, 2, 3]]), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def whole(model: nn.Module, rows: list[list[int]]) -> Tensor:
    return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


# ---- requests -----------------------------------------------------------------------------------------------------


def test_cancelled_requests_give_everything_back(make: Make) -> None:
    engine = make(max_batch_size=3)
    handles = [engine.submit([n, 1, 2, 3, 4], max_new_tokens=30) for n in range(6)]
    for _ in range(3):
        engine.step()
    assert engine.memory_report().used > 0
    handles[1].cancel()
    handles[5].cancel()  # has not begun
    engine.step()
    assert [handle.done for handle in handles] == [False, True, False, False, False, True]
    assert handles[1].result().finish == "cancelled"
    assert len(handles[1].result().tokens) == 3
    for handle in handles:
        handle.cancel()
    assert not engine.step()
    assert engine.memory_report().used == 0
    assert engine.counts().finished == {"cancelled": 6}
    assert (engine._rows, engine._handles) == ({}, {})


def test_stream_is_called_with_what_is_new(make: Make) -> None:
    engine = make()
    events: list[Event] = []
    found = engine.generate(PROMPTS, max_new_tokens=4, stream=events.append)
    for row, one in enumerate(found):
        mine = [event for event in events if event.row == row]
        assert tuple(token for event in mine for token in event.tokens) == one.tokens
        assert [event.finish for event in mine] == [None, None, None, "length"]


def test_owner_who_cannot_take_an_event_loses_its_request_only(model: nn.Module, make: Make) -> None:
    engine = make()

    def broken(event: Event) -> None:
        raise OSError("gone")

    bad, good = engine.submit([1, 2], stream=broken, max_new_tokens=9), engine.submit([1, 2], max_new_tokens=9)
    assert list(good.result().tokens) == generate(model, [[1, 2]], max_new_tokens=9)[0]
    assert bad.result().finish == "error"
    assert "stream raised OSError('gone')" in str(bad.result().error)
    assert engine.memory_report().used == 0


def test_handle_yields_events_and_waits(make: Make) -> None:
    engine = make()
    handle = engine.submit(PROMPTS[0], max_new_tokens=4)
    assert [event.finish for event in handle] == [None, None, None, "length"]
    assert handle.result(timeout=0).tokens == engine.generate([PROMPTS[0]], max_new_tokens=4)[0].tokens
    with pytest.raises(TimeoutError, match="it goes on"):
        engine.submit(PROMPTS[0], max_new_tokens=4).result(timeout=0)


def test_requests_from_many_threads_while_one_drives(model: nn.Module, make: Make) -> None:
    engine = make(max_batch_size=4).start()
    wanted = generate(model, PROMPTS, max_new_tokens=NEW)
    found: dict[int, Any] = {}

    def ask(n: int) -> None:
        handle = engine.submit(PROMPTS[n % 3], max_new_tokens=NEW)
        if n % 5 == 4:
            handle.cancel()
        found[n] = handle.result(timeout=60)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for n in range(20):
        assert found[n].finish == "cancelled" or list(found[n].tokens) == wanted[n % 3]
    assert sum(one.finish == "length" for one in found.values()) >= 16
    engine.close()
    assert engine.memory_report().used == 0
    with pytest.raises(ConfigError, match="this engine is closed"):
        engine.submit([1], max_new_tokens=1)


# ---- texts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chars() -> nn.Module:
    return tiny_llama(vocab_size=256).double()


def test_text_ends_before_its_stop_text(chars: nn.Module, make: Make) -> None:
    tokenizer = get_tokenizer("char")
    engine = make(model=chars, tokenizer=tokenizer)
    bias = {n: 40.0 for n in range(97, 123)}  # letters only
    free = engine.generate("ab", max_new_tokens=20, logit_bias=bias)[0]
    assert len(free.text) == 20
    assert free.text.isalpha()
    assert free.prompt == tuple(tokenizer.encode("ab", bos=True))
    stop = free.text[6:9]
    events: list[Event] = []
    ended = engine.generate("ab", max_new_tokens=20, logit_bias=bias, stop=[stop], stream=events.append)[0]
    assert ended.finish == "stop"
    assert ended.text == free.text[: free.text.index(stop)] == "".join(map(str, events))
    by_token = engine.generate("ab", max_new_tokens=20, logit_bias=bias, stop=[tokenizer.encode(stop)])[0]
    assert by_token.tokens == ended.tokens


def test_eos_is_in_the_tokens_and_not_in_the_text(chars: nn.Module, make: Make) -> None:
    engine = make(model=chars, tokenizer=get_tokenizer("char"))
    one = engine.generate("ab", max_new_tokens=5, logit_bias={3: 1000.0})[0]
    assert (one.tokens, one.text, one.finish) == ((3,), "", "stop")
    assert len(engine.generate("ab", max_new_tokens=5, logit_bias={3: 1000.0}, ignore_eos=True)[0].tokens) == 5


def test_nothing_ends_a_row_before_the_least_of_tokens(chars: nn.Module, make: Make) -> None:
    engine = make(model=chars, tokenizer=get_tokenizer("char"))
    bias = {n: 40.0 for n in range(97, 123)}
    free = engine.generate("ab", max_new_tokens=20, logit_bias=bias, ignore_eos=True)[0]
    stop = free.text[3:5]
    one = engine.generate("ab", max_new_tokens=20, min_new_tokens=9, logit_bias=bias, stop=[stop, [free.tokens[2]]])[0]
    assert one.tokens[:9] == free.tokens[:9] and len(one.tokens) >= 9
    assert one.text.startswith(free.text[:9])
    eager = {**bias, 3: 80.0}  # eos, as soon as it may be
    one = engine.generate("ab", max_new_tokens=20, min_new_tokens=9, logit_bias=eager)[0]
    assert (one.tokens, one.text, one.finish) == ((*free.tokens[:9], 3), free.text[:9], "stop")


def test_logprobs_are_those_of_whole_rows(model: nn.Module, make: Make) -> None:
    found = make().generate([PROMPTS[0]], max_new_tokens=4, logprobs=2, temperature=1.5)[0]
    assert len(found.logprobs) == 4
    for n, one in enumerate(found.logprobs):
        wanted = whole(model, [[*PROMPTS[0], *found.tokens[:n]]])[0].log_softmax(-1)
        assert one.token == found.tokens[n]
        assert one.logprob == pytest.approx(float(wanted[one.token]), abs=1e-12)
        assert [token for token, _ in one.top] == wanted.topk(2)[1].tolist()


# ---- what cannot be -----------------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "is empty"),
    ([37], {}, "has token 37, but this model's tokens are 0..36"),
    ([-1], {}, "has token -1"),
    ("text", {}, "this engine has no tokenizer"),
    ([1] * 40, {"max_new_tokens": 20}, "beyond max_seq_len=48 (48 tokens (0.000 GiB)): shorten the prompt or ask for"),
    ([1], {"temperature": float("nan")}, "temperature=nan"),
    ([1], {"tempo": 1}, "unknown sampling option 'tempo'"),
    ([1], {"stop": ["x"]}, "this engine has no tokenizer"),
]


@pytest.mark.parametrize(("prompt", "options", "sentence"), BAD)
def test_impossible_request_is_refused_and_others_go_on(
    prompt: Any, options: dict[str, Any], sentence: str, model: nn.Module, make: Make
) -> None:
    engine = make()
    other = engine.submit([1, 2], max_new_tokens=6)
    engine.step()
    with pytest.raises(ConfigError) as error:
        engine.submit(prompt, **{"max_new_tokens": 2} | options)
    assert sentence in str(error.value)
    assert list(other.result().tokens) == generate(model, [[1, 2]], max_new_tokens=6)[0]


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        (None, {}, "prompts=None: give a text, or a list"),
        ([[1]], {"errors": "retrun"}, "unknown word of errors 'retrun'. Did you mean 'return'"),
        ([[1]], {"stream": 3}, "stream=3: must be a function of one Event"),
    ],
)
def test_impossible_call_is_refused(prompts: Any, options: dict[str, Any], sentence: str, make: Make) -> None:
    engine = make()
    with pytest.raises(ConfigError) as error:
        engine.generate(prompts, max_new_tokens=2, **options)
    assert sentence in str(error.value) and engine.counts().steps == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beams": 2.5}, "beams=2.5: must be a whole number"),
        ({"length_penalty": "x"}, "length_penalty='x': must be a number"),
        ({"beam": 2}, "unknown option of beam search 'beam'"),
    ],
)
def test_impossible_beam_search_is_refused(options: dict[str, Any], sentence: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make().beam_search([1], **options)


@pytest.mark.parametrize("tokenizer", ["char", object()])
def test_a_tokenizer_of_another_library_is_refused(tokenizer: Any, make: Make) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer is a (str|object): give what .*get_tokenizer makes"):
        make(tokenizer=tokenizer)


def test_rows_that_were_begun_are_given_back_when_the_next_does_not_fit() -> None:
    engine = InferenceEngine(tiny_llama(), block_size=4, cache_tokens=16, max_batch_size=2)
    with pytest.raises(ConfigError, match="needs more than the"):
        engine.prefill([[1] * 10, [2] * 10])
    assert engine.pool.in_use == 0
    assert engine.prefill([[1] * 10]).shape == (1, 37)


def test_a_row_does_not_wait_for_ever_for_what_its_own_caller_holds(model: nn.Module, make: Make) -> None:
    engine = make(cache_tokens=32, block_size=4)
    engine.prefill([list(range(1, 21))])
    handles = [engine.submit(prompt, max_new_tokens=2) for prompt in ([1, 2], list(range(20, 1, -1)))]
    found = [handle.result(timeout=20) for handle in handles]
    assert list(found[0].tokens) == generate(model, [[1, 2]], max_new_tokens=2)[0]
    assert "waits for blocks that rows of prefill or ScheduleGeneration hold" in str(found[1].error)
    handle = engine.submit(list(range(20, 1, -1)), max_new_tokens=2)
    assert engine.step() and not handle.done  # one who drives by hand may make room
    engine.clear()
    assert len(handle.result().tokens) == 2


def test_closed_engine_computes_nothing(make: Make) -> None:
    engine = make()
    engine.close()
    for call in (lambda: engine.prefill([[1]]), lambda: engine.beam_search([1], max_new_tokens=2)):
        with pytest.raises(ConfigError, match="this engine is closed"):
            call()
    assert engine.memory_report().cache == 0


def test_one_bad_prompt_of_several_is_named_or_returned(model: nn.Module, make: Make) -> None:
    engine = make()
    with pytest.raises(ConfigError, match="prompt 1 of 3 is empty"):
        engine.generate([[1], [], [2]], max_new_tokens=3)
    assert engine.counts().steps == 0
    found = engine.generate([[1], [], [2]], max_new_tokens=3, errors="return")
    assert [one.finish for one in found] == ["length", "error", "length"]
    assert "prompt 1 of 3 is empty" in str(found[1].error)


def test_row_with_nan_logits_fails_alone(make: Make) -> None:
    model = tiny_llama().double()
    with torch.no_grad():
        model.get_parameter("embedding.weight")[7] = torch.nan
    engine = make(model=model)
    bad, good = engine.submit([1, 7], max_new_tokens=3), engine.submit([1, 2], max_new_tokens=3, logit_bias={7: -99})
    assert good.result().finish == "length"
    assert "NaN or infinite at new token 0" in str(bad.result().error)
    with pytest.raises(FmsError, match="NaN or infinite"):
        engine.generate([[7]], max_new_tokens=2)


def test_forward_that_fails_ends_its_requests_and_the_engine_goes_on(model: nn.Module, make: Make) -> None:
    engine = make()
    hook = model.get_submodule("layers.1").register_forward_pre_hook(lambda *_: 1 / 0)
    handle = engine.submit([1, 2], max_new_tokens=3)
    assert "ZeroDivisionError" in str(handle.result().error)
    assert isinstance(handle.result().error.__cause__, ZeroDivisionError)  # type: ignore[union-attr]
    hook.remove()
    assert tokens_of(engine.generate([[1, 2]], max_new_tokens=3)) == generate(model, [[1, 2]], max_new_tokens=3)
    assert engine.memory_report().used == 0


def test_request_beyond_the_whole_cache_is_refused_with_the_sizes(make: Make) -> None:
    engine = make(cache_tokens=16)
    with pytest.raises(ConfigError, match=r"makes 30 tokens \(0.000 GiB\), but the whole cache has 16 tokens"):
        engine.submit([1] * 10, max_new_tokens=20)
    assert len(engine.generate([[1] * 10], max_new_tokens=7)[0].tokens) == 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cache": "pagd"}, "unknown cache 'pagd'. Did you mean 'paged'?"),
        ({"max_seq_len": 65}, "max_seq_len=65 is beyond max_positions=64"),
        ({"max_batch_size": 0}, "max_batch_size=0: must be >= 1"),
        ({"max_batch_size": "8"}, "max_batch_size='8': must be a whole number"),
        ({"max_step_tokens": 8}, "max_step_tokens=8: must be >= 9"),
        ({"cache_tokens": 1.5}, "cache_tokens=1.5: must be a whole number"),
        ({"layout": 5}, "layout=5: give a text, as 'tp=2', or a ParallelLayout"),
        ({"model": None}, "NoneType is no model"),
        ({"cache": "manager", "cache_tokens": 9}, "cache_tokens=9 with cache='manager'"),
        ({"cache": "none", "use_kv_cache": True}, "give one of them"),
        ({"max_batch_size": 10**9, "max_step_tokens": 10**10}, "does not fit the"),
        ({"speculative": 4}, "give a PromptLookup() or a DraftModel(model)"),
    ],
)
def test_impossible_engine_is_refused(options: dict[str, Any], sentence: str, make: Make) -> None:
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert sentence in str(error.value)


def test_model_without_our_attention_is_refused() -> None:
    from tests.inference.models import Counting

    with pytest.raises(ConfigError, match=r"has no fms_parallel.modules.attention.Attention"):
        InferenceEngine(Counting())


def test_layout_for_other_ranks_than_there_are_is_refused() -> None:
    with pytest.raises(LayoutError, match="2 ranks"):
        InferenceEngine(tiny_llama(), layout="tp=2")


# ---- weights laid out for decoding ---------------------------------------------------------------------------------


def test_fast_weights_give_the_same_tokens_and_are_undone() -> None:
    model = tiny_llama(2).double()
    wanted = plain_tokens(model)
    with InferenceEngine(model, fast_weights=True) as engine:
        assert [list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=NEW)] == wanted
        prepared = [module for module in model.modules() if getattr(module, "fast", None)]
        copies = engine.memory_report().copies
        assert (copies > 0) == any(choice.layout != "stored" for choice in engine._fast.choices)  # type: ignore[union-attr]
        assert bool(prepared) == (copies > 0)
    assert not any(getattr(module, "fast", None) for module in model.modules())
    assert plain_tokens(model) == wanted


def test_fast_weights_of_a_changed_model_are_not_used() -> None:
    """An optimizer step under an open engine: an error, never old weights."""
    model = tiny_llama(2)
    engine = InferenceEngine(model, fast_weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = engine.generate([[1, 2]], max_new_tokens=2, errors="return")[0]
    engine.close()
    changed = any(choice.layout != "stored" for choice in engine._fast.choices)  # type: ignore[union-attr]
    assert (found.finish == "error") == changed
    with InferenceEngine(model) as fresh:
        assert fresh.generate([[1, 2]], max_new_tokens=2)[0].finish == "length"


def plain_tokens(model: nn.Module) -> list[list[int]]:
    with InferenceEngine(model) as engine:
        return [list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=NEW)]


# ---- priorities ---------------------------------------------------------------------------------------------------


def test_rows_that_wait_begin_in_the_order_of_their_priorities(model: nn.Module) -> None:
    with InferenceEngine(model, max_batch_size=1) as engine:
        ended: list[str] = []
        given = {"first": 0, "late": 7, "second": 0, "early": -3, "late too": 7}
        handles = [
            engine.submit(
                [3, 5],
                max_new_tokens=2,
                priority=priority,
                stream=lambda event, name=name: event.finish and ended.append(name),  # type: ignore[misc]
            )
            for name, priority in given.items()
        ]
        tokens = {handle.result().tokens for handle in handles}
    assert ended == ["early", "first", "second", "late", "late too"] and len(tokens) == 1


def test_the_least_important_row_gives_its_blocks_back(model: nn.Module) -> None:
    """It came first, and goes on when the other is done."""
    with InferenceEngine(model, cache_tokens=32, block_size=4, max_batch_size=2) as engine:
        alone = [engine.generate([[n]], max_new_tokens=24)[0].tokens for n in (1, 2)]
        ended: list[int] = []

        def begun(number: int, priority: int) -> Handle:
            handle = engine.submit(
                [number],
                max_new_tokens=24,
                priority=priority,
                stream=lambda event: event.finish and ended.append(number),
            )
            engine.step()
            return handle

        handles = [begun(1, 5), begun(2, 4)]
        assert engine.counts().running == 2
        assert [handle.result().tokens for handle in handles] == alone
        assert ended == [2, 1] and engine.counts().preemptions > 0
