"""What happens while a step runs: memory taken and freed, collectives, and moments worth a name.

It sits below autograd and below DTensor, so it sees what a device would be asked to do, and it answers the host where
the host asks for a value that nobody computed. It knows operations and storages; it knows no modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from fms_parallel import compat

PARAMETERS, GATHERED, GRADIENTS, OPTIMIZER, ACTIVATIONS = (
    "parameters",
    "gathered",
    "gradients",
    "optimizer",
    "activations",
)

IN_ANOTHER_DTYPE = {PARAMETERS: GATHERED, GATHERED: GATHERED, GRADIENTS: GRADIENTS}
"""Purpose -> that of a copy in another precision."""

BUFFERS = {"fsdp::all_gather_copy_in": GATHERED, "fsdp::chunk_cat": GRADIENTS}
"""Operation that fills a buffer to send it -> what the buffer holds."""

KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv_": "receive",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "shard_dim_alltoall": "all_to_all",
}
"""Operation of torch -> what it is called here; others keep their name."""

SILENT = ("wait_tensor", "_wrap_tensor_autograd")
SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


class Sent(NamedTuple):
    """One collective as this rank asked for it. `bytes`: of the larger of what goes in and what comes out."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int


class Event(NamedTuple):
    """The storage `number` changed by `bytes`; or, with number -1, a moment called `name`."""

    number: int
    bytes: int
    name: str = ""


class Recorder:
    """Everything that `recording()` saw.

    Attributes:
        of: storage -> what it is for; what is not there is an activation.
        unreal: nobody computes values: those that the host asks for are 1.
    """

    def __init__(self, unreal: bool = True) -> None:
        self.unreal = unreal
        self.events: list[Event] = []
        self.sent: list[Sent] = []
        self.of: dict[int, str] = {}
        self._numbers: dict[int, int] = {}  # storages that live: address -> number
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, Any] = {}
        self._next = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See every operation of the body."""
        with compat.storage_resizes(self._resized), compat.intercept(self._answer):
            yield

    def mark(self, tensors: Iterable[Tensor], purpose: str, *, over: bool = True) -> None:
        """Say what the memory of these is for; without `over` only where nothing was said."""
        for tensor in tensors:
            number = self._seen(_plain(tensor))
            if over or number not in self.of:
                self.of[number] = purpose

    def moment(self, name: str) -> None:
        """Give this moment a name."""
        self.events.append(Event(-1, 0, name))

    def forget_past(self) -> None:
        """Begin here, with what memory there is."""
        self.events = [Event(number, self._sizes[number]) for number in self._numbers.values()]
        self.sent = []

    # ---- what is seen -------------------------------------------------------------------------------------------

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.unreal and func is torch.ops.aten._local_scalar_dense.default:
            # The host wants a number (tokens, loss, norm). One is finite, and no step is skipped for it.
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        if func.namespace in SPACES and (name := func._schema.name.rpartition("::")[2]) not in SILENT:
            self._sent(name, func, args, out)
        made = [out] if isinstance(out, Tensor) else _tensors(out)
        for tensor in made:
            self._seen(tensor)
        if func is torch.ops.aten._to_copy.default and (same := IN_ANOTHER_DTYPE.get(self._purpose(args[0]))):
            self.mark(made, same, over=False)
        if buffer := BUFFERS.get(func._schema.name):
            self.mark([*made, *_tensors(kwargs.get("out"))], buffer, over=False)
        return out

    def _sent(self, name: str, func: Any, args: tuple[Any, ...], out: Any) -> None:
        group = compat.group_of_collective(func, args)
        ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
        sides = [sum(t.numel() * t.element_size() for t in _tensors(side)) for side in (*args, out)]
        self.sent.append(Sent(KINDS.get(name, name), ranks, max(sides, default=0)))

    def _purpose(self, tensor: Tensor) -> str:
        return self.of.get(self._seen(tensor), ACTIVATIONS)

    def _seen(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, a new one when it was not seen before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        number = self._numbers.get(address)
        if number is None:
            number, self._next = self._next, self._next + 1
            self._numbers[address], self._sizes[number] = number, storage.nbytes()
            self._alive[number] = weakref.ref(storage, lambda _: self._gone(address, number))
            self.events.append(Event(number, storage.nbytes()))
        return number

    def _gone(self, address: int, number: int) -> None:
        self._numbers.pop(address, None)
        self._alive.pop(number, None)
        self.events.append(Event(number, -self._sizes.pop(number)))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        number = self._numbers.get(storage._cdata)
        if number is not None:
            self.events.append(Event(number, storage.nbytes() - self._sizes[number]))
            self._sizes[number] = storage.nbytes()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
