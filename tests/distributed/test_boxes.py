"""Boxes: their arithmetic against index sets, and what a rank holds against the full tensor, for every placement."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fms_parallel import compat
from fms_parallel.distributed.boxes import Box, local_box, local_tensor
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import build_mesh, shard_mesh
from fms_parallel.layout import ParallelLayout

Index = tuple[int, ...]


def points(box: Box) -> set[Index]:
    """Every index inside."""
    return set(product(*(range(o, o + n) for o, n in zip(box.offset, box.size, strict=True))))


BOXES = [Box(offset, size) for offset in product((0, 1, 3), repeat=2) for size in product((0, 1, 2), repeat=2)]


def test_intersection_is_that_of_the_index_sets() -> None:
    for a, b in product(BOXES, BOXES):
        common, expected = a.intersect(b), points(a) & points(b)
        assert (common is None) == (not expected)
        assert common is None or points(common) == expected


def test_slices_numel_and_shift_are_those_of_the_index_sets() -> None:
    full = torch.arange(36).view(6, 6)
    for box in BOXES:
        assert set(full[box.slices].flatten().tolist()) == {6 * i + j for i, j in points(box)}
        assert box.numel == len(points(box))
        assert points(box.shifted((1, 2))) == {(i - 1, j - 2) for i, j in points(box)}
    assert Box.whole((6, 6)).numel == 36 and full[Box.whole((6, 6)).slices].equal(full)
    assert Box.whole(()).numel == 1 and torch.tensor(3.0)[Box.whole(()).slices] == 3


def test_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        Box.whole((2, 2)).intersect(Box.whole((2,)))


def test_a_plain_tensor_is_held_whole() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    assert local_box(parameter) == Box.whole((3, 2))
    local_tensor(parameter).fill_(1)
    assert parameter.eq(1).all() and parameter.grad_fn is None


# ---- DTensors ---------------------------------------------------------------------------------------------------

SHAPES = [(8, 4), (7, 5), (3, 2), (1, 2)]
"""The last ones leave ranks empty. FSDP2 itself loses a parameter of which tp leaves a rank nothing along dim 1."""

PLACEMENTS: list[tuple[Placement, ...]] = list(product((Shard(0), Shard(1), Replicate()), repeat=2))


def numbered(shape: Index) -> Tensor:
    """Every element names its index."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def describe(tensor: Tensor) -> dict[str, Any]:
    """Box and memory of this rank, beside the full tensor."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return {
        "box": local_box(tensor),
        "local": local_tensor(tensor).clone(),
        "full": whole.detach(),
        "placements": str(getattr(tensor, "placements", "plain")),
    }


def distributed_tensors(layout: str) -> dict[Any, dict[str, Any]]:
    """Every placement on (fsdp, tp), and parameters of FSDP2 over tp."""
    mesh = build_mesh(ParallelLayout.parse(layout))
    found = {}
    for shape in SHAPES:
        for placements in PLACEMENTS:
            tensor = distribute_tensor(numbered(shape), mesh["fsdp", "tp"], placements, src_data_rank=None)
            found[shape, placements] = describe(tensor)
        for cut in (Shard(0), Shard(1), Replicate()):
            found[shape, "fully_shard", cut] = describe(fully_sharded(numbered(shape), mesh, cut))
        found[shape, "fully_shard", None] = describe(fully_sharded(numbered(shape), mesh, None))
    found["write"] = written(mesh)
    return found


def fully_sharded(whole: Tensor, mesh: DeviceMesh, cut: Placement | None) -> Tensor:
    """`whole`, cut over tp (or plain when None), as a parameter of FSDP2."""
    module = nn.Module()
    tensor = whole if cut is None else distribute_tensor(whole, mesh["tp"], [cut], src_data_rank=None)
    module.weight = nn.Parameter(tensor)
    fully_shard(module, mesh=shard_mesh(mesh))
    return next(module.parameters())


@pytest.mark.parametrize("rank", range(8))
def test_a_cut_of_an_uneven_cut_is_told_right(rank: int) -> None:
    """49 of 97 rows, cut in four: torch's own book-keeping is a row off."""
    with compat.fake_process_group(rank, 8):
        for layout in ("fsdp=4,tp=2", "fsdp=2,cp=2,tp=2", "fsdp=2,tp=4"):
            mesh = build_mesh(ParallelLayout.parse(layout))
            for shape, cut in product([(97, 8), (23, 4)], [Shard(0), Shard(1)]):
                held = fully_sharded(numbered(shape), mesh, cut)
                assert local_tensor(held).equal(numbered(shape)[local_box(held).slices]), (layout, shape, cut)


def written(mesh: DeviceMesh) -> dict[str, Any]:
    """A parameter after each rank has written its own box through `local_tensor`."""
    parameter = fully_sharded(torch.zeros(7, 5, dtype=torch.float64), mesh, Shard(0))
    local_tensor(parameter).copy_(numbered((7, 5))[local_box(parameter).slices])
    return describe(parameter)


@pytest.fixture(scope="module", params=["fsdp=2,tp=2", "dp=2,fsdp=2"])
def tensors(request: pytest.FixtureRequest) -> list[dict[Any, dict[str, Any]]]:
    """Of each of four ranks."""
    answers: list[dict[Any, dict[str, Any]]] = run_ranks(distributed_tensors, 4, request.param)
    return answers


def test_the_box_is_what_the_rank_holds_of_the_full_tensor(tensors: list[dict[Any, dict[str, Any]]]) -> None:
    for rank in tensors:
        for key, held in rank.items():
            shape = (7, 5) if key == "write" else key[0]
            assert held["full"].equal(numbered(shape)), (key, held["placements"])
            assert held["local"].shape == held["box"].size, key
            assert held["local"].equal(held["full"][held["box"].slices]), (key, held["placements"])


def test_the_boxes_of_all_ranks_cover_the_tensor_evenly(tensors: list[dict[Any, dict[str, Any]]]) -> None:
    """Each element is held by as many ranks as each other: nothing is missing, nothing held by some only."""
    for key in tensors[0]:
        count = torch.zeros((7, 5) if key == "write" else key[0])
        for rank in tensors:
            count[rank[key]["box"].slices] += 1
        assert count.min() == count.max() > 0, key


def test_the_cases_include_strided_shards_and_empty_ones(tensors: list[dict[Any, dict[str, Any]]]) -> None:
    held = [case for rank in tensors for case in rank.values()]
    assert any(0 in case["box"].size for case in held)
    # One of the two layouts has a tp axis for FSDP2 to cut again.
    strided = [case["placements"] for case in held if "_StridedShard" in case["placements"]]
    assert bool(strided) == (tensors[0]["write"]["placements"].count("Replicate") == 0)
