"""Gradients of a whole mesh: completed, measured and clipped, whatever the layout.

It knows DTensors and process groups, no modules. Works on the local tensors of all parameters at once, so a step costs
few collectives however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from fms_parallel.errors import TrainingError
from fms_parallel.strategy.base import compute_device, parallel_of

BUCKET_BYTES = 1 << 26
"""Of gradients that are summed at once: they are copied together for it."""


def check_every_gradient(model: nn.Module) -> None:
    """After a first backward pass every trainable parameter has a gradient, or training would silently skip it.

    Raises:
        TrainingError: naming those without.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise TrainingError(
            f"{len(missing)} trainable parameters got no gradient ({shown}): they are not part of the loss. "
            "Freeze them (requires_grad=False) or use them."
        )


def complete_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients that are still partial over a mesh dimension, in few collectives per group.

    Under sequence parallelism each rank's norm weights (and uncut feed-forwards) have seen its own tokens only; their
    gradients are `Partial` DTensors until now. Torch would reduce them one by one when they are used.
    """
    waiting: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(isinstance(p, Partial) for p in gradient.placements):
            waiting.setdefault(_partial_group(gradient), []).append(parameter)
    for group, members in waiting.items():
        for bucket in _buckets(members):
            _sum_together(bucket, group)


def _buckets(members: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, of `BUCKET_BYTES` or of one gradient."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in members:
        size = parameter.grad.to_local().nbytes  # type: ignore[union-attr]
        if bucket and held + size > BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    yield bucket


def _partial_group(gradient: DTensor) -> dist.ProcessGroup:
    dims = [dim for dim, placement in enumerate(gradient.placements) if isinstance(placement, Partial)]
    if len(dims) > 1:
        raise TrainingError("a gradient is partial over two mesh dimensions; reduce one of them first.")
    return gradient.device_mesh.get_group(dims[0])


def _sum_together(members: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    local = [p.grad.to_local() for p in members]  # type: ignore[union-attr]
    # With offload=params the gradients are on the host, and the group's backend talks from the device.
    flat = torch.cat([piece.flatten() for piece in local]).to(compute_device(members[0]))
    dist.all_reduce(flat, group=group)
    flat = flat.to(local[0].device)
    for parameter, piece in zip(members, flat.split([piece.numel() for piece in local]), strict=True):
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        placements = [Replicate() if isinstance(p, Partial) else p for p in gradient.placements]
        parameter.grad = DTensor.from_local(
            piece.view(gradient.to_local().shape),
            gradient.device_mesh,
            placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's piece of every gradient there is."""
    found = (p.grad for p in parameters if p.grad is not None)
    return [g.to_local() if isinstance(g, DTensor) else g for g in found]


def copies(parameter: Tensor, ranks: int) -> int:
    """How many of the `ranks` that a parameter is spread over hold the same piece of it."""
    if not isinstance(parameter, DTensor):
        return ranks
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return ranks // prod(size for placement, size in sizes if not isinstance(placement, Replicate))


def squared_norm(model: nn.Module) -> Tensor:
    """This rank's share of the squared global gradient norm: the shares of all ranks of the job add up to it.

    A piece that several ranks hold counts once: each contributes its part of it. So does the weight that a pipeline's
    first and last stage share.
    """
    parallel = parallel_of(model)
    shared = {id(model.get_parameter(name)) for name in (parallel.pipeline.shared if parallel.pipeline else ())}
    parameters = [p for p in model.parameters() if p.grad is not None]
    pieces = local_gradients(parameters)
    if not pieces:
        raise TrainingError("no parameter has a gradient: run a backward pass first.")
    norms = torch.stack(torch._foreach_norm(pieces)).to(
        torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
    )
    holders = [copies(p, parallel.ranks_per_stage) * (2 if id(p) in shared else 1) for p in parameters]
    weights = 1 / norms.new_tensor(holders)
    return (norms.square() * weights).sum()


def clip_gradients_(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global norm is at most `max_norm`; `norm` is what it is now."""
    pieces = local_gradients(parameters)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(pieces, factor.to(pieces[0].device))
