"""Collectives as plain sends and receives: what is cheapest over gloo, where every rank reaches every other by TCP.

A piece goes from the memory it lies in to the memory it is wanted in, with no buffer between. Between two ranks
gloo's own all-gather costs two to three times the CPU of this, and its reduce-scatter three times; the all-reduce of
more than two ranks, a ring that moves fewer bytes, stays gloo's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[[], None]


def _trade(sent: Sequence[Tensor | None], wanted: Sequence[Tensor | None], group: dist.ProcessGroup) -> Wait:
    """Send `sent[i]` to rank i of the group while `wanted[i]` arrives from it; nothing where there is None."""
    works = [dist.isend(x, group=group, group_dst=peer) for peer, x in enumerate(sent) if x is not None]
    works += [dist.irecv(x, group=group, group_src=peer) for peer, x in enumerate(wanted) if x is not None]

    def wait() -> None:
        for work in works:
            if work is not None:
                work.wait()

    return wait


def all_gather(out: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `shard` `[n, ...]` into `out` `[size * n, ...]`, in rank order; `shard` may lie in `out` already."""
    start_all_gather(out, shard, group)()


def start_all_gather(out: Tensor, shard: Tensor, group: dist.ProcessGroup) -> Wait:
    """The same, begun: whole when what is returned has been called."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    pieces = list(out.chunk(size))
    own = pieces[rank]
    if own.data_ptr() != shard.data_ptr():
        own.copy_(shard)
    return _trade(
        [None if peer == rank else own for peer in range(size)],
        [None if peer == rank else piece for peer, piece in enumerate(pieces)],
        group,
    )


def reduce_scatter(out: Tensor, full: Tensor, group: dist.ProcessGroup) -> None:
    """`full` `[size * n, ...]` summed over the ranks, this rank's chunk into `out` `[n, ...]`."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    pieces = full.chunk(size)
    others = [peer for peer in range(size) if peer != rank]
    arriving: dict[int, Tensor] = {peer: out if size == 2 else torch.empty_like(out) for peer in others}
    _trade(
        [None if peer == rank else piece for peer, piece in enumerate(pieces)],
        [arriving.get(peer) for peer in range(size)],
        group,
    )()
    if size == 2:
        out.add_(pieces[rank])
        return
    # In the order of the ranks, so that what is summed does not depend on who sums it.
    terms = [arriving.get(peer, pieces[rank]) for peer in range(size)]
    torch.add(terms[0], terms[1], out=out)
    for term in terms[2:]:
        out.add_(term)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x`, which stays as it is, over the ranks; as `all_reduce`."""
    if dist.get_world_size(group) != 2:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total
    rank, theirs = dist.get_rank(group), torch.empty_like(x)
    _trade([None, x] if rank == 0 else [x, None], [None, theirs] if rank == 0 else [theirs, None], group)()
    return theirs.add_(x)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> None:
    """Sum `x` over the ranks, in place. Two ranks add in either order: the same bits."""
    if dist.get_world_size(group) != 2:
        dist.all_reduce(x, group=group)
        return
    rank, theirs = dist.get_rank(group), torch.empty_like(x)
    _trade([None, x] if rank == 0 else [x, None], [None, theirs] if rank == 0 else [theirs, None], group)()
    x.add_(theirs)
