"""`ParallelismManager`: a run whose layout follows what pays, for a training loop of one's own.

    manager = ParallelismManager(model_factory, optimizer_factory, dataset, batch_size=64)
    manager.initialize()                       # profiles hardware, model and dataset; builds the first layout
    for batch in manager.loader():
        metrics = train_step(manager.state, batch)
        manager.step(metrics)                  # may change the layout: manager.state is another object then
    manager.cleanup()

The losses are those of a run that never changes: rows are a function of the step, the state moves bit by bit. It knows
factories and rows; measuring and deciding is adaptation.py's, moving relayout.py's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fms_parallel.checkpoint.agree import rank_and_world
from fms_parallel.data.feed import Batch, Feed
from fms_parallel.data.rows import RowDataset
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.distributed.start import require_group
from fms_parallel.dynamic.adaptation import Adaptation, Proposal
from fms_parallel.dynamic.describe import SwitchCosts, describe
from fms_parallel.dynamic.hardware import HardwareProfile, HardwareProfiler
from fms_parallel.dynamic.history import Event, History
from fms_parallel.dynamic.learned import learned, remembered
from fms_parallel.dynamic.monitor import finite_metrics
from fms_parallel.dynamic.policy import Policy
from fms_parallel.dynamic.relayout import ModelFactory, OptimizerFactory, Relayout, SchedulerFactory
from fms_parallel.dynamic.selector import DynamicStrategySelector
from fms_parallel.dynamic.state import TrainingState
from fms_parallel.dynamic.workload import DatasetProfile, DatasetProfiler, ModelProfile, ModelProfiler
from fms_parallel.errors import ConfigError, FmsError, LayoutError
from fms_parallel.layout import ParallelLayout
from fms_parallel.modules.dropout import Dropout
from fms_parallel.phases import Phase, Phases
from fms_parallel.planner.hardware import Cluster
from fms_parallel.shape import ModelShape
from fms_parallel.strategy.base import compute_device, parallel_of
from fms_parallel.strategy.compose import refuses
from fms_parallel.training.step import LossFunction, TokenBatch, dropout_keys, model_loss, to_device
from fms_parallel.training.step import train_step as one_step

SEED = "seed"
"""Of a state's numbers: what dropout is drawn from."""


@dataclass(frozen=True)
class Profiles:
    """What a run works with and on; `dataset` is None when it has none, `hardware` when a cluster was described."""

    hardware: HardwareProfile | None
    model: ModelProfile
    dataset: DatasetProfile | None


