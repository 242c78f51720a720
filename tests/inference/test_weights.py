from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel import compat
from fms_parallel.auto.lora import add_low_rank
from fms_parallel.errors import ConfigError
from fms_parallel.inference import generate
from fms_parallel.inference.compiled import MOST_ROWS, Compiled
from fms_parallel.inference.kernels import LAYOUTS, Joined
from fms_parallel.inference.weights import Prepared, _Trial, prepare_for_decode
from fms_parallel.modules.linear import Matrices
from fms_parallel.modules.linear_types import get_linear_type, quantise
from fms_parallel.modules.low_rank import LowRank
from tests.inference.models import PROMPTS, compiled_wins, tiny_llama

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(IDS)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_gives_the_plain_product(layout: str, rows: int, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 10).to(dtype), torch.randn(24).to(dtype) if biased else None
    x = torch.randn(rows, 10).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        kernel = LAYOUTS[layout](Joined(weight, bias), rows)
        assert kernel is not None or dtype == torch.bfloat16  # not every processor multiplies bf16
        got = kernel(x) if kernel is not None else None
    finally:
        torch.set_num_threads(threads)
    if got is None:
        return
    want = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (got.double() - want).abs().max() <= {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype] * want.abs().max()


@pytest.mark.parametrize("config", [{}, {"fused": True}, {"attention_bias": True, "ffn_bias": True}, {"tied": True}])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prepared_model_computes_the_same(config: dict[str, bool], rows: int) -> None:
    model = tiny_llama(**config)
    want, tokens = logits(model), generate(model, PROMPTS, max_new_tokens=5)
    with prepare_for_decode(model, rows):
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
        assert generate(model, PROMPTS, max_new_tokens=5) == tokens
    assert torch.equal(logits(model), want)


def test_a_prepared_int8_model_computes_the_same() -> None:
    model = quantise(tiny_llama(), "int8")
    want = logits(model)
    with prepare_for_decode(model):
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


needs_compiler = pytest.mark.skipif(not compat.has_compiler(), reason="no C++ compiler on this machine")


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "sizes", "rows"), [("plain", (24, 7, 7), 3), ("plain", (24,), 1), ("bf16", (24,), 2), ("int8", (24, 6), 1)]
)
def test_a_compiled_kernel_is_the_plain_product(kind: str, sizes: tuple[int, ...], rows: int) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    dense = [torch.randn(n, 10).to(dtype) for n in sizes]
    biases = [torch.randn(n).to(dtype) if rows > 1 else None for n in sizes]
    weights: list[Any] = list(dense)
    if kind == "int8":
        stored = get_linear_type("int8")
        scales = [stored.scale(w.abs().amax(-1)) for w in dense]
        weights = [stored.weight(stored.values(w, scale), scale) for w, scale in zip(dense, scales, strict=True)]
        dense = [w.dense(torch.float32) for w in weights]
    x = torch.randn(rows, 10).to(dtype)
    kernel = Compiled(dtype).kernel(Matrices(tuple(weights), tuple(biases)), rows)
    assert kernel is not None
    exact = [x.double() @ w.double().t() + (0 if b is None else b) for w, b in zip(dense, biases, strict=True)]
    want = torch.cat(exact, -1)
    error = (kernel(x).double() - want).abs().max() / want.abs().max()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]


def test_no_compiled_kernel_for_many_rows() -> None:
    if compat.has_compiler():
        assert Compiled(torch.float32).kernel(Matrices((torch.ones(2, 2),), (None,)), MOST_ROWS + 1) is None


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_compiler", lambda: False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        prepare_for_decode(tiny_llama(), compiled=True)


