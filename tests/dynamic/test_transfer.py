"""Fingerprints, and a transfer within one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fms_parallel.distributed.boxes import Box
from fms_parallel.dynamic.inventory import Entry, Inventory
from fms_parallel.dynamic.plan import plan_transfer
from fms_parallel.dynamic.transfer import LANES, carry_out, fingerprint
from fms_parallel.errors import LayoutError


@pytest.mark.parametrize("count", [0, 1, 7, LANES * 2, LANES * 2 + 3, 3 * LANES + 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
def test_a_fingerprint_tells_every_single_change(count: int, dtype: torch.dtype) -> None:
    tensor = (torch.arange(count) % 101).to(dtype)
    whole = fingerprint(tensor)
    assert whole == fingerprint(tensor.clone())
    for place in {0, 1, count // 2, count - 1} & set(range(count)):
        changed = tensor.clone()
        changed[place] += 1
        assert fingerprint(changed) != whole
    if count > 3:
        swapped = tensor.clone()
        swapped[[1, 2]] = tensor[[2, 1]]
        assert fingerprint(swapped) != whole


def test_a_fingerprint_is_of_the_elements_not_of_their_place_in_memory() -> None:
    tensor = torch.randn(9, 5)
    assert fingerprint(tensor[1:, 1:3]) == fingerprint(tensor[1:, 1:3].clone())
    assert fingerprint(tensor[1:]) == fingerprint(tensor[1:].clone())  # begins at an odd word


def entry(full: Tensor, boxes: tuple[Box, ...], filled: bool) -> Entry:
    memory = tuple((full[b.slices].clone() if filled else torch.full(b.size, torch.nan),) for b in boxes)
    return Entry(tuple(full.shape), (("model/w", full.dtype),), boxes, memory)


def test_within_one_process_boxes_are_copied() -> None:
    full = torch.randn(6, 4)
    here = Inventory({"w": entry(full, (Box((0, 0), (2, 4)), Box((2, 0), (4, 4))), filled=True)})
    there = Inventory({"w": entry(full, (Box((0, 0), (6, 1)), Box((0, 1), (6, 3))), filled=False)})
    plan = plan_transfer({"w": here["w"].item}, [here.table], [there.table])
    tally = carry_out(plan, here, there, round_bytes=64)
    assert tally.sent == 0 and not tally.wrong
    for box, (found,) in zip(there["w"].boxes, there["w"].memory, strict=True):
        assert torch.equal(found, full[box.slices])


def test_optimizer_state_that_is_cut_otherwise_is_refused() -> None:
    tensors = {"model/w": torch.zeros(4, 4), "optimizer/row/w": torch.zeros(4)}
    with pytest.raises(LayoutError, match=r"'row' of w has shape .* means nothing in another layout"):
        Inventory.of(tensors)


def test_numbers_of_the_optimizer_travel_beside_their_parameter() -> None:
    tensors = {
        "model/w": torch.zeros(4, 4),
        "optimizer/exp_avg/w": torch.zeros(4, 4),
        "optimizer/step/w": torch.ones(()),
    }
    inventory = Inventory.of(tensors)
    assert sorted(inventory) == ["w", "w (step)"]
    assert inventory["w"].item.width == 8 and inventory.nbytes == 16 * 8 + 4
