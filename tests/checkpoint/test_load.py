"""Weights into a model of one process. Oracle: the tensors that were given, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fms_parallel.checkpoint.lazy import LazyTensor, MemoryTensor
from fms_parallel.checkpoint.load import load_weights
from fms_parallel.checkpoint.slots import slots_of
from fms_parallel.distributed.boxes import Box
from fms_parallel.errors import CheckpointError
from tests.checkpoint.llamas import TIED, TINY, build


class Unread(LazyTensor):
    """Nobody may read it."""

    def _read(self, box: Box) -> Tensor:
        raise AssertionError("read before everything was checked")


def tensors_of(model: nn.Module) -> dict[str, LazyTensor]:
    return {name: MemoryTensor(tensor) for name, tensor in model.state_dict().items()}


def test_every_tensor_is_the_one_that_was_given() -> None:
    source, model = build(TINY), build(TINY, seed=1)
    load_weights(model, tensors_of(source), source="file")
    for (name, expected), found in zip(source.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_buffers_are_loaded_and_values_take_the_models_dtype() -> None:
    model = nn.BatchNorm1d(3).double()
    given = {name: torch.full_like(tensor, 0.1) for name, tensor in nn.BatchNorm1d(3).state_dict().items()}
    given["num_batches_tracked"] = torch.tensor(7, dtype=torch.int32)
    load_weights(model, {name: MemoryTensor(tensor) for name, tensor in given.items()}, source="file")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[name].to(tensor.dtype)), name


def test_everything_that_does_not_fit_is_in_one_message_before_a_byte_is_read() -> None:
    model = build(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors: dict[str, LazyTensor] = {name: Unread(t.shape, t.dtype) for name, t in before.items()}
    del tensors["norm.weight"], tensors["layers.1.attention.out.weight"]
    tensors["head.weight"] = Unread((60, 24), torch.float32)
    tensors["embedding.weight"] = Unread((61, 24), torch.int64)
    tensors["rope"] = Unread((3,), torch.float32)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tensors, source="some/file")
    message = str(caught.value)
    assert message.startswith("some/file does not fit the model: ")
    assert "missing (2): layers.1.attention.out.weight, norm.weight" in message
    assert "extra (1): rope" in message
    assert "head.weight ([60, 24], the model has [61, 24])" in message
    assert "embedding.weight (torch.int64, the model has torch.float32)" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_long_lists_of_keys_are_counted() -> None:
    with pytest.raises(CheckpointError, match=r"missing \(21\): embedding.weight, .* and 11 more"):
        load_weights(build(TINY), {}, source="file")


# ---- ties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["embedding.weight", "head.weight", None])
def test_one_of_two_tied_names_is_enough(absent: str | None) -> None:
    source, model = build(TIED), build(TIED, seed=1)
    tensors = tensors_of(source)
    tensors.pop(absent or "", None)
    load_weights(model, tensors, source="file")
    head = model.get_parameter("head.weight")
    assert head is model.get_parameter("embedding.weight")
    assert torch.equal(head, source.get_parameter("head.weight"))


def test_tied_names_with_different_contents_are_refused() -> None:
    tensors = tensors_of(build(TINY))  # not tied: two tensors
    with pytest.raises(
        CheckpointError, match=r"file: embedding.weight = head.weight: tied weights are in the file twice"
    ):
        load_weights(build(TIED), tensors, source="file")


def test_ties_of_a_file_are_not_those_of_an_untied_model() -> None:
    tensors = tensors_of(build(TIED))
    del tensors["head.weight"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): head.weight"):
        load_weights(build(TINY), tensors, source="file")


# ---- slots ------------------------------------------------------------------------------------------------------


def test_slots_are_every_tensor_once_under_all_its_names() -> None:
    names = [slot.names for slot in slots_of(build(TIED))]
    assert names[0] == ("embedding.weight", "head.weight")
    assert [name for slot in names for name in slot if name != "head.weight"] == [
        name for name, _ in build(TIED).named_parameters()
    ]


def test_model_without_memory_is_refused() -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(CheckpointError, match="2 tensors are on the meta device and hold no memory, weight first"):
        load_weights(model, {}, source="file")
