"""Each private or renamed torch API behind `fms_parallel.compat`, against what its public counterpart gives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fms_parallel import compat
from fms_parallel.distributed.launch import run_ranks


def mine() -> torch.Tensor:
    """`[4, 3]`, other numbers on every rank."""
    return torch.arange(12.0).view(4, 3) + 100 * dist.get_rank()


def collective_results() -> dict[str, Any]:
    """Function -> what it gave on this rank."""
    group, gathered, scattered = dist.group.WORLD, torch.empty(8, 3), torch.empty(2, 3)
    begun, sent = torch.empty(8, 3), mine()
    assert group is not None
    compat.all_gather_single(gathered, mine(), group)
    compat.start_all_gather_single(begun, sent, group)()
    compat.reduce_scatter_single(scattered, mine(), group)
    results = {
        "all_gather_single": gathered,
        "start_all_gather_single": begun,
        "reduce_scatter_single": scattered,
        "functional_all_reduce": compat.functional_all_reduce(mine(), group),
        "functional_all_gather": compat.functional_all_gather(mine(), group),
        "functional_reduce_scatter": compat.functional_reduce_scatter(mine(), group),
    }
    results |= {"replicate": replicated_gradient(), "set_fsdp_collectives": gradient_by_own_collectives()}
    results |= {"flatten_mesh, join_meshes": gradient_over_joined_meshes()}
    results |= {"dtensor_like": like_a_shard()}
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


def like_a_shard() -> torch.Tensor:
    """Rows of a DTensor made from plain shards, each rank's its own."""
    parameter = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
    made = compat.dtensor_like(parameter, torch.full((2,), 7.0))
    assert (made.placements, made.shape) == (parameter.placements, parameter.shape)  # type: ignore[attr-defined]
    return made.full_tensor()  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("name", ["all_gather_single", "start_all_gather_single", "functional_all_gather"])
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


def test_dtensor_like_is_cut_as_its_parameter(results: list[dict[str, Any]]) -> None:
    assert all(torch.equal(result["dtensor_like"], torch.tensor([7.0, 7.0, 7.0, 7.0])) for result in results)
    plain = nn.Parameter(torch.ones(2))
    assert compat.dtensor_like(plain, local := torch.zeros(2)) is local


CELLS = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "", "1I0", "1W0", "(1F1;1B1)OVERLAP_F_B"]]


class Half(nn.Module):
    """A stage that multiplies by its weight; the last one returns the sum."""

    def __init__(self, is_last: bool) -> None:
        super().__init__()
        self.weight, self.is_last, self.calls = nn.Parameter(torch.full((3, 3), 0.5)), is_last, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (x @ self.weight).sum() if self.is_last else x @ self.weight


def by_cells() -> tuple[torch.Tensor, float, torch.Tensor]:
    """(this stage's gradient, loss of an evaluation, whether that left it alone) of a schedule given as cells."""
    rank, group = dist.get_rank(), dist.group.WORLD
    x = torch.empty(2, 3, device="meta", requires_grad=True)
    out = torch.empty((), device="meta", requires_grad=True) if rank else x
    module = Half(is_last=rank == 1)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=(x,), output_args=(out,), group=group)
    schedule = compat.schedule_of_cells([stage], 2, lambda loss, _: loss, CELLS)
    whole = BASE.clone().requires_grad_()
    given: Any = {"target": torch.zeros(4), "losses": (losses := [])} if rank else {}
    schedule.step(*(() if rank else (whole,)), return_outputs=False, **given)
    assert module.weight.grad is not None and module.calls == 2
    gradient = module.weight.grad.clone()
    losses.clear() if rank else None
    with torch.no_grad(), compat.forwards_only(schedule):
        kinds = {str(a.computation_type.value) for a in schedule.pipeline_order_with_comms[rank]}
        schedule.eval(*(() if rank else (whole,)), return_outputs=False, **given)
    assert kinds <= {"F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD"} and module.calls == 4
    return gradient, float(sum(losses)) if rank else 0.0, torch.tensor(torch.equal(gradient, module.weight.grad))


def test_a_schedule_of_cells_has_the_gradients_of_one_process() -> None:
    first, second = Half(is_last=False), Half(is_last=True)
    loss = second(first(BASE))
    loss.backward()
    found = run_ranks(by_cells, 2)
    for (gradient, _, untouched), module in zip(found, (first, second), strict=True):
        torch.testing.assert_close(gradient, module.weight.grad)
        assert bool(untouched)
    assert found[1][1] == pytest.approx(loss.item())


def test_schedule_cells_are_those_that_torch_runs() -> None:
    """Each stage on its rank, every micro-batch forward once and backward once."""
    cells = compat.schedule_cells("ZBVZeroBubble", 2, [0, 3], 4, 3)
    words = [sorted(cell for cell in row if cell) for row in cells]
    held = ((0, 3), (1, 2))
    assert words == [sorted(f"{s}{kind}{m}" for s in mine for kind in "FIW" for m in range(3)) for mine in held]


