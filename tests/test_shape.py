"""`ModelShape`'s arithmetic against real models: parameters that exist, operations that run, memory that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fms_parallel.models import get_config, get_model, list_variants
from fms_parallel.models.llama import LLaMA, config_to_hf
from fms_parallel.shape import ModelShape
from tests.saved import saved_bytes

PUBLISHED = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "70b": 68_976_648_192,
    "3-8b": 8_030_261_248,
    "3-70b": 70_553_706_496,
    "3.2-1b": 1_235_814_400,
    "3.2-3b": 3_212_749_824,
    "3.1-405b": 405_853_388_800,
}
"""Parameters of the checkpoints that Meta published."""

B, S = 2, 48
SWITCHES: list[dict[str, Any]] = [
    {},
    {"kv_heads": 2},
    {"kv_heads": 1, "tied": True},
    {"head_width": 32, "attention_bias": True, "ffn_bias": True},
    {"qk_norm": True},
]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list_variants("llama"))
def test_parameters_are_those_of_the_module(variant: str) -> None:
    config = get_config("llama", variant)
    with torch.device("meta"):
        assert config.shape().parameters() == count(LLaMA(config))


@pytest.mark.parametrize("switches", SWITCHES)
def test_parameters_follow_every_switch(switches: dict[str, Any]) -> None:
    config = get_config("llama", "micro", **switches)
    with torch.device("meta"):
        model = LLaMA(config)
        shape, block = config.shape(), model.layers[0]
    assert shape.parameters() == count(model)
    assert shape.attention_parameters == count(block.attention)  # type: ignore[arg-type]
    assert shape.ffn_parameters == count(block.feed_forward)  # type: ignore[arg-type]
    assert shape.norm_parameters == count(block.ffn_norm)  # type: ignore[arg-type]
    assert shape.block_parameters == count(block)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_are_those_published_and_those_of_transformers(variant: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = get_config("llama", variant)
    with torch.device("meta"):
        theirs = llama.LlamaForCausalLM(llama.LlamaConfig(**config_to_hf(config)))
    assert config.shape().parameters() == PUBLISHED[variant] == count(theirs)


def test_learned_positions_ungated_feed_forward_and_layer_norms_are_counted() -> None:
    """Against GPT-2 of transformers, the smallest: 124,439,808."""
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    with torch.device("meta"):
        theirs = gpt2.GPT2LMHeadModel(gpt2.GPT2Config())
    shape = ModelShape(
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        head_width=64,
        ffn_width=3072,
        vocab=50257,
        max_positions=1024,
        gated=False,
        tied=True,
        attention_bias=True,
        ffn_bias=True,
        learned_positions=True,
        norm_bias=True,
    )
    assert shape.parameters() == count(theirs) == 124_439_808


# ---- operations -------------------------------------------------------------------------------------------------


def added_product(self_shape: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """`addmm_` adds a product in place; torch's counter knows `addmm` only."""
    return 2 * a[0] * a[1] * b[1]


def counted_flops(run: Callable[[], None]) -> int:
    """What torch counts: 2 M N K for each product of matrices, nothing for elementwise work.

    Attention is made of plain products (SDPBackend.MATH), because the counter does not know the fused kernel of
    CPUs. It then multiplies the whole S x S square, the causal half of which is thrown away.
    """
    mapping = {torch.ops.aten.addmm_: added_product}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("switches", SWITCHES)
def test_flops_are_those_that_torch_counts(switches: dict[str, Any]) -> None:
    model = get_model("llama", "micro", layers=2, **switches)
    shape, ids = model.config.shape(), torch.randint(0, 256, (B, S))

    def forward() -> None:
        model(ids)

    def forward_and_backward() -> None:
        model(ids, ids).backward()

    with torch.no_grad():
        assert counted_flops(forward) == B * S * shape.flops_per_token(S, causal=False, training=False)
    # A norm's backward may sum its weight's gradient over rows as a product: 2 T E each, not in the formula.
    norms = 2 * B * S * shape.width * (2 * shape.layers + 1) * (2 if shape.qk_norm else 1)
    counted = counted_flops(forward_and_backward) - B * S * shape.flops_per_token(S, causal=False)
    assert 0 <= counted <= norms


@pytest.mark.parametrize("switches", SWITCHES)
def test_causal_attention_costs_half_the_scores(switches: dict[str, Any]) -> None:
    shape = get_config("llama", "micro", **switches).shape()
    for training, passes in ((False, 1), (True, 3)):
        square, causal = (shape.flops_per_token(S, causal=c, training=training) for c in (False, True))
        assert square - causal == passes * shape.layers * 2 * S * shape.heads * shape.head_width


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("switches", [*SWITCHES[:3], {"fused": True, "kv_heads": 2}, {"layers": 1}])
def test_activation_bytes_are_those_that_autograd_keeps(switches: dict[str, Any], dtype: str) -> None:
    model = get_model("llama", "micro", data_type=dtype, **{"layers": 2, **switches})
    config, ids = model.config, torch.randint(0, 256, (B, S))
    width = {"fp32": 4, "bf16": 2}[dtype]
    expected = config.activation_bytes(B, S, bytes_per_element=width)
    if config.fused:
        expected += B * S * width * config.layers * (config.heads + config.k) * config.d
    assert saved_bytes(model, ids) == pytest.approx(expected, rel=0.03)
    # The loss keeps the head's gradient, [V, E] in fp32, and nothing of the size of the logits.
    head = 4 * config.vocab_size * config.width
    assert saved_bytes(model, ids, ids) - head == pytest.approx(expected, rel=0.03)