@needs_compiler
@pytest.mark.parametrize("linear_type", [None, "int8"])
@pytest.mark.parametrize("step", [-1.0, 1.0])
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_with_compiled_kernels_computes_the_same(
    linear_type: str | None, step: float, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last layout tried is called the fastest, two rows go through kernels; where the first, only one row.

    Ten kernels take long to make: by default their functions are called as they are.
    """
    if not compiles:
        monkeypatch.setattr(compat, "compile_function", lambda function, examples: function)
        monkeypatch.setattr(compat, "compile_traced", lambda graph, examples: graph)
    times = itertools.count(100.0, step)
    monkeypatch.setattr(_Trial, "time", lambda *_: next(times))
    model = tiny_llama() if linear_type is None else quantise(tiny_llama(), linear_type)
    prompts = [PROMPTS[:1], [PROMPTS[0], PROMPTS[0][::-1]]]
    tokens, want = [generate(model, few, max_new_tokens=5) for few in prompts], logits(model)
    with prepare_for_decode(model, rows=2, compiled=True) as prepared:
        assert {c.layout for c in prepared.choices} == {"compiled" if step < 0 else "stored"}
        assert all((c.one_row is None) == (step < 0) for c in prepared.choices)
        assert prepared.extra_bytes == 0
        assert [generate(model, few, max_new_tokens=5) for few in prompts] == tokens
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "layers" in name and p.dim() > 1).add_(1)
            with pytest.raises(ConfigError, match="a weight has changed"):
                model(IDS[:1, :1] if step > 0 else IDS[:, :1])


def test_bf16_activations_of_fp32_weights_are_prepared_in_bf16() -> None:
    model = tiny_llama(layout="precision=bf16")
    want = logits(model)
    with prepare_for_decode(model):
        torch.testing.assert_close(logits(model), want, rtol=0.05, atol=0.05)


def test_state_and_gradients_are_untouched_meanwhile() -> None:
    model, plain = tiny_llama(), tiny_llama()
    with prepare_for_decode(model):
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
        for m in (model, plain):
            m(IDS, labels=IDS).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name


def first_copy(prepared: Prepared) -> bool:
    return any(choice.layout != "stored" for choice in prepared.choices)


def test_weights_that_changed_are_not_silently_the_old_ones() -> None:
    model = tiny_llama()
    prepared = prepare_for_decode(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    if first_copy(prepared):
        with pytest.raises(ConfigError, match="a weight has changed since prepare_for_decode"):
            logits(model)
    prepared.undo()
    logits(model)


@pytest.mark.parametrize("way", ["assigned", "exchanged"])
def test_weights_that_are_other_tensors_now_are_not_silently_the_old_ones(way: str) -> None:
    model = tiny_llama()
    with compiled_wins(), prepare_for_decode(model) as prepared:  # what is tried last: copies
        assert first_copy(prepared)
        if way == "assigned":
            model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()}, assign=True)
        else:
            for parameter in model.parameters():
                parameter.data = 2 * parameter.data
        with torch.no_grad(), pytest.raises(ConfigError, match="a weight has changed since prepare_for_decode"):
            model(torch.tensor([[1]]))  # one row: prompts may go through the parameters


def test_every_group_has_a_choice_that_was_the_fastest() -> None:
    prepared = prepare_for_decode(tiny_llama())
    assert sum(choice.count for choice in prepared.choices) == 2 * 4 + 1
    for choice in prepared.choices:
        assert choice.seconds[choice.layout] == min(choice.seconds.values()) and "stored" in choice.seconds


def test_wrong_requests_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="rows=0"):
        prepare_for_decode(model, 0)
    with pytest.raises(ConfigError, match="no matrices"):
        prepare_for_decode(nn.Linear(2, 2))
    adapted = tiny_llama()
    add_low_rank(adapted, LowRank(("query",)))
    with pytest.raises(ConfigError, match=r"merge_lora\(model\) first, which leaves none"):
        prepare_for_decode(adapted)
    prepared = prepare_for_decode(model)
    if first_copy(prepared):
        with pytest.raises(ConfigError, match=r"undo\(\) that first"):
            prepare_for_decode(model)
        with pytest.raises(ConfigError, match="not copied or pickled"):
            pickle.dumps(model)
    prepared.undo()
    prepare_for_decode(model).undo()
    pickle.dumps(model.state_dict())
