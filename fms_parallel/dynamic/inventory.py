"""What one rank has of a run's state, by name and box: the memory that a transfer reads from and writes to.

    layers.0.norm.weight              the weight and the optimizer's tensors of its shape: cut alike, they go together
    layers.0.norm.weight (step)       a number of the optimizer's: the same wherever the weight is

It knows tensors and boxes; it knows no layouts, modules or process groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fms_parallel.checkpoint.named import STATE, WEIGHT
from fms_parallel.checkpoint.slots import Slot
from fms_parallel.distributed.boxes import Box, local_box, local_tensor
from fms_parallel.dynamic.plan import Item, Table
from fms_parallel.errors import LayoutError

Kinds = tuple[tuple[str, torch.dtype], ...]
"""What travels under one name: (key, dtype) of each tensor, the keys as checkpoints have them."""


@dataclass(frozen=True)
class Entry:
    """One name: the full tensor's shape, what travels under it, the boxes that this rank has, and their memory.

    Attributes:
        memory: for each box one local tensor of each kind.
    """

    shape: tuple[int, ...]
    kinds: Kinds
    boxes: tuple[Box, ...]
    memory: tuple[tuple[Tensor, ...], ...]

    @property
    def item(self) -> Item:
        """For the plan."""
        return Item(self.shape, sum(dtype.itemsize for _, dtype in self.kinds))

    def without_memory(self) -> Entry:
        """What other ranks are told."""
        return Entry(self.shape, self.kinds, self.boxes, ())

    def views(self, box: Box) -> list[Tensor]:
        """The memory of a box that lies in one of this rank's, one view per kind."""
        for own, tensors in zip(self.boxes, self.memory, strict=True):
            if own == box:
                return list(tensors)
            if own.intersect(box) == box:
                here = box.shifted(own.offset).slices
                return [tensor[here] for tensor in tensors]
        raise LayoutError(f"this rank holds {self.boxes}, of which {box} is no part.")


class Inventory:
    """Entries by name.

    Args:
        entries: of this rank.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Inventory:
        """Tensors by their keys in a checkpoint (`model/NAME`, `optimizer/KIND/NAME`), sorted into entries.

        Raises:
            LayoutError: optimizer state that is neither a number nor cut as its parameter is.
        """
        weights = {key.split("/", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{WEIGHT}/")}
        groups: dict[str, dict[str, Tensor]] = {name: {f"{WEIGHT}/{name}": t} for name, t in weights.items()}
        for key, tensor in tensors.items():
            if key.startswith(f"{STATE}/"):
                _, kind, name = key.split("/", 2)
                along = tensor.shape == weights[name].shape and local_box(tensor) == local_box(weights[name])
                if not along and tensor.numel() != 1:
                    raise LayoutError(
                        f"optimizer state {kind!r} of {name} has shape {list(tensor.shape)} and is not cut as its "
                        f"parameter {list(weights[name].shape)} is, so it means nothing in another layout. Use an "
                        "optimizer whose state has its parameter's shape, such as AdamW."
                    )
                groups.setdefault(name if along else f"{name} ({kind})", {})[key] = tensor
        return cls({name: _entry(group) for name, group in groups.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    @property
    def table(self) -> Table:
        """For the plan."""
        return {name: entry.boxes for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        """Of all memory."""
        return sum(box.numel * entry.item.width for entry in self.entries.values() for box in entry.boxes)

    def without_memory(self) -> Inventory:
        """What other ranks are told."""
        return Inventory({name: entry.without_memory() for name, entry in self.entries.items()})

    def joined(self, other: Inventory) -> Inventory:
        """This and what another holds, say a neighbour's copy."""
        entries = dict(self.entries)
        for name, theirs in other.entries.items():
            own = entries.get(name)
            more = (*((own.boxes, own.memory) if own else ((), ())),)
            entries[name] = Entry(theirs.shape, theirs.kinds, (*more[0], *theirs.boxes), (*more[1], *theirs.memory))
        return Inventory(entries)

    def copied(self) -> Inventory:
        """The same in memory of its own."""
        return Inventory(
            {
                name: Entry(e.shape, e.kinds, e.boxes, tuple(tuple(t.clone() for t in box) for box in e.memory))
                for name, e in self.entries.items()
            }
        )

    def empty_like(self, device: torch.device) -> Inventory:
        """The same boxes in new memory."""

        def room(entry: Entry) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(
                tuple(torch.empty(box.size, dtype=dtype, device=device) for _, dtype in entry.kinds)
                for box in entry.boxes
            )

        return Inventory({n: Entry(e.shape, e.kinds, e.boxes, room(e)) for n, e in self.entries.items()})

    def release(self) -> None:
        """Give the memory back, whoever still refers to it: what is left reads as empty tensors."""
        for entry in self.entries.values():
            for tensor in (tensor for box in entry.memory for tensor in box):
                tensor.untyped_storage().resize_(0)


def _entry(group: Mapping[str, Tensor]) -> Entry:
    first = next(iter(group.values()))
    kinds = tuple((key, tensor.dtype) for key, tensor in group.items())
    local = tuple(local_tensor(tensor) for tensor in group.values())
    return Entry(tuple(first.shape), kinds, (local_box(first),), (local,))


def state_tensors(slots: list[Slot], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Weights and optimizer state by their keys in a checkpoint.

    Takes slots, not the model: a step that failed in the middle leaves FSDP's gathered weights in the module.
    """
    found = {f"{WEIGHT}/{slot.name}": slot.tensor.detach() for slot in slots}
    for slot in slots:
        state = optimizer.state.get(slot.tensor, {}) if optimizer is not None else {}
        for kind, value in state.items():
            if value is not None and not isinstance(value, Tensor):
                raise LayoutError(f"optimizer state {kind!r} of {slot.name} is a {type(value).__name__}, not a tensor.")
            if value is not None:
                found[f"{STATE}/{kind}/{slot.name}"] = value.detach()
    return found


def everyone(described: list[Inventory]) -> dict[str, Entry]:
    """Every name that a rank has, with its shape and kinds.

    Raises:
        LayoutError: ranks disagree over a tensor.
    """
    found: dict[str, Entry] = {}
    for rank, inventory in enumerate(described):
        for name, entry in inventory.entries.items():
            known = found.setdefault(name, entry)
            if (known.shape, known.kinds) != (entry.shape, entry.kinds):
                raise LayoutError(
                    f"{name} is {list(entry.shape)} with {_words(entry)} on rank {rank}, but {list(known.shape)} with "
                    f"{_words(known)} on another."
                )
    return found


def _words(entry: Entry) -> str:
    return ", ".join(f"{key} ({str(dtype).removeprefix('torch.')})" for key, dtype in entry.kinds)
