"""Collectives with their adjoints: the only places where a tensor-parallel forward or backward talks to other ranks.

It knows one axis of ranks and plain local tensors; it knows no modules and no DTensor.

    forward            backward          where
    copy_in            all-reduce        before a column-parallel matrix, without sp
    reduce_out         identity          after a row-parallel matrix, without sp
    gather_tokens      reduce-scatter    before a column-parallel matrix, with sp (see also `TokenRun`)
    scatter_tokens     all-gather        after a row-parallel matrix, with sp
    gather_last        slice             logits made whole for a caller who wants them
    exchange           exchange          positions for heads, when ranks share a sequence

With sp a rank holds a run of *tokens*: B and S are flattened to T = B * S first, so that every collective works on
dim 0 without a transposed copy and any batch with any sequence length can be cut. The last rank's run is padded with
zero rows; gathering drops them.

    T = 7, tp = 2:   rank 0 [t0 t1 t2 t3]   rank 1 [t4 t5 t6 --]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fms_parallel import compat
from fms_parallel.distributed import direct


@dataclass(frozen=True)
class Axis:
    """One line of ranks that talk to each other: a mesh dimension as seen from this rank."""

    group: dist.ProcessGroup
    size: int
    rank: int
    backend: str
    own_means: Means | None = None
    """How they talk where not as the backend does best."""

    @property
    def means(self) -> Means:
        """How they talk."""
        return self.own_means or MEANS.get(self.backend, NATIVE)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Axis:
        """The axis of a one-dimensional mesh."""
        group = mesh.get_group()
        return cls(group, mesh.size(), mesh.get_local_rank(), dist.get_backend(group))

    def chunk(self, length: int) -> tuple[int, int]:
        """(start, stop) of this rank's chunk of `length`, as `torch.chunk` and DTensor's `Shard` cut it."""
        step = -(-length // self.size)
        return min(self.rank * step, length), min((self.rank + 1) * step, length)


# ---- the plain collectives --------------------------------------------------------------------------------------


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis. Eager: in place, so `x` must be the caller's own; returns the sum either way."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        return compat.functional_all_reduce(x, axis.group)
    x = x.contiguous()
    axis.means.all_reduce(x, axis.group)
    return x


def summed(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; `x` stays as it is."""
    if axis.size == 1:
        return x.view_as(x)
    if torch.compiler.is_compiling():
        return compat.functional_all_reduce(x, axis.group)
    if axis.means.summed is not None:
        return axis.means.summed(x.contiguous(), axis.group)
    return all_reduce(x.clone(), axis)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """`[n, ...]` on every rank -> `[size * n, ...]`, in rank order."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        return compat.functional_all_gather(x.contiguous(), axis.group)
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    axis.means.all_gather(out, x.contiguous(), axis.group)
    return out


def start_all_gather(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """`all_gather` begun, for eager code: the result waits for it and returns it. Nobody may write to `x` before."""
    if axis.size == 1:
        return lambda: x
    x = x.contiguous()
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    arrived = axis.means.start_all_gather(out, x, axis.group)

    def wait(sent: Tensor = x) -> Tensor:  # kept until it has left
        arrived()
        return out

    return wait


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """`[size * n, ...]` summed over the axis -> this rank's `[n, ...]`."""
    if axis.size == 1:
        return x
    if torch.compiler.is_compiling():
        return compat.functional_reduce_scatter(x.contiguous(), axis.group)
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    axis.means.reduce_scatter(out, x, axis.group)
    return out


def _sum(x: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(x, group=group)


class Means(NamedTuple):
    """How a backend does it: `all_reduce(x, group)` in place, gathers and `reduce_scatter` into `out`, along dim 0.

    `summed(x, group)` leaves `x` as it is; None: a copy is summed.
    """

    all_reduce: Callable[[Tensor, dist.ProcessGroup], object]
    all_gather: Callable[[Tensor, Tensor, dist.ProcessGroup], None]
    start_all_gather: Callable[[Tensor, Tensor, dist.ProcessGroup], Callable[[], object]]
    reduce_scatter: Callable[[Tensor, Tensor, dist.ProcessGroup], None]
    summed: Callable[[Tensor, dist.ProcessGroup], Tensor] | None = None


NATIVE = Means(_sum, compat.all_gather_single, compat.start_all_gather_single, compat.reduce_scatter_single)
MEANS = {
    "gloo": Means(direct.all_reduce, direct.all_gather, direct.start_all_gather, direct.reduce_scatter, direct.summed)
}
"""Backend -> what is cheaper than its own."""


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=axis.group)
    return out


