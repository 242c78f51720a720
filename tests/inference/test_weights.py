from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from fms_parallel.errors import ConfigError
from fms_parallel.inference import generate
from fms_parallel.inference.weights import LAYOUTS, Prepared, _Joined, prepare_for_decode
from fms_parallel.modules.linear_types import quantise
from tests.inference.models import PROMPTS, tiny_llama

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
        kernel = LAYOUTS[layout](_Joined(weight, bias), rows)
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
    prepared = prepare_for_decode(model)
    if first_copy(prepared):
        with pytest.raises(ConfigError, match=r"undo\(\) that first"):
            prepare_for_decode(model)
        with pytest.raises(ConfigError, match="not copied or pickled"):
            pickle.dumps(model)
    prepared.undo()
    prepare_for_decode(model).undo()
    pickle.dumps(model.state_dict())