class ParallelismManager:
    """One run.

    Args:
        model_factory: see `ModelFactory`. optimizer_factory, scheduler_factory: build theirs for a new model.
        dataset: rows that `loader` reads; None: the batches come from elsewhere, and `seq_len` says how long rows are.
        batch_size: rows of a step over all ranks. enable_dynamic_adaptation: False keeps the first layout.
        layout: to start in; None: the planner's fastest. layouts: the only ones to choose from.
        steps: of the run (None: one pass over the dataset). micro_batches: pieces of a rank's share.
        policy: `knowledge`, `thompson`, `rules`, or an object with `decide`. phases: announced changes of rows.
        hardware: a profile or a cluster, instead of measuring one. shape: of a model whose config does not tell it.
        history: file of JSON lines. every, decide_every: steps of a window, and between two decisions.
        relayout: options of `Relayout`. profile_communication: look at the messages of one step per layout.
    """

    def __init__(
        self,
        model_factory: ModelFactory,
        optimizer_factory: OptimizerFactory,
        dataset: RowDataset | None = None,
        batch_size: int = 8,
        enable_dynamic_adaptation: bool = True,
        *,
        scheduler_factory: SchedulerFactory | None = None,
        layout: str | ParallelLayout | None = None,
        layouts: Sequence[str | ParallelLayout] | None = None,
        seq_len: int | None = None,
        steps: int | None = None,
        micro_batches: int = 1,
        precision: str = "fp32",
        policy: str | Policy = "knowledge",
        phases: Sequence[Phase] = (),
        hardware: HardwareProfile | Cluster | None = None,
        shape: ModelShape | None = None,
        history: str | None = None,
        every: int = 2,
        decide_every: int = 10,
        seed: int = 0,
        device_type: str = "cpu",
        relayout: Mapping[str, Any] | None = None,
        profile_communication: bool = False,
    ) -> None:
        if dataset is None and seq_len is None:
            raise ConfigError("without a dataset say how long its rows are: seq_len=N.")
        if dataset is None and steps is None:
            raise ConfigError("without a dataset say how long the run is: steps=N.")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.micro_batches, self.precision, self.device_type = micro_batches, precision, device_type
        self.seq_len = seq_len or (dataset.seq_len if dataset is not None else 0)
        self.phases = Phases(phases, self.seq_len, batch_size)
        self.steps = steps or self.phases.steps_for(len(dataset or ()))
        self.relayout = Relayout(model_factory, optimizer_factory, scheduler_factory, **(relayout or {}))
        self._hardware, self._shape, self._layout, self._layouts = hardware, shape, layout, layouts
        self._policy = policy
        self._how: dict[str, Any] = {"every": every, "decide_every": decide_every, "history": history}
        self._how |= {"enabled": enable_dynamic_adaptation, "profile": profile_communication}
        self._state: TrainingState | None = None

    # ---- the five calls -----------------------------------------------------------------------------------------

    def initialize(self, known: dict[str, Any] | None = None) -> TrainingState:
        """Profile, choose, build. Collective.

        Args:
            known: what `learned` told in an earlier run; on another machine it does not count.
        Raises:
            ConfigError: no layout fits. LayoutError: the one asked for does not, or the factory built another.
        """
        if self._state is not None:
            raise ConfigError("initialize() was called already: one manager is one run.")
        require_group()
        hardware = self._hardware or HardwareProfiler(self.device_type).profile()
        before = remembered(known, hardware)
        self._hardware = before or hardware
        self.selector, costs, self.profiles = plan_for(
            self.relayout.model_factory,
            self._hardware,
            self.dataset,
            seq_len=self.phases.longest,
            shape=self._shape,
            precision=self.precision,
            policy=self._policy,
            layouts=self._layouts,
            micro_batches=self.micro_batches,
        )
        self.adaptation = Adaptation(self.selector, costs, self.phases, steps=self.steps, **self._how)
        if known is not None and before is not None:
            self.adaptation.recall(known["adaptation"])
        layout = self._first_layout()
        mesh = self.relayout.meshes.get(layout, self.device_type)
        model = self.relayout.model_factory(layout, mesh=mesh, fill=None)  # type: ignore[arg-type]
        if parallel_of(model).layout != layout:
            built = str(parallel_of(model).layout)
            raise LayoutError(
                f"the model factory was asked for layout {str(layout)!r} and built {built!r}: hand it on."
            )
        assert self.relayout.optimizer_factory is not None
        optimizer = self.relayout.optimizer_factory(model)
        make = self.relayout.scheduler_factory
        scheduler = None if make is None else make(optimizer)
        self._state = TrainingState(model, optimizer, scheduler=scheduler, numbers={SEED: self.seed})
        self.adaptation.begin(model, 0)
        return self._state

    def _first_layout(self) -> ParallelLayout:
        if self._layout is None:
            return self.selector.initial(self.phases.at(0)).layout
        _, world = rank_and_world()
        layout = ParallelLayout.parse(self._layout).resolve(world)
        if isinstance(self._layout, str) and "precision" not in self._layout:
            layout = replace(layout, precision=self.precision)
        layout.validate(self.selector.shape)
        return layout

    @property
    def state(self) -> TrainingState:
        """The run now; another object after every change of layout."""
        if self._state is None:
            raise ConfigError("there is no run yet: call initialize() first.")
        return self._state

    def loader(self, steps: int | None = None) -> Iterator[Batch | list[Batch]]:
        """This rank's rows of each step, from the one that is next, in the layout and the phase of that step.

        With `micro_batches` above 1 each is a list of so many pieces.
        """
        if self.dataset is None:
            raise ConfigError("this manager has no dataset: give it one, or cut batches with share_of_batch().")
        last = self.steps if steps is None else min(self.state.step + steps, self.steps)
        while self.state.step < last:
            began, step = time.perf_counter(), self.state.step
            pieces = list(self._feed().pieces(step))
            self.adaptation.monitor.waited(time.perf_counter() - began)
            yield pieces[0] if self.micro_batches == 1 else pieces
            if self.state.step == step:
                raise ConfigError(f"step {step}: manager.step(metrics) was not called for the last batch.")

    def _feed(self) -> Feed:
        assert self.dataset is not None
        return Feed(
            self.dataset,
            global_batch=self.batch_size,
            seed=self.seed,
            shard=data_shard(parallel_of(self.state.model).mesh),
            micro_batches=self.micro_batches,
            phases=self.phases,
        )

    def step(self, metrics: Any) -> Event | None:
        """A step is done. Between two windows it only looks at the clock; then it may change the layout. Collective.

        Args:
            metrics: a mapping with the step's `loss`. What is missing or not finite is noted, and the step not counted.
        Returns:
            the event, when the layout changed or a change was refused.
        """
        state = self.state
        state.step += 1
        proposal = self.adaptation.after_step(state.step, finite_metrics(metrics))
        return None if proposal is None else self._carry_out(proposal)

    def _carry_out(self, proposal: Proposal) -> Event:
        state = self.state
        try:
            new = self.relayout(state, proposal.layout)
        except FmsError as error:
            self.adaptation.refused(proposal.layout, state.step, error)
            return self.history.events[-1]
        self._state = new
        if new is not state:
            assert self.relayout.last is not None
            self.adaptation.switched(new.model, new.step, proposal.reason, self.relayout.last)
        return self.history.events[-1]

    def cleanup(self) -> None:
        """Stop measuring and close files; the state stays as it is."""
        if self._state is not None:
            self.adaptation.end()

    # ---- beside them --------------------------------------------------------------------------------------------

    def request(self, layout: str | ParallelLayout) -> None:
        """Change to this layout at the end of the window; to be asked for on every rank alike."""
        self.adaptation.asked = layout

    def learned(self) -> dict[str, Any]:
        """What the run has learned of its machine and its layouts, to be kept with a checkpoint. Collective."""
        assert self._hardware is not None, "initialize() was not called"
        return learned(self.adaptation, self._hardware)

    @property
    def history(self) -> History:
        """What happened, in order."""
        return self.adaptation.history

    def status(self) -> dict[str, Any]:
        """Where the run is: step, layout, seconds of a step as last measured, number of changes, slow ranks."""
        windows = self.history.of("window")
        return {
            "step": self.state.step,
            "layout": str(self.state.layout),
            "seconds": windows[-1].more["seconds"] if windows else None,
            "switches": len(self.history.of("switch")),
            "slowness": list(self.adaptation.stragglers.slowness),
        }

    def __enter__(self) -> ParallelismManager:
        self.initialize()
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def train_step(
    state: TrainingState,
    batch: Any,
    *,
    max_grad_norm: float | None = 1.0,
    loss_function: LossFunction = model_loss,
) -> dict[str, float]:
    """One optimizer step of `manager.state` on this rank's rows; metrics for `manager.step`.

    Args:
        batch: with `input_ids` and `labels [b, S]`, or a list of such micro-batches. It must be this rank's share.
    Raises:
        TrainingError: as `fms_parallel.training.train_step`.
    """
    model, optimizer = state.model, state.optimizer
    assert optimizer is not None
    parts = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    device = compute_device(next(model.parameters()))
    batches: list[TokenBatch] = [to_device(part, device) for part in parts]
    drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())
    index, _ = data_shard(parallel_of(model).mesh)
    seed = int(state.numbers.get(SEED, 0)) * 1_000_003 + state.step
    keys = dropout_keys(batches, seed, index) if drops else None
    result = one_step(model, optimizer, batches, max_grad_norm=max_grad_norm, loss_function=loss_function, keys=keys)
    if state.scheduler is not None:
        state.scheduler.step()
    return {"loss": result.loss, "grad_norm": result.grad_norm, "tokens": float(result.tokens)}


