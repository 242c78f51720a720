"""The mesh of a layout: which ranks are neighbours on which axis, and who reads which rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import build_mesh, context_axis, data_shard, replica_mesh, shard_mesh, tp_axis
from fms_parallel.errors import LayoutError
from fms_parallel.layout import AXES, ParallelLayout

LAYOUTS = {
    "pp=2,tp=2": {"pp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]},
    "fsdp=2,tp=2": {"fsdp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]},
    "dp=2,fsdp=2": {"dp": [[0, 2], [1, 3]], "fsdp": [[0, 1], [2, 3]]},
    "dp=2,cp=2": {"dp": [[0, 2], [1, 3]], "cp": [[0, 1], [2, 3]]},
    "fsdp=2,cp=2": {"fsdp": [[0, 2], [1, 3]], "cp": [[0, 1], [2, 3]]},
    "cp=2,tp=2": {"cp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]},
    "dp,tp=2": {"dp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]},
    "tp": {"tp": [[0, 1, 2, 3]]},
}
"""On four ranks: axis -> the lines of ranks along it. Every other axis has lines of one rank."""

ALONE = [[0], [1], [2], [3]]


def describe(layouts: list[str]) -> dict[str, dict[str, Any]]:
    """What this rank sees of each mesh."""
    found = {}
    for layout in layouts:
        mesh = build_mesh(ParallelLayout.parse(layout))
        axis = tp_axis(mesh)
        found[layout] = {
            "names": mesh.mesh_dim_names,
            "lines": {name: mesh[name].mesh.tolist() for name in AXES},
            "groups": {name: dist.get_process_group_ranks(mesh[name].get_group()) for name in AXES},
            "tp": (dist.get_process_group_ranks(axis.group), axis.rank, axis.size, axis.backend),
            "shard": (shard_mesh(mesh).mesh_dim_names, shard_mesh(mesh).mesh.tolist()),
            "replicas": replica_mesh(mesh).mesh.tolist(),
            "context": (context_axis(mesh).rank, context_axis(mesh).size),
            "data": data_shard(mesh),
        }
    return found


def build_too_large(layout: str) -> str:
    with pytest.raises(LayoutError) as caught:
        build_mesh(ParallelLayout.parse(layout))
    return str(caught.value)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """Of each of four ranks."""
    answers: list[dict[str, dict[str, Any]]] = run_ranks(describe, 4, list(LAYOUTS))
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_along_every_axis_are_those_of_the_grid(ranks: list[dict[str, dict[str, Any]]], layout: str) -> None:
    for axis in AXES:
        lines = LAYOUTS[layout].get(axis, ALONE)
        for rank, seen in enumerate(ranks):
            mine = next(line for line in lines if rank in line)
            assert seen[layout]["lines"][axis] == seen[layout]["groups"][axis] == mine


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mesh_has_all_five_dimensions(ranks: list[dict[str, dict[str, Any]]], layout: str) -> None:
    assert all(seen[layout]["names"] == AXES for seen in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tp_axis_is_the_line_of_ranks_that_share_matrices(
    ranks: list[dict[str, dict[str, Any]]], layout: str
) -> None:
    for rank, seen in enumerate(ranks):
        line = next(line for line in LAYOUTS[layout].get("tp", ALONE) if rank in line)
        assert seen[layout]["tp"] == (line, line.index(rank), len(line), "gloo")


def test_parameters_are_sharded_over_fsdp_and_copied_over_dp(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank, seen in enumerate(ranks):
        assert seen["fsdp=2,tp=2"]["shard"] == (("fsdp",), [rank % 2, rank % 2 + 2])
        assert seen["dp=2,fsdp=2"]["shard"] == (("dp", "fsdp"), [[0, 1], [2, 3]])


def test_ranks_that_share_sequences_hold_shards_as_those_with_other_rows(
    ranks: list[dict[str, dict[str, Any]]],
) -> None:
    for rank, seen in enumerate(ranks):
        assert seen["fsdp=2,cp=2"]["shard"] == (("fsdp_cp",), [0, 1, 2, 3])
        assert seen["dp=2,cp=2"]["shard"] == (("dp", "fsdp_cp"), [[0, 1], [2, 3]])
        assert seen["dp=2,cp=2"]["replicas"] == [0, 1, 2, 3]
        assert seen["cp=2,tp=2"]["replicas"] == [rank % 2, rank % 2 + 2]
        assert seen["dp,tp=2"]["replicas"] == [rank % 2, rank % 2 + 2]
        assert seen["cp=2,tp=2"]["context"] == (rank // 2, 2)


@pytest.mark.parametrize(
    ("layout", "shards"),
    [
        ("pp=2,tp=2", [(0, 1)] * 4),
        ("fsdp=2,tp=2", [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("dp=2,fsdp=2", [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("dp=2,cp=2", [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_ranks_that_differ_in_dp_or_fsdp_read_different_rows(
    ranks: list[dict[str, dict[str, Any]]], layout: str, shards: list[tuple[int, int]]
) -> None:
    assert [seen[layout]["data"] for seen in ranks] == shards


def test_without_a_mesh_one_process_reads_all_rows() -> None:
    assert data_shard(None) == (0, 1)


def test_a_layout_of_another_size_is_refused_on_every_rank() -> None:
    for message in run_ranks(build_too_large, 2, "tp=4"):
        assert "needs 4 ranks (tp=4) but the job has 2" in message
