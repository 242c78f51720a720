from __future__ import annotations

import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fms_parallel import compat
from fms_parallel.errors import ConfigError
from fms_parallel.inference import InferenceEngine, generate
from fms_parallel.inference.compiled import MOST_ROWS
from fms_parallel.inference.weights import prepare_for_decode
from fms_parallel.models import get_model
from fms_parallel.modules.blocks import Blocks
from fms_parallel.modules.linear_types import quantise
from tests.inference.models import PROMPTS, compiled_wins, tiny_llama

needs_compiler = pytest.mark.skipif(not compat.has_compiler(), reason="no C++ compiler on this machine")

TINY = {"vocab_size": 37, "width": 32, "layers": 2, "heads": 4, "ffn_width": 48, "max_positions": 64, "std": 0.4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "gpt_bigcode": {},
    "qwen3": {"kv_heads": 2, "head_width": 8},
    "mistral": {"kv_heads": 2, "window": 3},
    "granite": {"kv_heads": 4},
}


def tokens_of(model: nn.Module) -> list[list[list[int]]]:
    """One row and three of unequal length by a loop, and the same three in an engine."""
    found = [generate(model, few, max_new_tokens=8) for few in (PROMPTS[:1], PROMPTS)]
    with InferenceEngine(model, max_batch_size=3, max_seq_len=32) as engine:
        found.append([list(one.tokens) for one in engine.generate(PROMPTS, max_new_tokens=8)])
    return found


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_blocks_give_the_tokens_of_the_blocks(architecture: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = get_model(architecture, None, **TINY, **MODELS[architecture], data_type=dtype)
    want = tokens_of(model)
    with compiled_wins(), prepare_for_decode(model, rows=3, compiled=True) as prepared:
        assert [(choice.tokens, choice.count, choice.reason) for choice in prepared.blocks] == [(1, 2, ""), (3, 2, "")]
        with mock.patch.object(type(model.layers[0]), "forward", side_effect=AssertionError):  # type: ignore[index]
            one = torch.tensor([[5]])
            with torch.no_grad(), pytest.raises(AssertionError):
                model(one)  # no cache: not a decoding step
        assert tokens_of(model) == want
    assert tokens_of(model) == want
    assert all("forward" not in vars(module) for module in model.modules())


def test_steps_really_go_through_compiled_blocks() -> None:
    model = tiny_llama()
    calls = []
    with compiled_wins(), prepare_for_decode(model, compiled=True):
        fast = model.layers.forward  # type: ignore[union-attr]
        made = fast.compiled[1]
        with mock.patch.dict(fast.compiled, {1: lambda *given: calls.append(1) or made(*given)}):
            generate(model, PROMPTS[:1], max_new_tokens=4)
    assert len(calls) == 3  # the first token is the prompt's


def test_blocks_of_one_shape_share_their_pieces() -> None:
    model, made = tiny_llama(layers=5), []
    graphs = mock.patch.object(compat, "compile_traced", lambda graph, examples: made.append(graph.code) or graph)
    with compiled_wins(), graphs, prepare_for_decode(model, compiled=True):
        assert len(made) == len(set(made)) == 3  # up to the first attention, between two, after the last


def test_single_blocks_of_another_kind_of_model_are_compiled_one_by_one() -> None:
    model = tiny_llama()
    want = tokens_of(model)
    model.layers = nn.ModuleList(model.layers)  # type: ignore[arg-type]
    through = mock.patch.object(type(model.layers), "forward", Blocks.forward, create=True)
    with through, compiled_wins(), prepare_for_decode(model, rows=3, compiled=True) as prepared:
        assert [(choice.count, choice.reason) for choice in prepared.blocks] == [(2, ""), (2, "")]
        assert all("forward" in vars(block) for block in model.layers)  # type: ignore[union-attr]
        assert tokens_of(model) == want


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_blocks_compiled_in_earnest_give_the_logits_of_the_blocks(kind: str) -> None:
    model = tiny_llama()
    if kind != "fp32":
        model = model.bfloat16()
    if kind == "int8":
        model = quantise(model, "int8")
    rows = [[1, 2, 3], [4, 5, 6]]

    def decoded() -> torch.Tensor:
        with InferenceEngine(model, max_batch_size=2, max_seq_len=16) as engine:
            engine.prefill(rows)
            return engine.decode_step([7, 8], 3).float()

    want = decoded()
    always = mock.patch("fms_parallel.inference.weights._Trial.best", side_effect=range(10**6, 0, -1))
    with always, prepare_for_decode(model, rows=2, compiled=True) as prepared:
        assert not any(choice.reason for choice in prepared.blocks)
        got = decoded()
    assert (got - want).abs().max() <= {"fp32": 1e-5}.get(kind, 2**-5) * want.abs().max()


def test_experts_are_left_as_they_are_for_the_reason_given() -> None:
    torch.manual_seed(0)
    model = get_model("mixtral", None, **TINY, kv_heads=2, experts=4)
    want = tokens_of(model)
    with compiled_wins(), prepare_for_decode(model, compiled=True) as prepared:
        assert [choice.compiled for choice in prepared.blocks] == [None]
        assert "bincount.default gives depends on the numbers" in prepared.blocks[0].reason
        assert tokens_of(model) == want


def test_what_is_no_faster_or_computes_something_else_is_not_used() -> None:
    model = tiny_llama()
    with compiled_wins(step=1.0), prepare_for_decode(model, compiled=True) as prepared:
        assert prepared.blocks[0].reason == "compiled, they are no faster."
        assert all("forward" not in vars(module) for module in model.modules())

    def fails(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no such operation\nand more")

    failing = mock.patch.object(compat, "compile_traced", fails)
    with compiled_wins(), failing, prepare_for_decode(model, compiled=True) as prepared:
        assert prepared.blocks[0].reason == "cannot be compiled: RuntimeError: no such operation"
    with compiled_wins(), prepare_for_decode(model, rows=MOST_ROWS + 1, compiled=True) as prepared:
        assert [choice.tokens for choice in prepared.blocks] == [1]

    def wrong(graph: Any, examples: Any) -> Any:
        return lambda *given: [out * 1.01 for out in found] if isinstance(found := graph(*given), tuple) else found

    wrongly = mock.patch.object(compat, "compile_traced", wrong)
    with compiled_wins(), wrongly, prepare_for_decode(model, compiled=True) as prepared:
        assert "differ by" in prepared.blocks[0].reason
        assert all("forward" not in vars(module) for module in model.modules())


def test_training_mode_gradients_and_weights_that_change() -> None:
    model, plain = tiny_llama(), tiny_llama()
    with compiled_wins(), prepare_for_decode(model, compiled=True):
        for each in (model, plain):
            each.train()
            each(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
        for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad), name  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="is not copied or pickled"):
            pickle.dumps(model)
        with torch.no_grad():
            model.layers[1].attention_norm.weight.mul_(2)  # type: ignore[index, union-attr]
        with pytest.raises(ConfigError, match="a weight has changed"):
            generate(model, PROMPTS[:1], max_new_tokens=3)
