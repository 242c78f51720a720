"""What a model holds: every parameter and persistent buffer under all its names, and the box of it that this rank has.

Names are those of `model.state_dict()`: plain parameter names in every layout. It knows modules and boxes; it knows no
files and talks to no other rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fms_parallel.distributed.boxes import Box, local_box, local_tensor
from fms_parallel.errors import CheckpointError


@dataclass(frozen=True)
class Slot:
    """One tensor of a model.

    Attributes:
        names: the first is the one it is saved under; more than one means that the module ties them.
        tensor: the parameter or buffer itself, as the module holds it.
    """

    names: tuple[str, ...]
    tensor: Tensor

    @property
    def name(self) -> str:
        """The name it is saved under."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor, over all ranks."""
        return tuple(self.tensor.shape)

    def box(self) -> Box:
        """The box of the full tensor that this rank holds.

        Raises:
            CheckpointError: what this rank holds is not one box, or not the one that its placements say.
        """
        box = local_box(self.tensor)
        held = tuple(local_tensor(self.tensor).shape)
        if held != box.size or not _is_one_box(self.tensor):
            raise CheckpointError(
                f"{self.name}: this rank holds {held} of {self.shape}, which is not one box of it (at {box.offset}, "
                f"size {box.size}). Shard it evenly, or give fused parts a dimension of their own."
            )
        return box


def slots_of(model: nn.Module) -> list[Slot]:
    """Every parameter and persistent buffer, once each, in the module's order.

    Raises:
        CheckpointError: some are on the meta device and hold nothing yet.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    # keep_vars: the objects themselves, so that ties show. FSDP's hooks put its parameters back in shards first.
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    on_meta = [names[key][0] for key, tensor in tensors.items() if local_tensor(tensor).is_meta]
    if on_meta:
        raise CheckpointError(
            f"{len(on_meta)} tensors are on the meta device and hold no memory, {on_meta[0]} first: materialise the "
            "model with to_empty(device=...) before it is loaded or saved."
        )
    return [Slot(tuple(names[key]), tensor) for key, tensor in tensors.items()]


def _is_one_box(tensor: Tensor) -> bool:
    """Whether the indices of every dimension that this rank holds are neighbours.

    FSDP over a dimension that tp shards already deals out every tp shard in turn (a strided shard). Together with the
    tp shard that is one box; alone it is not.
    """
    if not isinstance(tensor, DTensor):
        return True
    for index, placement in enumerate(tensor.placements):
        parts = getattr(placement, "split_factor", 1)
        later = [
            tensor.device_mesh.size(index + 1 + offset)
            for offset, other in enumerate(tensor.placements[index + 1 :])
            if isinstance(other, Shard) and other.dim == getattr(placement, "dim", None)
        ]
        if parts > 1 and prod(later) % parts:
            return False
    return True
