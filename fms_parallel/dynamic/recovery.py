"""How the state of a run comes back when members are lost: from the survivors, from copies, from a checkpoint.

It knows what a member holds and the process group of the new generation; steps and votes are elastic.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fms_parallel.checkpoint.training_state import latest_training_state, load_training_state
from fms_parallel.dynamic.buddy import Buddies
from fms_parallel.dynamic.inventory import Inventory
from fms_parallel.dynamic.membership import Membership, Plan
from fms_parallel.dynamic.relayout import Gap, ModelFactory, Relayout, SwitchReport
from fms_parallel.dynamic.state import Luggage, TrainingState
from fms_parallel.errors import FmsError, TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training.loop import Trainer

Choose = Callable[[int], ParallelLayout]
"""Number of ranks -> layout for them. The first member is asked."""


@dataclass(frozen=True)
class Recovery:
    """How a job went on after its members changed.

    Attributes:
        step: that it went on from. redone: committed steps that are done again (0 from survivors).
        source: survivors, buddies or checkpoint. seconds: from when this rank knew until it could step again.
    """

    step: int
    redone: int
    source: str
    members: tuple[str, ...]
    layout: str
    seconds: float
    switch: SwitchReport | None


@dataclass(frozen=True)
class Elastic:
    """What a trainer must know to go on with other members.

    Attributes:
        choose: the layout for a number of ranks. buddies: copies of shards, or None. output_path: of checkpoints.
    """

    membership: Membership
    relayout: Relayout
    choose: Choose
    buddies: Buddies | None
    device: torch.device
    output_path: str | None


def chosen(elastic: Elastic, plan: Plan) -> ParallelLayout:
    """The layout for the members of `plan`, as the first of them chooses it. Collective over them.

    Raises:
        LayoutError: on every member, when there is none.
    """
    found: list[ParallelLayout | FmsError] = []
    if dist.get_rank() == 0:
        try:
            found.append(elastic.choose(len(plan.members)))
        except FmsError as error:
            found.append(error)
    told: list[Any] = found or [None]
    dist.broadcast_object_list(told, 0, device=elastic.device)
    layout: ParallelLayout | FmsError = told[0]
    if isinstance(layout, FmsError):
        raise layout
    return layout


def restored(elastic: Elastic, plan: Plan, state: TrainingState | None) -> tuple[TrainingState, str]:
    """The run in the layout for the members of `plan`, and where it came from. Collective over them.

    Args:
        state: this member's; only read. None: it has nothing.
    Raises:
        TrainingError: part of the state is lost.
    """
    layout, buddies = chosen(elastic, plan), elastic.buddies
    copies = buddies.valid if buddies is not None else None
    nothing: tuple[Inventory, Luggage | None] = (Inventory({}), None)
    holdings = {
        "survivors": nothing if state is None else (state.inventory(), state.luggage()),
        "buddies": nothing if copies is None else (copies.both, copies.luggage),
    }
    reasons = []
    for source, (here, luggage) in holdings.items():
        try:
            return elastic.relayout.rebuild(here, luggage, layout, elastic.device), source
        except Gap as gap:
            reasons.append(f"{source}: {gap}")
    folder = elastic.output_path
    path = None if folder is None else latest_training_state(Trainer.checkpoints_in(folder))
    if path is None:
        raise TrainingError(
            f"the state of the lost members is nowhere ({'; '.join(reasons)}), and there is no checkpoint: use "
            "replicas (dp), buddy_every, or checkpoint_steps."
        )
    model, optimizer = elastic.relayout.empty(layout, elastic.device)
    numbers = load_training_state(path, model, optimizer)
    more = {"total_tokens": numbers["total_tokens"]}
    return TrainingState(model, optimizer, step=numbers["step"], numbers=more), "checkpoint"


class ElasticSwitch:
    """`switch` of an `AdaptiveLayout` for an `ElasticTrainer`: a refusal is no loss, and a loss is no refusal."""

    def __init__(self, trainer: Any, model_factory: ModelFactory) -> None:
        self.trainer, self.relayout = trainer, trainer.elastic.relayout

    def __call__(self, layout: str | ParallelLayout) -> bool:
        """As `TrainerSwitch`."""
        try:
            return bool(self.trainer.change_layout(layout))
        except FmsError as error:
            membership = self.trainer.membership
            if may_be_a_loss(error) and membership.was_lost(membership.silence + 2.0):
                raise ConnectionError(f"a member was lost in a change of layout: {error}") from error
            raise


def may_be_a_loss(error: BaseException) -> bool:
    """Errors of connections are no FmsError, or were one's cause."""
    cause: BaseException | None = error
    while isinstance(cause, FmsError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None
