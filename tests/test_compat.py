"""Each private or renamed torch API behind `fms_parallel/compat.py`, against what its public counterpart gives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fms_parallel import compat
from fms_parallel.distributed.launch import run_ranks


def mine() -> torch.Tensor:
    """`[4, 3]`, other numbers on every rank."""
    return torch.arange(12.0).view(4, 3) + 100 * dist.get_rank()


def collective_results() -> dict[str, Any]:
    """Function -> what it gave on this rank."""
    group, gathered, scattered = dist.group.WORLD, torch.empty(8, 3), torch.empty(2, 3)
    assert group is not None
    compat.all_gather_single(gathered, mine(), group)
    compat.reduce_scatter_single(scattered, mine(), group)
    results = {
        "all_gather_single": gathered,
        "reduce_scatter_single": scattered,
        "functional_all_reduce": compat.functional_all_reduce(mine(), group),
        "functional_all_gather": compat.functional_all_gather(mine(), group),
        "functional_reduce_scatter": compat.functional_reduce_scatter(mine(), group),
    }
    results |= {"replicate": replicated_gradient(), "set_fsdp_collectives": gradient_by_own_collectives()}
    results |= {"flatten_mesh, join_meshes": gradient_over_joined_meshes()}
    return {name: tensor.tolist() for name, tensor in results.items()} | {"local_shape_and_offset": pieces()}


def pieces() -> list[tuple[Any, ...]]:
    """(shape, values) agree with the DTensor: even, uneven, empty and whole pieces."""
    mesh = init_device_mesh("cpu", (2,))
    found: list[tuple[Any, ...]] = []
    for rows, placement in ((4, Shard(0)), (3, Shard(0)), (1, Shard(0)), (4, Shard(1)), (4, Replicate())):
        full = torch.arange(rows * 5.0).view(rows, 5)
        local = distribute_tensor(full, mesh, [placement], src_data_rank=None).to_local()
        shape, offset = compat.local_shape_and_offset(full.shape, mesh, (placement,))
        held = full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        found.append((tuple(local.shape) == shape, torch.equal(local, held)))
    return found


def replicated_gradient() -> torch.Tensor:
    """Gradient of `sum(model(x_rank))`, averaged over two ranks."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    compat.replicate(model, init_device_mesh("cpu", (2,)))
    assert isinstance(model, FSDPModule)
    model(mine()).sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad.full_tensor()  # type: ignore[attr-defined]


def gradient_by_own_collectives() -> torch.Tensor:
    """The same of an FSDP2 module whose parameters are collected and gradients summed by functions of ours."""
    calls = []

    def gather_by_all_reduce(out: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> None:
        calls.append("gather")
        own = shard.clone()  # FSDP2 may pass the place in `out` where it belongs
        out.zero_().chunk(dist.get_world_size(group))[dist.get_rank(group)].copy_(own)
        dist.all_reduce(out, group=group)

    def sum_by_all_reduce(out: torch.Tensor, full: torch.Tensor, group: dist.ProcessGroup) -> None:
        calls.append("sum")
        dist.all_reduce(full, group=group)
        out.copy_(full.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    model = nn.Linear(3, 1, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    compat.set_fsdp_collectives(model, gather_by_all_reduce, sum_by_all_reduce)
    model(mine()).sum().backward()
    assert calls == ["gather", "sum"] and model.weight.grad is not None
    return model.weight.grad.full_tensor()  # type: ignore[attr-defined]


def gradient_over_joined_meshes() -> torch.Tensor:
    """The same again, of a DTensor cut over dimensions that were made one and joined to another."""
    mesh = init_device_mesh("cpu", (1, 1, 2, 1), mesh_dim_names=("a", "b", "c", "d"))
    flat = compat.flatten_mesh(mesh, ("b", "c"))
    joined = compat.join_meshes([mesh["a"], flat])
    assert flat is compat.flatten_mesh(mesh, ("b", "c"))
    assert (flat.shape, joined.shape, joined.mesh_dim_names) == ((2,), (1, 2), ("a", "b_c"))
    model = nn.Linear(3, 1, bias=False)
    fully_shard(model, mesh=joined)
    model(mine()).sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad.full_tensor()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Of two ranks, which start once for all tests of this file."""
    return [
        {name: found if name == "local_shape_and_offset" else torch.tensor(found) for name, found in result.items()}
        for result in run_ranks(collective_results, 2)
    ]


BASE = torch.arange(12.0).view(4, 3)
BOTH = torch.cat([BASE, BASE + 100])
SUM = 2 * BASE + 100


@pytest.mark.parametrize("name", ["all_gather_single", "functional_all_gather"])
def test_gather_concatenates_along_dim_0(name: str, results: list[dict[str, Any]]) -> None:
    assert all(torch.equal(result[name], BOTH) for result in results)


@pytest.mark.parametrize("name", ["reduce_scatter_single", "functional_reduce_scatter"])
def test_reduce_scatter_keeps_this_ranks_rows_of_the_sum(name: str, results: list[dict[str, Any]]) -> None:
    assert torch.equal(torch.cat([result[name] for result in results]), SUM)


def test_functional_all_reduce_sums(results: list[dict[str, Any]]) -> None:
    assert all(torch.equal(result["functional_all_reduce"], SUM) for result in results)


def test_local_shape_and_offset_name_what_a_dtensor_holds(results: list[dict[str, Any]]) -> None:
    assert all(result["local_shape_and_offset"] == [(True, True)] * 5 for result in results)


@pytest.mark.parametrize("name", ["replicate", "set_fsdp_collectives", "flatten_mesh, join_meshes"])
def test_gradients_are_averaged(name: str, results: list[dict[str, Any]]) -> None:
    want = BOTH.sum(0, keepdim=True) / 2
    assert all(torch.equal(result[name], want) for result in results)


def test_every_function_is_tested() -> None:
    functions = {name for name, f in inspect.getmembers(compat, inspect.isfunction) if f.__module__ == compat.__name__}
    assert functions == {
        *("all_gather_single", "reduce_scatter_single", "local_shape_and_offset", "replicate"),
        *("set_fsdp_collectives", "assert_on_device"),
        *("functional_all_reduce", "functional_all_gather", "functional_reduce_scatter"),
        *("flatten_mesh", "join_meshes", "has_attention_sums", "attention_sums", "attention_sums_backward"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_its_sums_equals_attention_written_out(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    assert compat.has_attention_sums(q)
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if causal:
        s = s.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    want = s.softmax(-1) @ v.repeat_interleave(2, 1)
    want.backward(upper := torch.randn_like(want))
    with torch.no_grad():
        out, sums = compat.attention_sums(q, k, v, causal, 0.3)
        gradients = compat.attention_sums_backward(upper, q, k, v, out, sums, causal, 0.3)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(sums, s.logsumexp(-1))
    torch.testing.assert_close(gradients, tuple(x.grad for x in (q, k, v)))


def test_no_fused_sums_where_torch_has_none() -> None:
    assert not compat.has_attention_sums(torch.empty(1, 1, 1, 8, dtype=torch.float16))


def test_assert_on_device_fails_on_false_only() -> None:
    compat.assert_on_device(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="said"):
        compat.assert_on_device(torch.tensor(False), "said")
