from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

from fms_parallel import compat
from fms_parallel.errors import ConfigError
from fms_parallel.inference import InferenceEngine, generate
from fms_parallel.inference.cache import KVCache
from fms_parallel.inference.kv_manager import CacheSize, KVCacheManager
from fms_parallel.inference.one_query import Attentions, OneQuery, Stretch
from fms_parallel.inference.paged import Where
from fms_parallel.inference.ragged import Piece, RaggedBatch
from fms_parallel.inference.weights import prepare_for_decode
from fms_parallel.models import get_model
from fms_parallel.modules.scores import scores
from tests.inference.models import PROMPTS, compiled_wins, tiny_llama

HEADS = [(4, 4, 8), (6, 2, 5), (101, 1, 3)]


def uncompiled(function: Any, examples: Any) -> Any:
    return function


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_rows_in_memory_are_those_of_torchs_attention(heads: tuple[int, int, int], scale: float | None) -> None:
    count, kv, width = heads
    torch.manual_seed(0)
    q = torch.randn(1, 3, count, width, dtype=torch.float64)
    k, v = (torch.randn(1, 3, kv, width, dtype=torch.float64) for _ in range(2))
    keys, values = (torch.randn(kv, 20, width, dtype=torch.float64) for _ in range(2))
    places = [(0, 1), (3, 7), (12, 8)]
    before = keys.clone(), values.clone()
    with mock.patch.object(compat, "compile_over_sizes", uncompiled):
        kernel = OneQuery(heads, q.dtype, scale)
    out = kernel(q, k, v, [Stretch(keys, values, *place) for place in places])
    for row, (start, length) in enumerate(places):
        for memory, new, old in ((keys, k, before[0]), (values, v, before[1])):
            old[:, start + length - 1] = new[0, row]
            assert torch.equal(memory[:, start : start + length], old[:, start : start + length])
        seen, said = (memory[None, :, start : start + length] for memory in before)
        want = scores(q[:, row : row + 1].transpose(1, 2), seen, said, None, scale)[:, :, 0]
        assert (out[0, row] - want[0]).abs().max() <= 1e-14
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])  # nothing else was written


@pytest.mark.skipif(not compat.has_compiler(), reason="no C++ compiler on this machine")
def test_one_compiled_kernel_serves_all_lengths_and_memories() -> None:
    torch.manual_seed(0)
    heads = 6, 2, 13
    kernel = OneQuery(heads, torch.float32, None)
    with mock.patch.object(compat, "compile_over_sizes", uncompiled):
        plain = OneQuery(heads, torch.float32, None)
    for capacity, start, length in ((1, 0, 1), (2, 1, 1), (9, 0, 9), (64, 3, 40), (2000, 17, 1900)):
        q, k, v = torch.randn(1, 1, 6, 13), torch.randn(1, 1, 2, 13), torch.randn(1, 1, 2, 13)
        memory = torch.randn(2, 2, capacity, 13)
        found, wanted = (Stretch(*copy, start, length) for copy in (memory.clone(), memory.clone()))
        assert (kernel(q, k, v, [found]) - plain(q, k, v, [wanted])).abs().max() <= 1e-5
        assert torch.equal(found.keys, wanted.keys) and torch.equal(found.values, wanted.values)


def test_a_cache_gives_room_where_append_would() -> None:
    cache, like = KVCache(4), torch.ones(2, 3, 5)
    assert cache.one_more(0, like) is None  # its memory is not there yet
    cache.append(0, *(torch.ones(2, 3, 2, 5),) * 2)
    assert cache.one_more(0, torch.ones(1, 3, 5)) is None and cache.one_more(0, like.double()) is None
    rows = cache.one_more(0, like)
    assert rows is not None and [length for *_, length in rows] == [3, 3]
    for keys, values, length in rows:
        keys[:, length - 1], values[:, length - 1] = 7.0, 8.0
    keys, values = cache.append(0, *(torch.full((2, 3, 1, 5), 9.0),) * 2)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 7, 9] and values[1, 2, :, 4].tolist() == [1, 1, 8, 9]
    assert cache.one_more(0, like) is None  # full


def test_decoding_goes_through_it() -> None:
    model, calls = tiny_llama(), []
    want = [generate(model, [row], max_new_tokens=12)[0] for row in PROMPTS]
    once = OneQuery.__call__

    def counted(self: OneQuery, q: Any, *given: Any) -> Any:
        calls.append(q.shape[1])
        return once(self, q, *given)

    with compiled_wins(), prepare_for_decode(model, rows=3, compiled=True) as prepared:
        assert [choice.attention for choice in prepared.blocks] == ["", ""]
        with mock.patch.object(OneQuery, "__call__", counted):
            assert generate(model, PROMPTS[:1], max_new_tokens=12) == want[:1]
            assert calls == [1] * 2 * 11
            calls.clear()
            with InferenceEngine(model, max_batch_size=3, max_seq_len=32) as engine:
                assert [list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=12)] == want
            assert calls == [3] * 2 * 11
            calls.clear()
            several = [*PROMPTS, *PROMPTS[:2]]  # more rows than blocks are compiled for
            with InferenceEngine(model, max_batch_size=5, max_seq_len=32) as engine:
                assert [list(one.tokens) for one in engine.generate(several, max_new_tokens=12)] == [*want, *want[:2]]
            assert calls == [5] * 2 * 11


