"""What a recording finds: blocks, what crosses them, costs; and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.auto.blocks import Carried, find_blocks
from fms_parallel.auto.families import FAMILIES, tiny_batch, tiny_model
from fms_parallel.auto.record import record
from fms_parallel.auto.source import skeleton_of
from fms_parallel.auto.stage import constant_inputs
from fms_parallel.auto.tasks import get_task
from fms_parallel.errors import LayoutError
from tests.auto.plain import Deciding, Flat, Net, Twice, net_batch

BLOCKS = {
    "gpt2": "transformer.h.{}",
    "bert": "bert.encoder.layer.{}",
    "llama": "model.layers.{}",
    "vit": "vit.layers.{}",
}


def recorded(name: str, **fields: Any) -> Any:
    pytest.importorskip("transformers")
    model = skeleton_of(tiny_model(name, **fields))
    task = get_task(model, None)
    inputs = task.inputs(task.prepare(tiny_batch(name), model.config))
    return record(model, {**inputs, **constant_inputs(model)}, find_blocks(model), wanted=task.wanted)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_layers(name: str) -> None:
    pytest.importorskip("transformers")
    assert find_blocks(tiny_model(name)) == [BLOCKS[name].format(number) for number in range(4)]


def test_an_encoder_decoder_has_two_lists() -> None:
    pytest.importorskip("transformers")
    names = find_blocks(tiny_model("t5"))
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind in ("text", "picture")])
def test_one_tensor_crosses_each_cut_of_a_decoder_or_encoder(name: str) -> None:
    found = recorded(name, **({"output_router_logits": False} if name == "mixtral" else {}))
    for number, call in enumerate(found.blocks[1:]):
        assert {item for item in call.reads if isinstance(item, Carried)} == {Carried(number, "", 0)}


def test_routers_are_read_behind_the_blocks_back() -> None:
    found = recorded("mixtral")
    assert {Carried(number, "mlp.gate", 0) for number in range(4)} < found.final_reads


def test_encoder_states_and_position_biases_are_followed() -> None:
    found = recorded("t5")
    carried = {item for item in found.blocks[3].reads if isinstance(item, Carried)}
    assert carried == {Carried(1, "", 0), Carried(2, "", 0), Carried(2, "", 1), Carried(2, "", 2)}
    assert "encoder.final_layer_norm.weight" in found.blocks[2].reads


def test_costs_are_those_of_matrix_products() -> None:
    """Two products of 4 rows x 5 places x 8 x 16 in a block, one of 4 x 8 x 3 for the head."""
    found = record(Net(), {"input_ids": net_batch()["input_ids"]}, find_blocks(Net()))
    assert [call.flops for call in found.blocks] == [2 * 2 * 4 * 5 * 8 * 16] * 4
    assert found.gap_flops == [0, 0, 0, 0, 2 * 4 * 8 * 3]


def test_forty_eight_layers_are_recorded_as_four_are() -> None:
    few, many = recorded("llama"), recorded("llama", num_hidden_layers=48)
    assert len(many.blocks) == 48
    assert {call.flops for call in many.blocks} == {few.blocks[0].flops}
    assert many.blocks[47].reads == {Carried(46, "", 0)}


def test_nothing_of_the_model_is_left_changed() -> None:
    model, batch = Net(), net_batch()
    before = model(batch["input_ids"])
    record(model, {"input_ids": batch["input_ids"]}, find_blocks(model))
    assert torch.equal(model(batch["input_ids"]), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


class Sneaky(Net):
    """Keeps what a block made inside, and reads it later."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, scale = self.embed(input_ids), self.table
        for block in self.blocks:
            x, scale = block(x, scale)
        return self.head((x + self.blocks[0].kept).mean(1))  # type: ignore[operator]


def sneaky() -> nn.Module:
    model = Sneaky()
    block = model.blocks[0]
    whole = block.forward

    def forward(x: Tensor, scale: Tensor) -> Any:
        block.kept = x * 2  # type: ignore[assignment]
        return whole(x, scale)

    block.forward = forward  # type: ignore[method-assign, assignment]
    return model


class Adding(Net):
    """Its blocks write into a tensor of the model's."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x, scale = self.embed(input_ids), self.table
        total = torch.zeros_like(x)
        for block in self.blocks:
            block.total = total  # type: ignore[assignment]
            x, scale = block(x, scale)
        return self.head((x + total).mean(1))


def adding() -> nn.Module:
    model = Adding()
    for block in model.blocks:
        whole = block.forward
        block.forward = partial(_add_and_run, block, whole)  # type: ignore[method-assign, assignment]
    return model


def _add_and_run(block: Any, whole: Any, x: Tensor, scale: Tensor) -> Any:
    block.total.add_(x)
    return whole(x, scale)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (adding, r"from inside block blocks\.0 is used outside of it"),
        (Deciding, r"Deciding looks at the values of tensors"),
        (Twice, r"block blocks\.0 runs twice"),
        (sneaky, r"from inside block blocks\.0 is used outside of it, and no module returned it"),
    ],
)
def test_what_cannot_be_cut_is_named(model: Any, words: str) -> None:
    made = model()
    with pytest.raises(LayoutError, match=words):
        record(made, {"input_ids": net_batch()["input_ids"]}, find_blocks(made))


def test_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"Flat has no repeated blocks: pp cuts between the children of an nn\.ModuleList"
    ):
        find_blocks(Flat())


def test_a_sequential_of_equal_layers_is_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))) == ["0", "1", "2"]
