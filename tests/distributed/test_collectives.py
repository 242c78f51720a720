"""Each collective against torch on all ranks' tensors, and each gradient against the adjoint of the forward map.

The adjoint of a linear map A is the A* with <A x, y> = <x, A* y> for every x and y. Here x and y are spread over
ranks; what every rank holds alike counts once. All cases of one world size run in one job.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fms_parallel.distributed import collectives as c
from fms_parallel.distributed.collectives import Axis
from fms_parallel.distributed.launch import run_ranks
from fms_parallel.distributed.mesh import build_mesh, tp_axis
from fms_parallel.layout import ParallelLayout

WORLDS = (1, 2, 3)
LENGTHS = (0, 1, 2, 5, 6, 7)
"""Tokens, or features of a last dimension: with 3 ranks 1 and 2 leave ranks empty, 4 + x leaves a short last one."""

Pieces = list[Tensor]
"""One tensor of each rank, in rank order."""


def draw(rank: int, shape: tuple[int, ...], use: int) -> Tensor:
    """Numbers that every rank can draw for every other."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * sum(shape) + use)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def step(length: int, world: int) -> int:
    return -(-length // world)


def padded(whole: Tensor, world: int) -> Tensor:
    missing = step(len(whole), world) * world - len(whole)
    return torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])


def cut(whole: Tensor, world: int) -> Pieces:
    """Runs of tokens, the last ones padded with zero rows."""
    return list(padded(whole, world).view(world, -1, *whole.shape[1:]))


def chunks(whole: Tensor, world: int) -> Pieces:
    """Chunks of the last dimension as torch cuts them, an empty one for each rank that is left over."""
    found = list(whole.split(step(whole.shape[-1], world) or 1, -1))
    return found + [whole[..., :0]] * (world - len(found))


class Case(NamedTuple):
    """A collective with an adjoint.

    Attributes:
        inputs: (world, length) -> what each rank gives. expected: inputs -> what each rank gets.
        call: (this rank's input, axis, length) -> what it gets.
        same_input, same_output: all ranks hold the same, so inner products count it once.
    """

    inputs: Callable[[int, int], Pieces]
    expected: Callable[[Pieces, int], Pieces]
    call: Callable[[Tensor, Axis, int], Tensor]
    same_input: bool = False
    same_output: bool = False


CASES = {
    "copy_in": Case(
        lambda world, n: [draw(0, (n, 3), 1)] * world,
        lambda x, n: x,
        lambda x, axis, n: c.copy_in(x, axis),
        same_input=True,
    ),
    "reduce_out": Case(
        lambda world, n: [draw(rank, (n, 3), 1) for rank in range(world)],
        lambda x, n: [torch.stack(x).sum(0)] * len(x),
        lambda x, axis, n: c.reduce_out(x * 1.0, axis),
        same_output=True,
    ),
    "reduce_out of a view": Case(
        lambda world, n: [draw(rank, (3, n), 1) for rank in range(world)],
        lambda x, n: [torch.stack(x).sum(0).t()] * len(x),
        lambda x, axis, n: c.reduce_out(x.t(), axis),
        same_output=True,
    ),
    "gather_tokens": Case(
        lambda world, n: cut(draw(0, (n, 3), 1), world),
        lambda x, n: [torch.cat(x)[:n]] * len(x),
        lambda x, axis, n: c.gather_tokens(x, axis, n),
    ),
    "scatter_tokens": Case(
        lambda world, n: [draw(rank, (n, 3), 1) for rank in range(world)],
        lambda x, n: cut(torch.stack(x).sum(0), len(x)),
        lambda x, axis, n: c.scatter_tokens(x, axis),
    ),
    "gather_last": Case(
        lambda world, n: chunks(draw(0, (2, 3, n), 1), world),
        lambda x, n: [torch.cat(x, -1)] * len(x),
        lambda x, axis, n: c.gather_last(x, axis, n),
        same_output=True,
    ),
}


def run_case(case: Case, axis: Axis, length: int) -> dict[str, Any]:
    """Forward and backward of one case on this rank."""
    x = case.inputs(axis.size, length)[axis.rank].clone().requires_grad_()
    before = x.detach().clone()
    y = case.call(x, axis, length)
    weight = draw(0 if case.same_output else axis.rank, tuple(y.shape), 2)
    given = weight.clone()
    (gradient,) = torch.autograd.grad(y, x, given, retain_graph=True)
    gradient = gradient.clone()  # it may be `given` itself
    (again,) = torch.autograd.grad(y, x, given)
    assert x.detach().equal(before), "the input was changed"
    assert given.equal(weight), "the gradient that came in was changed: another branch may need it"
    return {"y": y.detach(), "weight": weight, "x": before, "gradient": gradient, "again": again}