def shift(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Start sending `x` to the next rank of the ring; the result waits for, and returns, what the previous one sent.

    Nobody may write to `x` before that.
    """
    x = x.contiguous()
    arriving = torch.empty_like(x)
    sends = dist.P2POp(dist.isend, x, group=axis.group, group_peer=(axis.rank + 1) % axis.size)
    receives = dist.P2POp(dist.irecv, arriving, group=axis.group, group_peer=(axis.rank - 1) % axis.size)
    works = dist.batch_isend_irecv([sends, receives])

    def wait(sent: Tensor = x) -> Tensor:  # kept until it has left
        for work in works:
            work.wait()
        return arriving

    return wait


def _pad_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Append zero rows until dim 0 divides by the axis."""
    missing = -x.shape[0] % axis.size
    return x if missing == 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


# ---- with adjoints ----------------------------------------------------------------------------------------------


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The gradient may be shared with another branch of the graph: sum a copy of our own.
        return all_reduce(grad.clone(), ctx.axis), None


class _ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        # Never in `x`: selective recomputation keeps what a matrix product gave, and would sum the sum.
        return summed(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, tokens: int) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)[:tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(_pad_tokens(grad, ctx.axis), ctx.axis), None, None


class TokenRun(NamedTuple):
    """This rank's run of `tokens` tokens, where a region reads all of them.

    What multiplies it (`modules/linear.py`) gathers it for the product and keeps the run alone for the backward pass,
    which gathers it again: T * E * (tp - 1) / tp numbers less (arXiv 2205.05198). For eager code.
    """

    run: Tensor
    axis: Axis
    tokens: int

    def whole(self) -> Tensor:
        """All `[T, ...]`, which whatever reads them will keep."""
        return gather_tokens(self.run, self.axis, self.tokens)

    def gathered(self) -> Tensor:
        """All `[T, ...]`, without a gradient."""
        return all_gather(self.run, self.axis)[: self.tokens]

    def start_gather(self) -> Callable[[], Tensor]:
        """`gathered`, begun."""
        wait = start_all_gather(self.run, self.axis)
        return lambda: wait()[: self.tokens]

    def scattered(self, gradient: Tensor) -> Tensor:
        """The gradient of the run, from this rank's part of the gradient of all tokens."""
        return reduce_scatter(_pad_tokens(gradient, self.axis), self.axis)


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.tokens = axis, x.shape[0]
        return reduce_scatter(_pad_tokens(x, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis)[: ctx.tokens], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _exchange(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.axis), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, length: int) -> Tensor:
        ctx.axis, ctx.length = axis, length
        step = -(-length // axis.size)
        flat = torch.nn.functional.pad(x, (0, step - x.shape[-1])).movedim(-1, 0)
        return all_gather(flat, axis)[:length].movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.axis.chunk(ctx.length)
        return grad[..., start:stop], None, None


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """Identity; the gradient is summed over the axis."""
    return _CopyIn.apply(x, axis) if torch.is_grad_enabled() else x


def reduce_out(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; the gradient passes unchanged. Consumes `x`."""
    if torch.is_grad_enabled():
        return _ReduceOut.apply(x, axis)
    return all_reduce(x.clone() if x._is_view() and not torch.compiler.is_compiling() else x, axis)


def gather_tokens(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """`[ceil(T/tp), ...]` runs of tokens -> all `[T, ...]`; the gradient is summed and cut again."""
    return _GatherTokens.apply(x, axis, tokens)


def scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums `[T, ...]` -> this rank's summed run `[ceil(T/tp), ...]`; the gradient is gathered."""
    return _ScatterTokens.apply(x, axis)


def gather_last(x: Tensor, axis: Axis, length: int) -> Tensor:
    """`[..., chunk of V]` -> `[..., V]` on every rank. Every rank is expected to compute the same from it."""
    return _GatherLast.apply(x, axis, length)


def exchange(x: Tensor, axis: Axis) -> Tensor:
    """`[size, ...]`: piece i goes to rank i -> `[size, ...]`, piece i comes from rank i; the gradient goes back."""
    return _Exchange.apply(x, axis)
