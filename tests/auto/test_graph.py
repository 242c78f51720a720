"""Graphs of models: floating-point operations against closed forms, boundaries, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fms_parallel.auto.families import tiny_batch, tiny_model
from fms_parallel.auto.graph import analyse, trace
from fms_parallel.auto.source import skeleton_of
from fms_parallel.auto.stage import constant_inputs
from fms_parallel.auto.tasks import get_task
from fms_parallel.errors import LayoutError
from tests.auto.plain import Deciding, Flat, Net, net_batch

pytest.importorskip("transformers")

B, S, E, H, V = 4, 12, 32, 4, 96


def inputs_of(name: str, model: Any) -> dict[str, Any]:
    task = get_task(model, None)
    return {**task.inputs(task.prepare(tiny_batch(name, rows=B), model.config)), **constant_inputs(model)}


def attention_flops() -> int:
    """Scores and their product with values, each `[B, H, S, S] x [S, E/H]`, nothing saved for causality."""
    return 2 * 2 * B * S * S * E


@pytest.mark.parametrize(
    ("name", "block", "matrices"),
    [
        ("gpt2", "transformer.h", E * 3 * E + E * E + 2 * E * 4 * E),
        ("llama", "model.layers", 2 * E * E + 2 * E * E // 2 + 3 * E * 48),
        ("bert", "bert.encoder.layer", 4 * E * E + 2 * E * 48),
    ],
)
def test_flops_of_blocks_are_the_closed_form(name: str, block: str, matrices: int) -> None:
    model = tiny_model(name)
    found = analyse(model, inputs_of(name, model))
    assert [cost.name for cost in found.blocks] == [f"{block}.{index}" for index in range(4)]
    assert {cost.flops for cost in found.blocks} == {2 * B * S * matrices + attention_flops()}
    transform = 2 * B * S * E * E if name == "bert" else 0
    assert found.outside.flops == 2 * B * S * E * V + transform
    assert found.flops == found.outside.flops + 4 * found.blocks[0].flops


def test_bytes_of_a_block_and_its_boundary_are_the_sums_written_out() -> None:
    found = analyse(Net(skip=False), {"input_ids": net_batch()["input_ids"]})
    rows, width = 4 * 5, 8
    one, two = rows * width * 4, rows * width * 4 * 2
    block = found.blocks[1]
    assert block.parameter_bytes == 4 * (2 * width + width * 2 * width + 2 * width + 2 * width * width + width)
    assert block.leaving == one
    assert block.entering == one + 4 * width * 4  # the tensor, and the expanded table [4, 1, 8]
    # layer_norm, up, tanh, down, mul, add
    assert block.bytes_written == one + two + two + one + one + one
    scale = 4 * width * 4
    read = one + one + two + two + (one + scale) + 2 * one + block.parameter_bytes
    assert block.bytes_read == read


def test_every_parameter_that_is_used_has_its_name_and_its_place() -> None:
    model = tiny_model("t5")
    traced = trace(model, inputs_of("t5", model))
    names = {traced.parameters[node] for node in traced.parameters if node.users}
    assert names == {name for name, _ in model.named_parameters()}
    for node, name in traced.parameters.items():
        assert tuple(node.meta["val"].shape) == tuple(model.get_parameter(name).shape)
        owner = name.rpartition(".")[0]
        for user in node.users:
            if "layer_norm" not in name and owner != "shared":
                assert traced.places[user][-1] == owner


def test_a_trace_changes_nothing_and_needs_no_memory() -> None:
    model = tiny_model("opt").train()
    real = trace(model, inputs_of("opt", model))
    assert model.training and all(module.training for module in model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    meta = trace(skeleton_of(model), inputs_of("opt", model))
    assert [node.target for node in meta.nodes] == [node.target for node in real.nodes]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_forward_that_looks_at_values_is_refused() -> None:
    with pytest.raises(LayoutError, match="Deciding: the example batch does not run through it on shapes alone"):
        trace(Deciding(), {"input_ids": net_batch()["input_ids"]})
    with pytest.raises(LayoutError, match="Flat has no repeated blocks"):
        analyse(Flat(), {"x": torch.zeros(2, 4)})