def run_plain(axis: Axis, length: int) -> dict[str, Tensor]:
    """The collectives without adjoints on this rank; `x` is `[size * length, 3]`."""
    x = draw(axis.rank, (axis.size * length, 3), 3)
    return {
        "x": x.clone(),
        "all_gather": c.all_gather(x, axis),
        "all_gather of a view": c.all_gather(x.t(), axis),
        "reduce_scatter": c.reduce_scatter(x, axis),
        "reduce_scatter of a view": c.reduce_scatter(x.t().contiguous().t(), axis),
        "native reduce_scatter": native_reduce_scatter(x, axis),
        "untouched": x.clone(),
        "all_reduce of a view": c.all_reduce(x.clone().t(), axis),
        "all_reduce": c.all_reduce(x, axis),
        "in place": x,
    }


def native_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """What other backends than gloo do."""
    return c.reduce_scatter(x, Axis(axis.group, axis.size, axis.rank, "another"))


def run_everything() -> tuple[dict[Any, Any], dict[int, Any]]:
    axis = tp_axis(build_mesh(ParallelLayout(tp=dist.get_world_size())))
    cases = {(name, length): run_case(case, axis, length) for name, case in CASES.items() for length in LENGTHS}
    return cases, {length: run_plain(axis, length) for length in LENGTHS}


@cache
def results(world: int) -> list[tuple[dict[Any, Any], dict[int, Any]]]:
    """Of each rank."""
    return run_ranks(run_everything, world)


def of_ranks(world: int, name: str, length: int) -> dict[str, Pieces]:
    """Each tensor of one case, of every rank."""
    answers = [cases[name, length] for cases, _ in results(world)]
    return {key: [answer[key] for answer in answers] for key in answers[0]}


def inner(a: Pieces, b: Pieces, same: bool) -> Tensor:
    """<a, b> over all ranks; `same` pieces count once."""
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)][: 1 if same else None]).sum()


everywhere = pytest.mark.parametrize("world", WORLDS)
each_case = pytest.mark.parametrize("name", CASES)


@everywhere
@each_case
def test_forward_is_torchs_on_all_tensors(world: int, name: str) -> None:
    for length in LENGTHS:
        found = of_ranks(world, name, length)
        expected = CASES[name].expected(CASES[name].inputs(world, length), length)
        torch.testing.assert_close(found["y"], expected, rtol=1e-14, atol=1e-14)


@everywhere
@each_case
def test_gradient_is_the_adjoint_of_the_forward_map(world: int, name: str) -> None:
    case = CASES[name]
    for length in LENGTHS:
        found = of_ranks(world, name, length)
        forward = inner(found["y"], found["weight"], case.same_output)
        backward = inner(found["x"], found["gradient"], case.same_input)
        torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)
        assert case.same_input is False or all(g.equal(found["gradient"][0]) for g in found["gradient"])


@everywhere
@each_case
def test_a_second_backward_gives_the_same(world: int, name: str) -> None:
    """The first one must not have summed in memory that the graph, or the caller, still needs."""
    for length in LENGTHS:
        found = of_ranks(world, name, length)
        torch.testing.assert_close(found["again"], found["gradient"], rtol=0, atol=0)


@everywhere
def test_padding_rows_get_no_gradient(world: int) -> None:
    for length in LENGTHS:
        gradient = torch.cat(of_ranks(world, "gather_tokens", length)["gradient"])
        assert gradient[length:].eq(0).all()


@everywhere
def test_plain_collectives_are_torchs_on_all_tensors(world: int) -> None:
    for length in LENGTHS:
        pieces = [draw(rank, (world * length, 3), 3) for rank in range(world)]
        total, together = torch.stack(pieces).sum(0), torch.cat(pieces)
        for rank, (_, plain) in enumerate(results(world)):
            mine = total[rank * length : (rank + 1) * length]
            expected = {
                "x": pieces[rank],
                "untouched": pieces[rank],
                "all_gather": together,
                "all_gather of a view": torch.cat([piece.t() for piece in pieces]),
                "reduce_scatter": mine,
                "reduce_scatter of a view": mine,
                "native reduce_scatter": mine,
                "all_reduce": total,
                "all_reduce of a view": total.t(),
                "in place": total,
            }
            torch.testing.assert_close(plain[length], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_chunk_is_that_of_torch(size: int) -> None:
    for length in range(13):
        whole = torch.arange(length)
        for rank, expected in enumerate(chunks(whole, size)):
            start, stop = Axis(None, size, rank, "gloo").chunk(length)  # type: ignore[arg-type]
            assert whole[start:stop].equal(expected)