def test_rows_in_several_places_or_with_several_queries_are_the_stores() -> None:
    size = CacheSize({0: (2, 3)}, torch.float32)
    storage, k = KVCacheManager(size, 1, 16, torch.device("cpu")), torch.ones(1, 2, 2, 3)
    one, other = Piece([5], 3, where=[Where([6], [(3, 4)])]), Piece([6], 4, where=[Where([12], [(8, 5)])])
    apart, two = (
        Piece([6], 4, where=[Where([12], [(0, 2), (10, 3)])]),
        Piece([6, 7], 4, where=[Where([1, 2], [(0, 6)])]),
    )
    assert _told([one, other], storage, k) == [(3, 4), (8, 5)]
    assert _told([one, apart], storage, k) == _told([one, two], storage, k) == _told([one, other], None, k) is None
    assert RaggedBatch([other], storage, torch.device("cpu")).stretches(0, k, 3)[0][2:] == (10, 3)  # a window of 3


def _told(pieces: list[Piece], storage: KVCacheManager | None, k: torch.Tensor) -> list[Any] | None:
    found = RaggedBatch(pieces, storage, torch.device("cpu")).stretches(0, k, None)
    return found and [(stretch.start, stretch.length) for stretch in found]


def test_what_is_wrong_or_no_faster_or_no_program_is_not_used() -> None:
    like = torch.ones(1)
    made = {
        "compiled, it is no faster.": (uncompiled, [2.0, 1.0]),
        "compiled, it differs by 1.0e-02.": (lambda f, _: lambda *given: f(*given) * 1.01, [1.0, 2.0]),
        "compiled, it differs by inf.": (lambda f, _: lambda *given: f(*given) * float("nan"), [1.0, 2.0]),
        "cannot be compiled: RuntimeError: no": (mock.Mock(side_effect=RuntimeError("no\nmore")), [1.0, 2.0]),
    }
    for reason, (compiles, seconds) in made.items():
        times = iter(seconds)
        attentions = Attentions(lambda calls, times=times: -next(times))
        with mock.patch.object(compat, "compile_over_sizes", compiles):
            assert attentions.of((4, 2, 8), like, None) is None
            assert attentions.reason == reason
            assert attentions.of((4, 2, 8), like, None) is None  # tried once


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    with compiled_wins(), prepare_for_decode(tiny_llama().half(), rows=2, compiled=True) as prepared:
        assert [(choice.tokens, choice.reason, choice.attention) for choice in prepared.blocks] == [
            (1, "", ""),
            (2, "", ""),
        ]


@pytest.mark.parametrize("way", ["assigned", "exchanged"])
def test_a_weight_that_is_another_tensor_now_is_an_error(way: str) -> None:
    model = tiny_llama()
    with compiled_wins(), prepare_for_decode(model, compiled=True):
        generate(model, PROMPTS[:1], max_new_tokens=3)
        if way == "assigned":
            model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()}, assign=True)
        else:
            for parameter in model.parameters():
                parameter.data = 2 * parameter.data
        with pytest.raises(ConfigError, match="a weight has changed since prepare_for_decode"):
            generate(model, PROMPTS[:1], max_new_tokens=3)


def test_two_engines_of_one_model_may_run_in_two_threads() -> None:
    """Blocks wait for each other: a step that was interrupted goes on with its own memory."""
    model, switched = tiny_llama(), sys.getswitchinterval()
    prompts = [[n + 1, 2 * n + 1, 5][: 1 + n % 3] for n in range(8)]
    want = [generate(model, [row], max_new_tokens=24)[0] for row in prompts]
    with ExitStack() as stack:
        stack.callback(sys.setswitchinterval, switched)
        sys.setswitchinterval(1e-5)
        stack.enter_context(compiled_wins())
        stack.enter_context(prepare_for_decode(model, rows=2, compiled=True))
        made = [InferenceEngine(model, max_batch_size=2, block_size=size) for size in (4, 8)]
        engines = [stack.enter_context(engine).start() for engine in made]
        for _ in range(2):
            handles = [[engine.submit(row, max_new_tokens=24) for row in prompts] for engine in engines]
            assert [[list(one.result(timeout=60).tokens) for one in few] for few in handles] == [want, want]


def test_a_models_own_scale_reaches_the_kernel() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 48, "std": 0.4}
    model = get_model("granite", None, **sizes, max_positions=64, attention_multiplier=2.0)
    model.eval()
    with compiled_wins(), InferenceEngine(model, max_batch_size=3, max_seq_len=32) as engine:
        found = []
        for compiled in (False, True):
            with prepare_for_decode(model, rows=2, compiled=compiled):
                for rows in (1, 2, 3):  # the last are more than blocks are compiled for
                    engine.prefill(PROMPTS[:rows])
                    found.append(engine.decode_step([4, 5, 6][:rows], [5, 2, 1][:rows]))
        for want, got in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
