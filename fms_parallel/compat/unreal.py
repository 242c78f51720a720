"""Tensors without memory, ranks that are not there, and watching what is computed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fms_parallel.compat.ranks import forget_meshes


def needs_values(error: BaseException) -> bool:
    """Whether a forward on fake tensors failed because it asked for a tensor's value."""
    from torch._subclasses import fake_tensor

    kinds = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    return isinstance(error, kinds) or "data-dependent" in str(error).lower()


@contextmanager
def watch_operations(saw: Callable[[bool, list[Tensor], list[Tensor], int], None]) -> Iterator[None]:
    """Inside, `saw(writes into an argument, tensors read, tensors made, flops)` of every operation below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            count = flop_registry.get(func.overloadpacket)
            flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            saw(func._schema.is_mutable, given, made, flops)
            return out

    with Watch():
        yield


def flatten_tree(tree: Any) -> tuple[list[Any], Any]:
    """(leaves, structure) of nested tuples, lists, dicts and what libraries have registered (transformers' outputs)."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(tree)


def unflatten_tree(leaves: list[Any], structure: Any) -> Any:
    """What `flatten_tree` took apart, with these leaves."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


def storage_number(tensor: Tensor) -> int:
    """A number that tensors of one storage share, and no other tensor has while that storage lives."""
    return tensor.untyped_storage()._cdata


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """A process group of which only this rank exists: every collective returns at once and moves nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported", category=UserWarning)
            yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


def unreal_tensors() -> Any:
    """A mode, to enter as often as one likes: tensors have shapes, dtypes and storages of a size, and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def intercept(answer: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside, `answer(operation, args, kwargs)` runs every operation on plain tensors, collectives included.

    Operations on DTensors come as those on their local tensors.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Intercept(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented
            return answer(func, args, kwargs or {})

    with Intercept():
        yield


@contextmanager
def storage_resizes(told: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, `told(storage)` after each `storage.resize_`, by which FSDP2 frees and takes gathered parameters."""
    resize = torch.UntypedStorage.resize_

    def noted(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        told(storage)
        return result

    torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def group_of_collective(func: Any, args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    """The process group that a collective's operation was given, as an object or by name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    if func.namespace == "c10d":
        found = [value for value in args if isinstance(value, torch.ScriptObject)]
        return dist.ProcessGroup.unbox(found[0]) if found else None
    name: Any = next(value for value in reversed(args) if isinstance(value, str))
    return _resolve_process_group(name)


def trace_operations(run: Callable[..., Any], *args: Any) -> Any:
    """The FX graph of the operations that `run(*args)` calls, composite ones whole; args are trees of fake tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    noisy = logging.getLogger("torch._subclasses.fake_tensor")  # shows the traceback of errors that callers answer
    before, noisy.disabled = noisy.disabled, True
    try:
        return make_fx(run, pre_dispatch=True)(*args).graph
    finally:
        noisy.disabled = before


def traced_so_far() -> Any:
    """The newest node of the graph that is being traced; None outside of a trace."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else next(iter(reversed(mode.tracer.graph.nodes)), None)
