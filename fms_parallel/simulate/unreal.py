"""A model of a rank that does not exist: cut by the real code, without a byte of memory.

    factory (meta device) -> cut -> memory is asked for: refused -> parameters with a shape and a storage of a size

It knows how models come to be; it knows nothing of steps and numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.layout import ParallelLayout


def build_unreal(factory: Callable[..., nn.Module], layout: ParallelLayout, mode: Any, **arguments: Any) -> nn.Module:
    """The factory's model as this rank of the running (fake) process group would hold it.

    Args:
        factory: called with `distributed_strategy=` and `arguments`, and with a `fill=` that writes nothing when it
            takes one.
        mode: of `compat.unreal_tensors`, in which the model will run.
    """
    if "fill" in inspect.signature(factory).parameters:
        arguments = {"fill": _leave, **arguments}
    with compat.intercept(_without_memory):
        model = factory(distributed_strategy=layout, **arguments)
    given: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    # Both are kept until the end: the id of one that is gone would be given to another.
                    made = given.setdefault(id(tensor), (tensor, _unreal(tensor, mode)))
                    store[name] = made[1]
    for module in model.modules():
        compat.fsdp_took_new_parameters(module)
    return model


def _leave(model: nn.Module) -> None:
    """Write no weights."""


def _without_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where a model on the meta device asks for memory, it stays there."""
    if func is torch.ops.aten.empty_like.default and args[0].is_meta:
        kwargs = {**kwargs, "device": torch.device("meta")}
    return func(*args, **kwargs)


def _unreal(tensor: Tensor, mode: Any) -> Tensor:
    """A tensor like it, with its ties cut: this rank's piece has a size and no contents."""
    local = local_tensor(tensor)
    with mode:
        piece = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype)
    made = compat.dtensor_like(tensor, piece)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