class Wide(nn.Sequential):
    """Of a class of its own: torch.compile passes over the containers of torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.slow
def test_compile_within_keeps_less_the_smaller_the_budget_and_the_same_gradients() -> None:
    kept, gradients = [], []
    for budget in (0.99, 0.3, 0.0):
        torch.manual_seed(0)
        blocks = ((nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.Tanh()) for _ in range(4))
        model = Wide(*(layer for block in blocks for layer in block))
        compat.compile_within([model], budget, backend="aot_eager")
        out = model(torch.ones(64, 32))
        weights = {p.data_ptr() for p in model.parameters()}
        kept.append(sum(t.nbytes for t in out.grad_fn.saved_tensors if t.data_ptr() not in weights))
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        torch._dynamo.reset()
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2] > 0
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def mesh_of_a_job() -> tuple[list[float], int, int, list[bool]]:
    """(timeouts of its groups, how many, how many are left when it is closed, whether gradients wait)."""
    from torch.distributed.distributed_c10d import _world

    before = len(_world.pg_map)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    compat.flatten_mesh(mesh, ("a", "b"))
    groups = compat.mesh_groups(mesh)
    for group in groups:
        compat.set_group_timeout(group, compat.group_timeout())
    timeouts = [compat.group_timeout(group).total_seconds() for group in groups]
    model = fully_shard(nn.Linear(4, 4), mesh=mesh["b"])
    model.set_requires_gradient_sync(False)
    waiting = [compat.has_unreduced_gradients(model)]
    model(torch.ones(2, 4)).sum().backward()
    waiting.append(compat.has_unreduced_gradients(model))
    model.set_requires_gradient_sync(True)
    model(torch.ones(2, 4)).sum().backward()
    waiting.append(compat.has_unreduced_gradients(model))
    compat.close_mesh(mesh)
    return timeouts, len(groups), len(_world.pg_map) - before, waiting


def test_groups_of_a_mesh_have_the_timeout_of_the_job_and_end_with_it() -> None:
    for timeouts, count, left, waiting in run_ranks(mesh_of_a_job, 4, timeout=77):
        assert set(timeouts) == {77.0} and count in (2, 3) and left == 0
        assert waiting == [False, True, False]


def test_a_trace_keeps_composite_operations_and_knows_how_far_it_is() -> None:
    seen: list[Any] = []

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        seen.append(compat.traced_so_far())
        return y.relu()

    assert compat.traced_so_far() is None
    with compat.unreal_tensors():
        graph = compat.trace_operations(run, torch.ones(2, 3), torch.ones(4, 3))
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default", "aten.relu.default"]
    assert str(seen[0].target) == "aten.linear.default"


def test_every_function_is_tested() -> None:
    functions = {
        name for name, f in inspect.getmembers(compat, inspect.isfunction) if f.__module__.startswith(compat.__name__)
    }
    assert functions == {
        *(
            "all_gather_single",
            "start_all_gather_single",
            "reduce_scatter_single",
            "local_shape_and_offset",
            "replicate",
        ),
        *("set_fsdp_collectives", "assert_on_device", "forget_meshes"),
        *("functional_all_reduce", "functional_all_gather", "functional_reduce_scatter"),
        *("dtensor_like", "schedule_of_cells", "schedule_cells", "forwards_only", "compile_within"),
        *("fake_process_group", "unreal_tensors", "intercept", "storage_resizes", "fsdp_took_new_parameters"),
        "group_of_collective",
        *("flatten_tree", "unflatten_tree", "storage_number", "watch_operations", "needs_values"),
        *("set_group_timeout", "group_timeout", "mesh_groups", "close_mesh", "has_unreduced_gradients"),
        *("flatten_mesh", "join_meshes", "has_attention_sums", "attention_sums", "attention_sums_backward"),
        *("trace_operations", "traced_so_far"),
        *("has_prepacked_linear", "prepack_linear", "prepacked_linear", "has_int8_linear", "int8_linear"),
        *(
            "has_compiler",
            "compile_function",
            "compile_over_sizes",
            "compile_traced",
            "trace",
            "stored",
            "split_traced",
        ),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16])
def test_prepacked_linear_is_torch_linear(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 10).to(dtype), torch.randn(7, 10).to(dtype), torch.randn(7).to(dtype)
    if not compat.has_prepacked_linear(weight):
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    packed = compat.prepack_linear(weight, rows)
    for given in (bias, None):
        want = nn.functional.linear(x, weight, given)
        torch.testing.assert_close(compat.prepacked_linear(x, packed, given), want)
    assert not compat.has_prepacked_linear(weight.double()) and not compat.has_prepacked_linear(weight[:0])


def test_int8_linear_is_the_product_of_the_dequantised_matrix() -> None:
    torch.manual_seed(0)
    x, values = torch.randn(3, 32).bfloat16(), torch.randint(-127, 128, (7, 32), dtype=torch.int8)
    scale = torch.rand(7).bfloat16()
    assert compat.has_int8_linear(x, values) and not compat.has_int8_linear(x.float(), values)
    assert not compat.has_int8_linear(x[:, :24], values[:, :24])
    want = nn.functional.linear(x.float(), values.float() * scale.float().unsqueeze(1))
    torch.testing.assert_close(compat.int8_linear(x, values, scale).float(), want, rtol=2**-7, atol=2e-2)


def test_a_compiled_function_is_the_function() -> None:
    if not compat.has_compiler():
        pytest.skip("no C++ compiler on this machine")
    x, weight = torch.randn(3), nn.Parameter(torch.randn(4, 3))
    compiled = compat.compile_function(lambda x, weight: (weight * x).sum(-1), (x, weight.detach()))
    torch.testing.assert_close(compiled(x, weight.detach()), weight.detach() @ x)
    with torch.no_grad():
        weight.mul_(2)  # read at every call
    torch.testing.assert_close(compiled(x, weight.detach()), weight.detach() @ x)


def test_a_compiler_that_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    assert not compat.has_compiler()


# ---- simulation -------------------------------------------------------------------------------------------------


def test_fake_process_group_has_every_rank_and_moves_nothing() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func._schema.name in ("c10d::allreduce_", "_c10d_functional::all_reduce"):
            group = compat.group_of_collective(func, args)
            assert group is not None
            seen.append((func.namespace, tuple(dist.get_process_group_ranks(group))))
        return func(*args, **kwargs)

    with compat.fake_process_group(5, 8), compat.intercept(answer):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("a", "b"))
        x = torch.ones(3)
        dist.all_reduce(x)
        compat.functional_all_reduce(x, mesh["b"].get_group())
        assert (dist.get_rank(), dist.get_world_size(), x.tolist()) == (5, 8, [1, 1, 1])
    assert not dist.is_initialized()
    assert seen == [("c10d", tuple(range(8))), ("_c10d_functional", (4, 5, 6, 7))]


def test_unreal_tensors_have_shapes_and_no_memory() -> None:
    mode = compat.unreal_tensors()
    with mode:
        x = torch.empty(1 << 40, 4)  # 16 TiB
    with mode:
        assert (x[:5] @ torch.empty(4, 7)).shape == (5, 7)
    assert x.device.type == "cpu" and x.untyped_storage().nbytes() == 1 << 44


def test_intercept_answers_for_local_tensors() -> None:
    seen = []

    def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.exp.default:
            seen.append(tuple(args[0].shape))
        return func(*args, **kwargs)

    with compat.fake_process_group(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        x = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None)
        with compat.intercept(answer):
            x.exp()
    assert (2, 3) in seen


def test_storage_resizes_are_told_and_only_inside() -> None:
    told: list[int] = []
    x = torch.ones(4)
    with compat.storage_resizes(lambda storage: told.append(storage.nbytes())):
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(64)
    x.untyped_storage().resize_(16)
    assert told == [0, 64]


def test_fsdp_took_new_parameters_gathers_the_new_ones() -> None:
    with compat.fake_process_group(0, 2):
        module = nn.Linear(4, 4, bias=False)
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        new = compat.dtensor_like(module.weight, torch.full((2, 4), 3.0))
        module.weight = nn.Parameter(new)
        compat.fsdp_took_new_parameters(module)
        compat.fsdp_took_new_parameters(nn.Linear(1, 1))  # is none of FSDP's
        module.unshard()  # type: ignore[operator]
        assert module.weight[:2].tolist() == [[3.0] * 4] * 2  # the fake group brings the other half from nowhere


# ---- what the recording of any model needs ------------------------------------------------------------------------


def test_every_operation_below_autograd_is_seen_with_its_cost() -> None:
    seen: list[tuple[bool, int, int]] = []
    x, weight = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    with compat.watch_operations(lambda writes, given, made, flops: seen.append((writes, len(given), flops))):
        (x @ weight).add_(1)
    assert seen[:2] == [(False, 2, 2 * 2 * 3 * 4), (True, 1, 0)]


def test_tensors_of_one_storage_share_its_number() -> None:
    x = torch.ones(4, 4)
    assert compat.storage_number(x) == compat.storage_number(x.T[1:]) != compat.storage_number(x.clone())


def test_asking_a_tensor_without_memory_for_its_value_is_recognised() -> None:
    with compat.unreal_tensors(), pytest.raises(Exception) as caught:
        bool(torch.ones(2).sum() > 0)
    assert compat.needs_values(caught.value)
    assert not compat.needs_values(ValueError("a shape"))


def test_a_tree_comes_back_from_its_leaves() -> None:
    tree = {"a": (1, [2, None]), "b": 3}
    leaves, structure = compat.flatten_tree(tree)
    assert compat.unflatten_tree(leaves, structure) == tree
