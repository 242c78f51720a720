"""`TrainingState`: what a run is made of, held so that it survives a change of layout or a step that failed.

Data and dropout are functions of the step, so the data cursor is a number; torch's own random generators stay as they
are in every rank. It knows models, optimizers and schedulers; it knows no ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fms_parallel import compat
from fms_parallel.checkpoint.slots import slots_of
from fms_parallel.distributed.boxes import local_tensor
from fms_parallel.dynamic.inventory import Inventory, state_tensors
from fms_parallel.errors import LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.strategy.base import parallel_of

HOW = frozenset(("params", "fused", "foreach", "capturable", "differentiable"))
"""Of a parameter group: what it is made of and how it is computed, which a new optimizer knows itself."""

PER_GROUP = ("base_lrs", "_last_lr")
"""Of a scheduler: one number for each parameter group, of which ranks of a pipeline have different ones."""


@dataclass(frozen=True)
class Luggage:
    """What goes along with the tensors: plain values, the same on every rank that has them.

    Attributes:
        step: optimizer steps done. numbers: of the caller's, such as the data cursor. scheduler: its state, or None.
        groups: parameter -> the numbers of its group. trained: parameter -> whether it takes a gradient.
        training: whether modules are in training mode. optimizer: its kind, or None.
        names: of the whole model's tensors, held: those of them that this rank has a piece of.
    """

    step: int
    numbers: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    groups: Mapping[str, Mapping[str, Any]]
    trained: Mapping[str, bool]
    training: bool
    optimizer: str | None
    names: tuple[str, ...]
    held: frozenset[str]


class TrainingState:
    """A run between two steps.

    Make it when model and optimizer are new and keep it: it notes which gradients the optimizer has applied, and holds
    on to the sharded parameters, which FSDP hides while a step runs.

    Args:
        model: from `get_model` or `compose`. optimizer: of its parameters. scheduler: a torch scheduler of it.
        step: optimizer steps done. numbers: plain values to keep, the same on every rank (data cursor, tokens, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int = 0,
        scheduler: Any = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.step = model, optimizer, scheduler, step
        self.numbers: dict[str, Any] = dict(numbers or {})
        self.slots = slots_of(model)
        self._applied = Applied()
        if optimizer is not None:
            optimizer.register_step_post_hook(self._applied)

    @property
    def layout(self) -> ParallelLayout:
        """How it is spread."""
        return parallel_of(self.model).layout

    def inventory(self) -> Inventory:
        """What this rank holds of it now, not copied."""
        return Inventory.of(state_tensors(self.slots, self.optimizer))

    def luggage(self) -> Luggage:
        """What goes along with the tensors."""
        names = {id(slot.tensor): slot.name for slot in self.slots}
        groups = {
            names[id(parameter)]: {key: value for key, value in group.items() if key not in HOW}
            for group in (self.optimizer.param_groups if self.optimizer else ())
            for parameter in group["params"]
            if id(parameter) in names
        }
        trained = {s.name: s.tensor.requires_grad for s in self.slots if isinstance(s.tensor, nn.Parameter)}
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        kind = None if self.optimizer is None else type(self.optimizer).__name__
        held = frozenset(name for slot in self.slots for name in slot.names)
        return Luggage(
            step=self.step,
            numbers=dict(self.numbers),
            scheduler=scheduler,
            groups=groups,
            trained=trained,
            training=self.model.training,
            optimizer=kind,
            names=parallel_of(self.model).names or tuple(held),
            held=held,
        )

    def refuse_unless_between_steps(self) -> None:
        """Raises LayoutError while gradients wait that no optimizer step has applied: they would be lost."""
        if compat.has_unreduced_gradients(self.model) or self._applied.others_of(self.model):
            raise LayoutError(
                "the layout changes between two optimizer steps only, and gradients are waiting that no step has "
                "applied: finish the accumulation with optimizer.step(), or drop them with zero_grad()."
            )


def merged(luggage: list[Luggage]) -> Luggage | None:
    """The first rank's, with what all ranks say of their own parameters: stages of a pipeline have different ones."""
    if not luggage:
        return None
    groups = {name: numbers for given in reversed(luggage) for name, numbers in given.groups.items()}
    trained = {name: flag for given in reversed(luggage) for name, flag in given.trained.items()}
    return replace(luggage[0], groups=groups, trained=trained)


class Applied:
    """Which gradients an optimizer's last step has used up: called after each step."""

    def __init__(self) -> None:
        self._marks: set[tuple[int, ...]] = set()

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        self._marks = {_mark(gradient) for gradient in gradients}

    def others_of(self, model: nn.Module) -> bool:
        """Whether the model has a gradient that was not used, or was added to since."""
        return any(p.grad is not None and _mark(p.grad) not in self._marks for p in model.parameters())


def _mark(gradient: Tensor) -> tuple[int, ...]:
    """Where it is and how often it was added to: autograd adds to a DTensor, FSDP to the tensor inside one."""
    local = local_tensor(gradient)
    inside = getattr(gradient, "_local_tensor", local)
    return compat.storage_number(local), int(local.storage_offset()), int(inside._version), gradient._version


@dataclass
class Unpacked:
    """Luggage put into a new model and optimizer."""

    luggage: Luggage
    refusals: list[str] = field(default_factory=list)

    def freeze(self, model: nn.Module) -> None:
        """The same parameters take gradients as before."""
        for slot in slots_of(model):
            if slot.name in self.luggage.trained:
                slot.tensor.requires_grad_(self.luggage.trained[slot.name])

    def groups(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Each parameter group gets the numbers that its parameters had.

        Raises:
            LayoutError: it puts parameters together that had different ones.
        """
        names = {id(slot.tensor): slot.name for slot in slots_of(model)}
        for group in optimizer.param_groups:
            known = [
                (name, self.luggage.groups[name])
                for p in group["params"]
                if (name := names[id(p)]) in self.luggage.groups
            ]
            for name, numbers in known:
                if numbers != known[0][1]:
                    raise LayoutError(
                        f"the optimizer factory puts {known[0][0]} and {name} into one parameter group, but they had "
                        f"{dict(known[0][1])} and {dict(numbers)}: group the parameters by name, as in the old layout."
                    )
            if known:
                group.update(known[0][1])

    def scheduler(self, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        """The state of the old scheduler; its numbers of each group are those that the groups have."""
        state = dict(self.luggage.scheduler or {})
        groups = optimizer.param_groups
        per_group = {"base_lrs": [g.get("initial_lr", g["lr"]) for g in groups], "_last_lr": [g["lr"] for g in groups]}
        state.update({key: per_group[key] for key in PER_GROUP if key in state})
        scheduler.load_state_dict(state)
