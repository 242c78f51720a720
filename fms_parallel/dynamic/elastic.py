"""Training while ranks die, freeze, leave and join: no committed step is lost, the losses are those of a quiet run.

A step is committed in two phases: every rank has its complete gradients before any rank updates (a vote of one number
just before `optimizer.step`). So when a rank is lost and the survivors meet again, either nobody has updated, and the
step is done again; or somebody has, everybody can, and does. Then the state moves into a layout for those left:

    from the survivors themselves     where they hold all of it (replicas)
    from the buddies' copies          of the last step that was copied: the steps since are done again, on the same rows
    from the last checkpoint          the same, from further back

It knows trainers and memberships; what is moved is relayout.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fms_parallel.data.rows import RowDataset
from fms_parallel.dynamic.adaptive import AdaptiveLayout
from fms_parallel.dynamic.buddy import Buddies
from fms_parallel.dynamic.choice import LayoutForRanks
from fms_parallel.dynamic.membership import Membership, Plan
from fms_parallel.dynamic.recovery import Choose, Elastic, Recovery, chosen, may_be_a_loss, restored
from fms_parallel.dynamic.relayout import ModelFactory, Relayout, agreed, release, resolved
from fms_parallel.dynamic.state import TrainingState
from fms_parallel.errors import ConfigError, TrainingError
from fms_parallel.layout import ParallelLayout
from fms_parallel.log import get_logger
from fms_parallel.phases import Phases
from fms_parallel.planner.hardware import Cluster
from fms_parallel.shape import ModelShape
from fms_parallel.strategy.base import parallel_of
from fms_parallel.training.interrupt import Interrupt
from fms_parallel.training.loop import Numbers, Outcome, Trainer
from fms_parallel.training.metrics import MetricsWriter
from fms_parallel.training.optimizer import make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import StepResult

logger = get_logger(__name__)

T = TypeVar("T")

STAGES = ("signals", "copies", "report", "save", "between", "update")
"""While `step` steps are done, in order: each ends in a collective that some ranks may have left when others are cut
off in it. The update is the last, because only what follows it counts the step as done."""


def train_elastic(
    model_factory: ModelFactory,
    data: RowDataset,
    layout: str | ParallelLayout,
    membership: Membership,
    *,
    options: TrainOptions,
    choose: Choose | None = None,
    cluster: Cluster | None = None,
    shape: ModelShape | None = None,
    buddy_every: int | None = None,
    adapt: AdaptiveLayout | None = None,
    relayout: dict[str, Any] | None = None,
    on_recovery: Callable[[Recovery], None] | None = None,
    **more: Any,
) -> Outcome:
    """`train` for one member of a job whose members change; what every member's process calls.

    Args:
        model_factory: see `ModelFactory`. layout: that is wanted, for as many ranks as there are first.
        choose: the layout for other numbers of ranks, asked on one rank; None: `LayoutForRanks`, the planner's fastest
            for ranks like those of `cluster`, or without one the nearest to `layout`. `shape` tells what fits.
        buddy_every: steps between two copies of each shard on a neighbour; None: none.
        adapt: changes the layout when that pays, made with `switch=ElasticSwitch`; tell it of steps (`on_step`).
        relayout: options of `Relayout`. on_recovery: told of every change of members. more: of `Trainer`.
    Raises:
        TrainingError: this member was given up by the others, or what was lost is nowhere. Others as in `train`.
    """
    if options.checkpoint_async:
        raise ConfigError("checkpoint_async does not go with members that change: write checkpoints in the loop.")
    asked = ParallelLayout.parse(layout)
    phases = Phases(more.get("phases", ()), data.seq_len, options.batch_size)
    how: dict[str, Any] = {"micro_batches": options.grad_accum_steps, "shape": shape, "cluster": cluster}
    pick = choose or LayoutForRanks(asked, model_factory, phases, **how)
    plan = membership.begin()
    device = torch.device("cpu") if membership.backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
    switch = Relayout(model_factory, lambda model: make_optimizer(model, options), **(relayout or {}))
    buddies = None if buddy_every is None else Buddies(buddy_every)
    elastic = Elastic(membership, switch, pick, buddies, device, options.output_path)
    try:
        with membership.connections.noting():
            if membership.first is not None:
                model = model_factory(chosen(elastic, plan), mesh=None, fill=None)  # type: ignore[arg-type]
                state = None
            else:
                state, _ = restored(elastic, plan, None)
                model = state.model
            trainer = ElasticTrainer(model, data, options, **more)
            trainer.enrol(elastic, state, on_recovery)
            trainer.adapt = adapt
        outcome = trainer.run()
    except BaseException:
        membership.abandon()
        raise
    membership.finish()
    return outcome


class ElasticTrainer(Trainer):
    """A `Trainer` that goes on when members of its job change. `enrol` it before it runs."""

    adapt: AdaptiveLayout | None = None

    def enrol(
        self, elastic: Elastic, state: TrainingState | None, on_recovery: Callable[[Recovery], None] | None = None
    ) -> None:
        """Everything that a trainer of ranks that stay does not need; `state`: of a newcomer, from the others."""
        self.elastic, self.membership, self.on_recovery = elastic, elastic.membership, on_recovery
        self.joined = state is not None
        self.recoveries: list[Recovery] = []
        self._stage, self._rewound = "update", False
        self._reported = self._committed = 0
        self._result: StepResult | None = None
        self._prepared = self._forward = self._regroup = False
        self._own_writer: MetricsWriter | None = None
        self._replays: dict[str, Callable[[], Any]] = {
            "signals": lambda: super(ElasticTrainer, self)._largest(0, 0),
            "report": self._again,
            "save": lambda: super(ElasticTrainer, self).save(),
        }
        if state is not None:
            self._go_on(state)
            self.total_tokens = state.numbers["total_tokens"]
            self._reported = self.step
        else:
            self.state = TrainingState(self.model, self.optimizer)
            self._commit_in_two_phases()
        elastic.relayout.meshes.adopt(self.state.layout, parallel_of(self.model).mesh)

    # ---- one step, committed by all or by none ------------------------------------------------------------------

    def _commit_in_two_phases(self) -> None:
        def vote(*_: Any) -> None:
            if self._forward:
                return
            self._prepared = True
            # Rank 0 looks whether somebody wants to join; everybody learns it here, at no cost of its own.
            asked = int(dist.get_rank() == 0 and self.membership.wanted())
            flag = torch.tensor([asked], device=self.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self._regroup = bool(int(flag))

        def committed(*_: Any) -> None:
            self._committed, self._prepared = self.step + 1, False

        self._committed, self._prepared = self.step, False
        self.optimizer.register_step_pre_hook(vote)
        self.optimizer.register_step_post_hook(committed)

    def _one_step(self, pending: Callable[[], int]) -> tuple[Numbers, Interrupt | None]:
        if self._regroup:
            self._recover(time.monotonic(), admit=True)
        return super()._one_step(pending)

    def _update(self) -> StepResult:
        """The step, however often members are lost on the way."""
        while True:
            at, self._result = self.step, None
            with self._in("update"):
                try:
                    self._result = super()._update()
                    return self._result
                except Exception as error:
                    self._after(error)
            if self._result is not None and self._committed == at + 1 and not self._rewound:
                return self._result  # committed with the others while they met

    def _largest(self, *values: int) -> list[int]:
        found = self._through("signals", lambda: super(ElasticTrainer, self)._largest(*values))
        if self.elastic.buddies is not None and self.step % self.elastic.buddies.every == 0:
            self._copy_once()
        return list(values) if found is None else found

    def _copy(self) -> None:
        assert self.elastic.buddies is not None
        self._note_numbers()
        self.elastic.buddies.take(self.state)

    def _copy_once(self) -> None:
        """Members that meet again copy anyhow, so who is cut off here does not do it again."""
        with self._in("copies"):
            try:
                self._copy()
            except Exception as error:
                self._after(error)

    def _report(self, numbers: Numbers, writer: MetricsWriter | None) -> None:
        if numbers["step"] <= self._reported:
            return  # done again after a loss: told already
        if writer is None and self._own_writer is None:
            self._own_writer = self._writer()  # rank 0 of this generation, whoever was before
        tell = super()._report
        self._through("report", lambda: tell(numbers, writer or self._own_writer))
        self._reported = numbers["step"]

    def _again(self) -> None:
        """What of a report others take part in, when one of them was cut off in it."""
        if self.options.validate_steps and self._due(self.options.validate_steps):
            self.validate()

    def save(self) -> Any:
        """As `Trainer`, again with others when a member is lost meanwhile."""
        return self._through("save", super().save)

    def _begin(self) -> None:
        if not self.joined:
            self._through("update", super()._begin)
            self._reported = self._committed = self.step
        if self.elastic.buddies is not None:
            self._copy_once()

    def run(self) -> Outcome:
        """As `Trainer`."""
        if self.adapt is not None:
            self.between_steps = self._adapt_once
        try:
            return super().run()
        finally:
            if self._own_writer is not None:
                self._own_writer.close()

    def _adapt_once(self, _: Trainer) -> None:
        """Nobody does it again who is cut off here: with other members it begins anew."""
        assert self.adapt is not None
        with self._in("between"):
            try:
                self.adapt(self)
            except Exception as error:
                self._after(error)

    def change_layout(self, layout: str | ParallelLayout) -> bool:
        """Between two steps; whether anything changed. Collective; errors as in `Relayout`."""
        with agreed("a change of layout"):
            self.feed_of((0, resolved(layout, self.state.layout).data_parallel))
        self._note_numbers()
        with self.membership.connections.noting():
            new = self.elastic.relayout(self.state, layout)
        changed = new is not self.state
        if changed:
            self._go_on(new)
        return changed

    # ---- when members change ------------------------------------------------------------------------------------

    @contextmanager
    def _in(self, stage: str) -> Iterator[None]:
        """Which stage of the step this rank is in, for those that meet it."""
        before, self._stage = self._stage, stage
        try:
            yield
        finally:
            self._stage = before

    def _through(self, stage: str, work: Callable[[], T]) -> T | None:
        """Work that may be done again by those that are there then; None: the step is done again instead."""
        with self._in(stage):
            while True:
                try:
                    return work()
                except Exception as error:
                    self._after(error)
                if self._rewound:
                    return None

    def _after(self, error: Exception) -> None:
        """Recover when the error came of a member's loss; else it goes on."""
        since = time.monotonic()
        if not self.membership.was_lost(self.membership.silence + 2.0 if may_be_a_loss(error) else 0.0):
            raise error
        logger.warning("step %d: a member was lost (%s)", self.step, str(error).strip().splitlines()[0][:200])
        self._recover(min(since, self.membership.lost_since or since))

    def _recover(self, since: float, admit: bool = False) -> None:
        """Meet the others, agree on the last committed step, move the state, go on; again when that fails too."""
        if self.adapt is not None:
            found = self.adapt.cluster
            self.adapt.restart()
            if found is not None and isinstance(self.elastic.choose, LayoutForRanks):
                self.elastic.choose.cluster = found
        while True:
            plan = self.membership.meet(self._said(), admit)
            try:
                with self.membership.connections.noting():
                    report = self._settle(plan, since)
                break
            except Exception as error:
                if not self.membership.was_lost(self.membership.silence + 2.0 if may_be_a_loss(error) else 0.0):
                    raise
                admit = False
        self.recoveries.append(report)
        words = (report.step, len(plan.members), report.layout, report.source, report.seconds)
        logger.warning("step %d goes on with %d members in layout %r from %s, after %.2f s", *words)
        if self.on_recovery is not None:
            self.on_recovery(report)

    def _said(self) -> dict[str, Any]:
        """What the others must know of this member."""
        return {
            "committed": self._committed,
            "place": [self.step, STAGES.index(self._stage)],
            "result": None if self._result is None else asdict(self._result),
            "copies": self.elastic.buddies.step if self.elastic.buddies is not None else None,
        }

    def _settle(self, plan: Plan, since: float) -> Recovery:
        """One step number, one layout, the state in it."""
        said = [plan.said[uid] for uid in plan.members if uid in plan.said]
        committed = max(one["committed"] for one in said)
        if self._committed < committed:
            self._catch_up(committed, said)
        if self.elastic.buddies is not None:
            self.elastic.buddies.settle(max((one["copies"] for one in said if one["copies"] is not None), default=None))
        self._note_numbers()
        self.elastic.relayout.meshes.forget()
        old, held = self.state, self.state.inventory()
        new, source = restored(self.elastic, plan, old)
        self._rewound, self._regroup = new.step < committed, False
        self._go_on(new)
        release(old, held)
        if self._rewound:
            self.total_tokens = new.numbers["total_tokens"]
        if self.elastic.buddies is not None:
            self._copy()
        if not self._rewound:
            self._help(said)
        seconds = time.monotonic() - since
        switch = self.elastic.relayout.last if source != "checkpoint" else None
        layout = str(new.layout)
        return Recovery(new.step, committed - new.step, source, plan.members, layout, seconds, switch)

    def _catch_up(self, committed: int, said: list[dict[str, Any]]) -> None:
        """Another rank has updated, so this one has its complete gradients: it updates too."""
        if not self._prepared or committed != self._committed + 1:
            raise TrainingError(
                f"a member has committed step {committed}, and this one stands at {self._committed} without gradients."
            )
        self._forward = True
        try:
            self.optimizer.step()
        finally:
            self._forward = False
        ahead = next(one for one in said if one["committed"] == committed and one["result"] is not None)
        self._result = StepResult(**ahead["result"])

    def _note_numbers(self) -> None:
        """What goes along with the state: its step, and the tokens up to there."""
        uncounted = self._result.tokens if self._result is not None and self._committed > self.step else 0
        self.state.step = self._committed
        self.state.numbers["total_tokens"] = self.total_tokens + uncounted

    def _go_on(self, state: TrainingState) -> None:
        """Adopt a state; in the middle of counting a step, that step is not counted twice."""
        assert state.optimizer is not None
        counting = self.step < state.step and self._stage == "update" and self._result is not None
        self.state = state
        self.step = state.step
        self.adopt(state.model, state.optimizer)
        self._commit_in_two_phases()
        if counting:
            self.step -= 1  # the loop adds it

    def _help(self, said: list[dict[str, Any]]) -> None:
        """Take part once more in what some were cut off in and others, like this rank, had left."""
        last = min(tuple(one["place"]) for one in said)
        stage = STAGES[last[1]]
        if stage in self._replays and last < (self.step, STAGES.index(self._stage)):
            self._replays[stage]()
