"""How the state of a run comes back when members are lost: from the survivors, from copies, from a checkpoint.

It knows what a member holds and the process group of the new generation; steps and votes are elastic.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fms_parallel.checkpoint.training_state import latest_training_state, load_training_state
from fms_parallel.dynamic.buddy import Buddies
from fms_parallel.dynamic.inventory import Inventory
from fms_parallel.dynamic.membership import Membership, Plan
from fms_parallel.dynamic.relayout import Gap, Relayout, SwitchReport
from fms_parallel.dynamic.state import Luggage, TrainingState
from fms_parallel.errors import TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.training.loop import Trainer

Choose = Callable[[int], ParallelLayout]
"""Number of ranks -> layout for them; the same on every member."""


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


def restored(elastic: Elastic, plan: Plan, state: TrainingState | None) -> tuple[TrainingState, str]:
    """The run in the layout for the members of `plan`, and where it came from. Collective over them.

    Args:
        state: this member's; only read. None: it has nothing.
    Raises:
        TrainingError: part of the state is lost.
    """
    layout, buddies = elastic.choose(len(plan.members)), elastic.buddies
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
