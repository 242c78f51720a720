"""Changing the layout of a `Trainer` between two of its steps. It knows trainers; what is moved is relayout.py's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fms_parallel.dynamic.relayout import ModelFactory, Relayout, agreed, resolved
from fms_parallel.dynamic.state import TrainingState
from fms_parallel.errors import ConfigError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.log import get_logger
from fms_parallel.training.loop import Trainer
from fms_parallel.training.optimizer import make_optimizer

logger = get_logger(__name__)


class TrainerSwitch:
    """Takes a trainer's run from layout to layout.

    Args:
        trainer: its model and optimizer must be those it was made with. model_factory: see `ModelFactory`.
        options: of `Relayout`.
    """

    def __init__(self, trainer: Trainer, model_factory: ModelFactory, **options: Any) -> None:
        self.trainer = trainer
        self.relayout = Relayout(model_factory, lambda model: make_optimizer(model, trainer.options), **options)
        self.state = TrainingState(trainer.model, trainer.optimizer)

    def __call__(self, layout: str | ParallelLayout) -> bool:
        """Change to `layout`; whether anything changed. Collective, between two steps.

        Raises:
            LayoutError: as `Relayout`; also when the batch does not divide. The trainer goes on as it was.
        """
        trainer = self.trainer
        with agreed("a change of layout"):
            trainer.feed_of((0, resolved(layout, self.state.layout).data_parallel))
        self.state.step = trainer.step
        new = self.relayout(self.state, layout)
        changed, self.state = new is not self.state, new
        if changed:
            assert new.optimizer is not None
            trainer.adopt(new.model, new.optimizer)
        return changed


class LayoutSchedule:
    """`between_steps` of `train`: from step N on another layout, for each N.

    A layout that is refused is logged, and the run goes on in the one it has.

    Args:
        layouts: optimizer steps done -> layout. model_factory, options: as `TrainerSwitch`.
    """

    def __init__(
        self, layouts: Mapping[int, str | ParallelLayout], model_factory: ModelFactory, **options: Any
    ) -> None:
        self.layouts, self.model_factory, self.options = dict(layouts), model_factory, options
        self.refused: dict[int, str] = {}
        self._switch: TrainerSwitch | None = None
        self._done: int | None = None

    def __call__(self, trainer: Trainer) -> None:
        """Before each step. A run that was resumed begins in the layout that its step has.

        Raises:
            ConfigError: at the first, for a layout whose step the run never does.
        """
        if self._switch is None or self._switch.trainer is not trainer:
            if late := [step for step in self.layouts if step >= trainer.steps]:
                raise ConfigError(
                    f"step {late[0]} for layout {str(self.layouts[late[0]])!r} comes after the last of {trainer.steps} "
                    "steps: choose an earlier one."
                )
            self._switch = TrainerSwitch(trainer, self.model_factory, **self.options)
        due = max((step for step in self.layouts if step <= trainer.step), default=None)
        if due is None or due == self._done:
            return
        self._done = due
        try:
            self._switch(self.layouts[due])
        except LayoutError as error:
            self.refused[due] = str(error)
            logger.warning("step %d goes on in layout %r: %s", trainer.step, str(self._switch.state.layout), error)
