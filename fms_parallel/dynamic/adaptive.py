"""One call: `train(model, data)` in the layout that pays, now and later. For loops of one's own see `manager.py`.

    from fms_parallel.dynamic import train
    train(model, rows, steps=10_000, batch_size=64, output_path="runs/a")

It knows trainers; what is measured and decided is adaptation.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fms_parallel.checkpoint.agree import from_every_rank, rank_and_world
from fms_parallel.data.rows import RowDataset
from fms_parallel.distributed.start import Launch, pick_device, require_group
from fms_parallel.dynamic.adaptation import Adaptation
from fms_parallel.dynamic.hardware import HardwareProfile, HardwareProfiler
from fms_parallel.dynamic.history import History
from fms_parallel.dynamic.learned import for_members, kept, learned, remembered
from fms_parallel.dynamic.manager import plan_for
from fms_parallel.dynamic.monitor import finite_metrics
from fms_parallel.dynamic.policy import Policy
from fms_parallel.dynamic.relayout import ModelFactory
from fms_parallel.dynamic.schedule import TrainerSwitch
from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.layout import ParallelLayout
from fms_parallel.phases import Phase, Phases
from fms_parallel.planner.hardware import Cluster
from fms_parallel.shape import ModelShape
from fms_parallel.strategy.base import parallel_of
from fms_parallel.strategy.compose import DTYPES, compose
from fms_parallel.training.loop import Numbers, Outcome, Trainer
from fms_parallel.training.loop import train as train_in
from fms_parallel.training.options import TrainOptions

HISTORY = "layouts.jsonl"
"""In a run's folder."""

NOTE = "layouts"
"""What was learned, in a checkpoint."""


class AdaptiveLayout:
    """`between_steps` of `fms_parallel.training.train`, and its `on_step`: changes the layout of a run when it pays.

    Args:
        model_factory: see `ModelFactory`. hardware: a profile or a cluster; None: measured before the first step.
        policy, layouts: see `DynamicStrategySelector`. every, decide_every, profile: see `Adaptation`.
        relayout: options of `Relayout`. shape: of a model whose config does not tell it.
        switch: `TrainerSwitch`, or `ElasticSwitch` where members change.
    """

    def __init__(
        self,
        model_factory: ModelFactory,
        hardware: HardwareProfile | Cluster | None = None,
        *,
        policy: str | Policy = "knowledge",
        layouts: Sequence[str | ParallelLayout] | None = None,
        shape: ModelShape | None = None,
        every: int = 2,
        decide_every: int = 10,
        profile: bool = False,
        relayout: dict[str, Any] | None = None,
        switch: Callable[..., Any] = TrainerSwitch,
    ) -> None:
        self.model_factory, self.hardware, self.shape = model_factory, hardware, shape
        self._choose: dict[str, Any] = {"policy": policy, "layouts": layouts}
        self._how: dict[str, Any] = {"every": every, "decide_every": decide_every, "profile": profile}
        self._relayout, self._make_switch = relayout or {}, switch
        self._kept: dict[str, Any] | None = None
        self.adaptation: Adaptation | None = None
        self._problem: str | None = None
        self._last = 0

    @property
    def history(self) -> History:
        """What happened, in order."""
        assert self.adaptation is not None, "the run has not begun"
        return self.adaptation.history

    def on_step(self, numbers: Numbers) -> None:
        """The numbers of a step that was just done."""
        self._problem = finite_metrics(numbers)
        if self.adaptation is not None:
            self.adaptation.monitor.lasted(numbers["seconds"])

    def __call__(self, trainer: Trainer) -> None:
        """Before each step. Collective."""
        if self.adaptation is None:
            self._begin(trainer)
        elif trainer.step > self._last:
            self._after(trainer)
        self._last = trainer.step
        assert self.adaptation is not None
        self.adaptation.monitor.restart()

    def _begin(self, trainer: Trainer) -> None:
        options, layout = trainer.options, trainer.parallel.layout
        known = self._find_hardware(trainer)
        assert self.hardware is not None
        selector, costs, self.profiles = plan_for(
            self.model_factory,
            self.hardware,
            trainer.data,
            seq_len=trainer.phases.longest,
            shape=self.shape,
            precision=layout.precision,
            micro_batches=options.grad_accum_steps,
            **self._choose,
        )
        history = None if options.output_path is None else f"{options.output_path}/{HISTORY}"
        for work in trainer.phases.works[1:]:
            selector.candidates(work)  # what no layout can do is said now, and not when its step comes
        told: dict[str, Any] = {
            "steps": trainer.steps,
            "history": history,
            "resumed": trainer.step > 0 or self._kept is not None,
        }
        self.adaptation = Adaptation(selector, costs, trainer.phases, **told, **self._how)
        self._switch = self._make_switch(trainer, self.model_factory, **self._relayout)
        if known is not None:
            self.adaptation.recall(known)
        trainer.notes[NOTE] = self._note
        self.adaptation.begin(trainer.model, trainer.step)

    def _find_hardware(self, trainer: Trainer) -> dict[str, Any] | None:
        """Measure, unless it is known from before; what was learned then. Collective."""
        told = next((one for one in from_every_rank(self._kept) if one is not None), None)
        if told is not None:  # other members than a moment ago
            self.hardware = for_members(told, self.hardware, trainer.parallel.layout.world_size)
            return dict(told["adaptation"])
        hardware = self.hardware or HardwareProfiler(trainer.device.type).profile()
        noted = trainer.noted.get(NOTE)
        before = remembered(noted, hardware)
        self.hardware = before or hardware
        return None if noted is None or before is None else dict(noted["adaptation"])

    def _note(self) -> dict[str, Any] | None:
        """For a checkpoint. Collective."""
        if self.adaptation is None:
            return None
        assert self.hardware is not None
        return learned(self.adaptation, self.hardware)

    def restart(self) -> None:
        """Members have changed: before the next step begin anew, with what is known. Not collective."""
        if self.adaptation is not None:
            assert self.hardware is not None
            self._kept = kept(self.adaptation, self.hardware)
            self.adaptation.end()
            self.adaptation = None

    @property
    def cluster(self) -> Cluster | None:
        """The machine as it was described, or measured and corrected since; None before it was."""
        if self.adaptation is not None:
            return self.adaptation.selector.cluster
        return self.hardware if isinstance(self.hardware, Cluster) else None

    def _after(self, trainer: Trainer) -> None:
        assert self.adaptation is not None
        proposal = self.adaptation.after_step(trainer.step, self._problem or "")
        if proposal is None:
            return
        try:
            changed = self._switch(proposal.layout)
        except FmsError as error:
            self.adaptation.refused(proposal.layout, trainer.step, error)
            return
        if changed:
            report = self._switch.relayout.last
            assert report is not None
            self.adaptation.switched(trainer.model, trainer.step, proposal.reason, report)

    def end(self) -> None:
        """Stop measuring and close the file."""
        if self.adaptation is not None:
            self.adaptation.end()


