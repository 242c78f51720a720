"""Every layout gives the loss, every gradient, the gradient norm and the updated weights of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fms_parallel.distributed.boxes import local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.layout import ParallelLayout
from fms_parallel.models import get_model
from fms_parallel.verify import TOLERANCE, Report, verify
from tests.distributed.comparison import Together, check
from tests.poison import poisoned_memory

# Odd on purpose: 13 tokens, 97 ids and 63 features divide by nothing.
TINY = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 63, "max_positions": 64}
BIASED = {"attention_bias": True, "ffn_bias": True}
ONE_KV = {"kv_heads": 1, "qk_norm": True, **BIASED}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tp=2", {}),
    ("tp=2", ONE_KV),
    ("tp=2", {"fused": True, **BIASED}),
    ("tp=2,recompute=every=2", {}),
    ("tp=2,sp", {}),
    ("tp=2,sp", {"tied": True}),
    ("tp=2,sp", ONE_KV),
    ("tp=2,sp", {"fused": True, "kv_heads": 1, **BIASED}),
    ("tp=2,sp,loss_parallel=off", {}),
    ("tp=2,sp", {"dropout": 0.2}),
    ("tp=2,sp,recompute=full", {"dropout": 0.2}),
    ("tp=2,sp,tp_parts=attention", {"fused": True, "kv_heads": 1, **BIASED}),
    ("tp=2,sp,tp_parts=attention,recompute=full", {"dropout": 0.2, **BIASED}),
    ("fsdp=2", {}),
    ("fsdp=2", {"tied": True, **BIASED}),
    ("fsdp=2", {"fused": True, **BIASED}),
    ("fsdp=2,recompute=selective", {"dropout": 0.2}),
    ("fsdp=2,keep_gathered=1", {"dropout": 0.2}),
    ("fsdp=2,offload=params", {}),
    ("fsdp=2,offload=optimizer_state", {"tied": True}),
    ("tp=2,sp,offload=optimizer_step", {"fused": True, **BIASED}),
    ("dp=2", {"tied": True, "dropout": 0.2}),
    ("tp=4", {"kv_heads": 1}),
    ("tp=4,sp", {"tied": True}),
    ("fsdp=2,tp=2", {"tied": True}),
    ("fsdp=2,tp=2,sp", {"dropout": 0.2, **BIASED}),
    ("fsdp=2,tp=2,sp,recompute=full", {"fused": True}),
    ("dp=2,tp=2,sp", {}),
    ("tp=4,sp,tp_parts=attention,recompute=selective", {"tied": True}),
    ("fsdp=2,tp=2,sp,tp_parts=attention", {"dropout": 0.2, **BIASED}),
    ("dp=2,tp=2,sp,tp_parts=attention", {}),
    ("cp=2,tp=2,sp,tp_parts=attention", {"fused": True}),
    ("dp=2,fsdp=2", {"dropout": 0.2}),
    ("dp=2,fsdp=2,tp=2,sp", {"tied": True, **ONE_KV}),
]


def shaken_llama(**arguments: Any) -> nn.Module:
    """A tiny LLaMA none of whose parameters is constant: zero biases and unit norms hide mistakes."""
    model = get_model("llama", "micro", seed=5, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            ramp = torch.arange(count, dtype=parameter.dtype).remainder_(7).view(parameter.shape).mul_(0.01)
            local_tensor(parameter).add_(ramp[local_box(parameter).slices])
    return model


def compare(layout: str, config: dict[str, Any], dtype: str, pieces: int) -> Report:
    """One rank of one case."""
    with poisoned_memory():
        parsed = ParallelLayout.parse(layout)
        return verify(
            shaken_llama, parsed, dtype=dtype, seq_len=13, grad_accum_steps=pieces, steps=3, **(TINY | config)
        )


def ranks_of(layout: str) -> int:
    return ParallelLayout.parse(layout).world_size


COMPARED = Together(
    compare,
    [(layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1) for layout, config in CASES],
    lambda layout, *more: ranks_of(layout),
)


@pytest.mark.parametrize(("layout", "config"), CASES, ids=[f"{layout}-{'-'.join(config)}" for layout, config in CASES])
def test_fp64_matches_one_process(layout: str, config: dict[str, Any]) -> None:
    check(COMPARED(layout, config, "fp64", 2 if ranks_of(layout) == 2 else 1))


@pytest.mark.parametrize("layout", ["tp=2,sp", "fsdp=2", "fsdp=2,tp=2,sp", "dp=2,fsdp=2,tp=2,sp"])
def test_fp32_matches_one_process(layout: str) -> None:
    reports = run_ranks(compare, ranks_of(layout), layout, BIASED, "fp32", 1)
    assert all(report.worst <= TOLERANCE["fp32"] for report in reports), reports[0]


def out_of_vocabulary(where: str) -> str:
    """What a rank says of an id (or a label) that no rank has."""
    model = shaken_llama(distributed_strategy="tp=2,sp", **TINY)
    ids = torch.full((1, 4), 96)
    labels = ids.clone()
    (ids if where == "ids" else labels)[0, 2] = 97
    try:
        model(ids, labels=labels)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "nothing"


@pytest.mark.parametrize(
    ("where", "words"), [("ids", "a token id is not in [0, 97)"), ("labels", "token id in [0, 97)")]
)
def test_a_token_that_no_rank_holds_is_refused(where: str, words: str) -> None:
    assert all(words in said for said in run_ranks(out_of_vocabulary, 2, where))


def wrong_llama(**arguments: Any) -> nn.Module:
    """One norm's gradient is a hundred-thousandth off when it is distributed; the loss is right."""
    model = shaken_llama(**arguments)
    if arguments["distributed_strategy"].tp > 1:
        model.layers[1].ffn_norm.weight.register_hook(lambda grad: grad * (1 + 1e-5))  # type: ignore[union-attr, index]
    return model


def compare_wrong() -> Report:
    return verify(wrong_llama, ParallelLayout.parse("tp=2,sp"), dtype="fp64", seq_len=13, **TINY)


def test_a_slightly_wrong_gradient_is_found_and_named() -> None:
    for report in run_ranks(compare_wrong, 2):
        assert report.gradient_error > TOLERANCE["fp64"]
        assert report.worst_gradient == "layers.1.ffn_norm.weight"
        assert report.loss_error <= TOLERANCE["fp64"]