def share_of_batch(state: TrainingState, batch: TokenBatch) -> Batch:
    """This rank's rows of a global batch that every rank was given whole.

    Raises:
        ConfigError: they do not divide.
    """
    index, count = data_shard(parallel_of(state.model).mesh)
    whole = Batch(torch.as_tensor(batch.input_ids), torch.as_tensor(batch.labels))
    return list(whole.split(count))[index]


# ---- shared with the trainer's hook -----------------------------------------------------------------------------


def plan_for(
    model_factory: ModelFactory,
    hardware: HardwareProfile | Cluster,
    dataset: RowDataset | None,
    *,
    seq_len: int,
    shape: ModelShape | None = None,
    precision: str = "fp32",
    **choosing: Any,
) -> tuple[DynamicStrategySelector, SwitchCosts, Profiles]:
    """Selector, costs and profiles of a run; `choosing`: of `DynamicStrategySelector`."""
    native = describe(model_factory, precision)
    profile = ModelProfiler(shape or native).profile(seq_len)
    measured = hardware if isinstance(hardware, HardwareProfile) else None
    cluster = hardware.cluster() if isinstance(hardware, HardwareProfile) else hardware
    _, world = rank_and_world()
    if cluster.gpus != world:
        raise ConfigError(f"the hardware describes {cluster.gpus} devices and the job has {world} ranks: one for each.")
    runs = refuses(native, profile.shape)
    selector = DynamicStrategySelector(cluster, profile.shape, precision=precision, runs=runs, **choosing)
    rate = measured.bytes_per_s if measured is not None else cluster.device.inter.gb_s * 1e9
    rows = None if dataset is None else DatasetProfiler(dataset).profile()
    return selector, SwitchCosts(native, rate), Profiles(measured, profile, rows)