def train(
    model: nn.Module | ModelFactory,
    data: RowDataset,
    *,
    layout: str | ParallelLayout | None = None,
    precision: str = "fp32",
    device_type: str = "cpu",
    hardware: HardwareProfile | Cluster | None = None,
    on_step: Callable[[Numbers], None] | None = None,
    options: TrainOptions | None = None,
    adapt: dict[str, Any] | None = None,
    validation: RowDataset | None = None,
    phases: Sequence[Phase] = (),
    **values: Any,
) -> Outcome:
    """Train over all ranks of the job in the fastest layout, and change it when another one pays. Collective.

    Args:
        model: a plain module that every rank has whole, alike (its weights are kept, the module itself is left alone);
            or a `ModelFactory`, which never has it whole. layout: to start in; None: the planner's fastest.
        options: or their fields as keywords. adapt: options of `AdaptiveLayout`. Others as in `training.train`; a
            layout that cannot do a phase's rows is left when the phase begins.
    Raises:
        ConfigError: no layout fits. Others as in `training.train`.
    """
    if options is not None and values:
        raise ConfigError(f"give options or their fields, not both ({', '.join(values)}).")
    require_group()
    chosen = options or TrainOptions.of(**values)
    factory = factory_of(model, device_type) if isinstance(model, nn.Module) else model
    if hardware is None:
        hardware = HardwareProfiler(device_type).profile()
    announced = Phases(phases, data.seq_len, chosen.batch_size)
    if layout is None:
        selector, _, _ = plan_for(
            factory,
            hardware,
            None,
            seq_len=announced.longest,
            precision=precision,
            micro_batches=chosen.grad_accum_steps,
            **{key: value for key, value in (adapt or {}).items() if key in ("layouts", "shape")},
        )
        layout = selector.initial(announced.at(0)).layout
    first = ParallelLayout.parse(layout).resolve(rank_and_world()[1])
    hook = AdaptiveLayout(factory, hardware, **(adapt or {}))

    def told(numbers: Numbers) -> None:
        hook.on_step(numbers)
        if on_step is not None:
            on_step(numbers)

    try:
        built = factory(first, mesh=None, fill=None)  # type: ignore[arg-type]
        more: dict[str, Any] = {"validation": validation, "on_step": told, "between_steps": hook, "phases": phases}
        return train_in(built, data, options=chosen, **more)
    finally:
        hook.end()


def factory_of(model: nn.Module, device_type: str = "cpu") -> ModelFactory:
    """A factory that builds a plain module in any layout: the first time with its weights, then to be filled.

    Raises:
        ConfigError: the module is spread over ranks already.
    """
    if parallel_of(model).layout.world_size > 1:
        raise ConfigError("the model is spread over ranks already: give the plain module, or a factory.")

    def build(layout: ParallelLayout, *, mesh: Any, fill: Any) -> nn.Module:
        fresh = copy.deepcopy(model)
        if fill is not None:
            _forget_values(fresh)
        fresh = fresh.to(DTYPES[layout.precision])
        return compose(fresh, layout, device=pick_device(device_type, Launch.read()), mesh=mesh, fill=fill)

    return build


def _forget_values(model: nn.Module) -> None:
    """Every parameter and persistent buffer to the meta device, those that are one staying one."""
    given: dict[int, torch.Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and (
                    store is module._parameters or name not in module._non_persistent_buffers_set
                ):
                    store[name] = given.setdefault(id(tensor), _without_values(tensor))


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(tensor, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
