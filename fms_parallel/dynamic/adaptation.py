"""`Adaptation`: between two steps of a run, measure, notice what has changed, and decide, once, for all ranks.

    every window     gather what all ranks measured; look for slow ranks and full memories
    every decision   (and at once when something was found or a phase begins) rank 0 asks the policy, all hear of it

It knows monitors, selectors and costs. Whoever steps the run carries a proposal out, and says what came of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.checkpoint.agree import from_every_rank, rank_and_world
from fms_parallel.dynamic import history as kinds
from fms_parallel.dynamic.describe import SwitchCosts
from fms_parallel.dynamic.history import History
from fms_parallel.dynamic.monitor import Monitor, Window
from fms_parallel.dynamic.relayout import SwitchReport
from fms_parallel.dynamic.selector import DynamicStrategySelector
from fms_parallel.dynamic.stragglers import Stragglers
from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.log import get_logger
from fms_parallel.phases import Phases
from fms_parallel.strategy.base import parallel_of

logger = get_logger(__name__)

FULL = 0.9
"""Part of a rank's memory above which a layout with less is looked for."""


@dataclass(frozen=True)
class Proposal:
    """A layout to change to before the next step, and why."""

    layout: ParallelLayout
    reason: str


class Adaptation:
    """Decides for one run.

    Args:
        steps: of the whole run. every: steps of a window. decide_every: steps between two decisions.
        enabled: False measures and carries out what is asked for, and decides nothing itself.
        history: file of JSON lines that rank 0 writes, at its end when the run is `resumed`. profile: see `Monitor`.
    """

    def __init__(
        self,
        selector: DynamicStrategySelector,
        costs: SwitchCosts,
        phases: Phases,
        *,
        steps: int,
        every: int = 2,
        decide_every: int = 10,
        enabled: bool = True,
        history: str | None = None,
        resumed: bool = False,
        profile: bool = False,
    ) -> None:
        if min(every, decide_every, steps) < 1:
            raise ConfigError(f"every={every}, decide_every={decide_every}, steps={steps}: each is at least 1.")
        self.selector, self.costs, self.phases = selector, costs, phases
        self.steps, self.decide_every, self.enabled = steps, decide_every, enabled
        self.rank, self.ranks = rank_and_world()
        self.history = History(history if self.rank == 0 else None, resumed)
        self.monitor = Monitor(every, profile)
        self.stragglers = Stragglers(self.ranks)
        self.asked: str | ParallelLayout | None = None
        self._windows: list[Window] = []
        self._changed = self._decided = 0
        self._pressed = False

    def begin(self, model: nn.Module, step: int) -> None:
        """The run starts with this model, before step `step` (from 0)."""
        self.layout = parallel_of(model).layout
        self._changed = self._decided = step
        self._basis = (self.phases.at(step), self.stragglers.slowness)
        self.monitor.watch(model)
        self.history.add(kinds.START, step, f"begins in layout {str(self.layout)!r}", layout=str(self.layout))

    # ---- after every step ---------------------------------------------------------------------------------------

    def after_step(self, step: int, problem: str = "") -> Proposal | None:
        """To be called when `step` steps are done, on every rank; a change to carry out, the same on every rank.

        Args:
            problem: why the step's metrics do not count; such a step is not decided from.
        """
        if problem:
            self.history.add(kinds.METRICS, step, f"{problem}: this step is not counted")
            logger.warning("step %d is not counted: %s", step, problem)
        ended = self.monitor.step_done(bool(problem), self.asked is not None)
        begins = self.phases.begins(step)
        if not (ended or begins) or step >= self.steps:
            return None
        window = self.monitor.gather(step)
        news = self._news(window, step, begins)
        asked = self._asked_for(window, step)
        if asked is not None:
            return asked
        if not self.enabled or (not news and step - self._decided < self.decide_every):
            return None
        proposal = self._told(self._decided_on(step, news) if self.rank == 0 else None)
        self._windows, self._decided = [], step
        return proposal

    def _asked_for(self, window: Window, step: int) -> Proposal | None:
        """What a person asked for, when every rank was asked for the same."""
        if not any(rank.asked for rank in window.ranks):
            return None
        words = from_every_rank(self.asked)
        self.asked = None
        if any(word != words[0] for word in words):
            told = ", ".join(f"rank {rank} for {str(word)!r}" for rank, word in enumerate(words))
            self._refuse(step, f"ranks ask for different layouts ({told}): ask on every rank for the same")
            return None
        return Proposal(words[0], "asked for")  # type: ignore[arg-type]

    def _news(self, window: Window, step: int, begins: bool) -> str:
        """What calls for a decision at once."""
        self.history.add(kinds.WINDOW, **window.as_json())
        news = []
        if window.measured:
            self._windows.append(window)
            if found := self.stragglers.hear([rank.block for rank in window.ranks]):
                self.history.add(kinds.STRAGGLER, step, found, slowness=list(self.stragglers.slowness))
                self._windows = self._windows[-2:]  # what was measured before was another machine
                self._basis = (self._basis[0], self.stragglers.slowness)
                news.append(found)
            self._calibrate(window)
        pressed = window.memory > FULL
        if pressed and not self._pressed:
            news.append(f"{window.memory:.0%} of a rank's memory is in use")
            self.history.add(kinds.MEMORY, step, news[-1])
        self._pressed = pressed
        if begins:
            work = self.phases.at(step)
            news.append(f"rows of {work.seq_len} tokens, {work.batch_size} in a step")
            self.history.add(kinds.PHASE, step, news[-1])
        return "; ".join(news)

    def _calibrate(self, window: Window) -> None:
        """Once: the devices are as fast as the faster half of the ranks is with a block."""
        half = sorted(rank.block for rank in window.ranks)[: max(self.ranks // 2, 1)]
        factor = self.selector.calibrate(self.layout, self._basis[0], fmean(half))
        if factor is not None:
            self.history.add(kinds.CALIBRATED, window.step, f"a block takes {factor:.2f} times what was predicted")

    # ---- rank 0 -------------------------------------------------------------------------------------------------

    def _decided_on(self, step: int, news: str) -> Proposal | None:
        """A decision that cannot fail: the other ranks wait for it."""
        try:
            return self._decide(step, news)
        except Exception as error:
            self._refuse(step, f"no decision was reached ({type(error).__name__}: {error})")
            return None

    def _decide(self, step: int, news: str) -> Proposal | None:
        work, slowness = self.phases.at(step), self.stragglers.slowness
        if self._pressed:
            return self._lighter(step, news)
        candidates = self.selector.candidates(work, self.layout, slowness)
        if not any(one.layout == self.layout for one in candidates):
            if self.selector.can_run(self.layout, work):
                self.history.add(kinds.STAY, step, "the planner has no price for the layout that the run is in")
                return None
            best = min(candidates, key=lambda one: one.seconds)
            return Proposal(best.layout, f"{news}: the old layout cannot do that")
        here = next(one for one in candidates if one.layout == self.layout)
        layout, verdict = self.selector.decide(
            candidates,
            self.layout,
            lambda layout: self.costs.seconds(self.layout, layout),
            remaining=self.phases.until(step, self.steps),
            since=step - self._changed,
            urgent=bool(news),
            condition=slowness,
            **self._measured(here.seconds),
        )
        if layout == self.layout:
            self.history.add(kinds.STAY, step, verdict.reason)
            return None
        return Proposal(layout, f"{news}: {verdict.reason}" if news else verdict.reason)

    def _measured(self, predicted: float) -> dict[str, Any]:
        """Seconds of a step now, from what was measured under what is predicted; nothing when nothing was."""
        counted = [window.seconds for window in self._windows]
        was = self.selector.priced(self.layout, *self._basis)
        self._basis = (self.phases.at(self._windows[-1].step) if self._windows else self._basis[0], self._basis[1])
        if not counted or was is None:
            return {}
        scatter = median(window.scatter for window in self._windows) / len(counted) ** 0.5
        return {"seconds": median(counted) * predicted / was.seconds, "spread": max(scatter, 0.005)}

    def _lighter(self, step: int, news: str) -> Proposal | None:
        """The fastest layout that needs clearly less memory, whatever it costs: the alternative is to end."""
        found = self.selector.less_memory(self.phases.at(step), self.layout)
        if not found:
            self._refuse(step, f"{news or 'memory is full'}, and no layout needs less")
            return None
        here = f"{found[0].memory_gb:.2f} GiB predicted"
        return Proposal(found[0].layout, f"{news or 'memory is full'}: {here}")

    def _told(self, proposal: Proposal | None) -> Proposal | None:
        """Rank 0's proposal on every rank: one number, and the words only when there are some. Collective."""
        if self.ranks == 1:
            return proposal
        flag = torch.tensor([int(proposal is not None)], device=self.monitor.device)
        dist.broadcast(flag, 0)
        if not int(flag):
            return None
        words: list[Any] = [proposal]
        dist.broadcast_object_list(words, 0, device=self.monitor.device)
        found: Proposal = words[0]
        return found

    # ---- what came of it ----------------------------------------------------------------------------------------

    def switched(self, model: nn.Module, step: int, reason: str, report: SwitchReport) -> None:
        """The run goes on in another layout."""
        self.costs.learn(report)
        numbers = {key: value for key, value in asdict(report).items() if key != "step"}
        self.history.add(kinds.SWITCH, step, reason, **numbers)
        logger.info("step %d: %r because %s", step, str(parallel_of(model).layout), reason)
        self.layout = parallel_of(model).layout
        self._changed, self._windows = step, []
        self._basis = (self.phases.at(step), self.stragglers.slowness)
        self.stragglers.restart()
        self.monitor.watch(model)

    def refused(self, layout: Any, step: int, error: Exception) -> None:
        """A change was refused; the run goes on as it was. A layout that is refused twice is not proposed again."""
        if isinstance(layout, ParallelLayout):
            self.selector.refused[layout] = self.selector.refused.get(layout, 0) + 1
        self._refuse(step, str(error))
        self.monitor.restart()

    def _refuse(self, step: int, why: str) -> None:
        self.history.add(kinds.REFUSED, step, why)
        logger.warning("step %d goes on in layout %r: %s", step, str(self.layout), why)

    def known_here(self) -> dict[str, Any]:
        """What was learned, as JSON values; rank 0, who decides, knows most."""
        costs = {"bytes_per_s": self.costs.bytes_per_s, "rest": self.costs.rest, "learned": self.costs.learned}
        return {"selector": self.selector.learned(), "costs": costs}

    def learned(self) -> dict[str, Any]:
        """What rank 0 has learned, the same on every rank. Collective."""
        values = [self.known_here()]
        if self.ranks > 1:
            dist.broadcast_object_list(values, 0, device=self.monitor.device)
        return values[0]

    def recall(self, values: dict[str, Any]) -> None:
        """Know again what `learned` told, before the first decision."""
        self.selector.recall(values["selector"])
        for name, value in values["costs"].items():
            setattr(self.costs, name, value)

    def end(self) -> None:
        """Stop measuring and close the file."""
        self.monitor.detach()
        self.history.close()
