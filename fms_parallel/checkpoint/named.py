"""Model and optimizer as one flat dict of named tensors, and back, in any layout.

    model/layers.0.norm.weight                 the parameter
    optimizer/exp_avg/layers.0.norm.weight     its state of that kind

Names are those of the parameters, so what one layout saved another can load. It knows modules, optimizers and shapes;
it knows no files and no ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms_parallel import compat
from fms_parallel.checkpoint.slots import Slot, slots_of
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.errors import CheckpointError

WEIGHT, STATE = "model", "optimizer"


class Stored(NamedTuple):
    """Shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Targets:
    """Where a checkpoint's tensors go on this rank, and what does not fit.

    Attributes:
        tensors: key in the checkpoint -> tensor of this rank (a parameter itself, or new optimizer state).
        known: keys that have a place here, whether they fit or not.
        state: position in the optimizer -> kind -> new state.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    state: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)


# ---- out --------------------------------------------------------------------------------------------------------


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, once each, under its first name.

    Raises:
        CheckpointError: the model is on the meta device, or this rank's piece of a tensor is not a box.
    """
    slots = slots_of(model)
    for slot in slots:
        slot.box()
    return {f"{WEIGHT}/{slot.name}": slot.tensor.detach() for slot in slots}


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[str]]:
    """(optimizer state by name, names of the parameters that have none yet).

    Raises:
        CheckpointError: a parameter that is not the model's; state that is no tensor, or neither a scalar nor cut as
            its parameter is, so that it means nothing to another layout.
    """
    found: dict[str, Tensor] = {}
    stateless = []
    for slot, parameter in _trained(slots_of(model), optimizer):
        state = {kind: value for kind, value in optimizer.state.get(parameter, {}).items() if value is not None}
        for kind, value in state.items():
            _check_portable(f"optimizer state {kind!r} of {slot.name}", value, parameter)
            found[f"{STATE}/{kind}/{slot.name}"] = value.detach()
        if not state:
            stateless.append(slot.name)
    return found, stateless


def _trained(slots: Sequence[Slot], optimizer: torch.optim.Optimizer) -> Iterator[tuple[Slot, Tensor]]:
    """(slot, parameter) of all that the optimizer trains, in its own order."""
    slot_of = {id(slot.tensor): slot for slot in slots}
    parameters = list({id(p): p for group in optimizer.param_groups for p in group["params"]}.values())
    strangers = sum(id(parameter) not in slot_of for parameter in parameters)
    if strangers:
        raise CheckpointError(
            f"{strangers} of {len(parameters)} parameters of the optimizer are not the model's: make it from "
            "model.parameters(), after the model has been distributed."
        )
    yield from ((slot_of[id(parameter)], parameter) for parameter in parameters)


def _check_portable(what: str, value: object, parameter: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} is a {type(value).__name__}: only tensors can be saved.")
    alike = isinstance(value, DTensor) == isinstance(parameter, DTensor)
    if isinstance(value, DTensor) and isinstance(parameter, DTensor):
        alike = value.placements == parameter.placements and value.shape == parameter.shape
    if not alike and (isinstance(value, DTensor) or value.numel() != 1):
        raise CheckpointError(
            f"{what} has shape {list(value.shape)} and is not cut as its parameter {list(parameter.shape)} is: it "
            "means nothing in another layout. Use an optimizer whose state has its parameter's shape, such as AdamW."
        )


# ---- in ---------------------------------------------------------------------------------------------------------


def aim_weights(targets: Targets, model: nn.Module, stored: Mapping[str, Stored], *, exact_dtype: bool) -> None:
    """Add the model's own tensors to `targets`; with `exact_dtype` the dtypes must be the stored ones."""
    for slot in slots_of(model):
        slot.box()
        saved = [key for name in slot.names if (key := f"{WEIGHT}/{name}") in stored]
        if not saved:
            targets.missing.append(" = ".join(slot.names))
            continue
        key = saved[0]
        targets.known.add(key)
        if stored[key].shape != slot.shape:
            targets.unfit.append(f"{slot.name} ({list(stored[key].shape)}, the model has {list(slot.shape)})")
        elif exact_dtype and stored[key].dtype != slot.tensor.dtype:
            targets.unfit.append(f"{slot.name} ({stored[key].dtype}, the model has {slot.tensor.dtype})")
        else:
            targets.tensors[key] = slot.tensor.detach()


def aim_state(
    targets: Targets,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Stored],
    stateless: Sequence[str],
) -> None:
    """Add new state tensors for everything the optimizer trains to `targets`, cut as its parameters are."""
    kinds: dict[str, dict[str, Stored]] = {}
    for key, entry in stored.items():
        if key.startswith(f"{STATE}/"):
            _, kind, name = key.split("/", 2)
            kinds.setdefault(name, {})[kind] = entry
    device = getattr(optimizer, "state_device", None)  # where it wants its state, when not beside the weights
    for index, (slot, parameter) in enumerate(_trained(slots_of(model), optimizer)):
        saved = [name for name in slot.names if name in kinds]
        if not saved:
            if not set(slot.names) & set(stateless):
                targets.missing.append(f"optimizer state of {slot.name}")
            continue
        name = saved[0]
        targets.state[index] = {}
        for kind, entry in kinds[name].items():
            key = f"{STATE}/{kind}/{name}"
            targets.known.add(key)
            new = _new_state(entry, parameter, device)
            if new is None:
                targets.unfit.append(
                    f"optimizer state {kind!r} of {name} ({list(entry.shape)}, {list(slot.shape)} is cut)"
                )
            else:
                targets.state[index][kind] = targets.tensors[key] = new


def _new_state(entry: Stored, parameter: Tensor, device: torch.device | None) -> Tensor | None:
    """Memory for a state tensor: like its parameter, or plain when it is a scalar. None: neither."""
    if entry.shape == tuple(parameter.shape) and entry.shape:
        if device is not None and entry.dtype == parameter.dtype:
            return compat.dtensor_like(parameter, torch.empty_like(local_tensor(parameter), device=device))
        return torch.empty_like(parameter.detach(), dtype=entry.dtype)
    if isinstance(parameter, DTensor) and torch.Size(entry.shape).numel() != 1:
        return None
    return torch.empty(entry.shape, dtype=entry.dtype)


def put_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace the optimizer's state. Its parameter groups and their numbers stay its own."""
    # load_state_dict puts each kind where this optimizer wants it: `step` on the host, or on the device when fused.
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})
