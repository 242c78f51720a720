"""What a pipeline really did, and when: the timeline of a real step, drawn below the one that its schedule promises.

    with recorded(model) as recording:
        train_step(model, optimizer, batches)
    events = recording.events()        # of all ranks of this pipeline, seconds since the step began

`train_causal.py --timeline_step N` does this and writes `timeline.png` and `timeline.json`, which chrome://tracing and
Perfetto open. It knows stages of torch's pipelining; the pictures are those of `planner/timeline.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from fms_parallel.errors import ConfigError
from fms_parallel.layout import ParallelLayout
from fms_parallel.planner.simulate import B, Event, F, Stages, W, Work
from fms_parallel.planner.timeline import write_plots, write_trace
from fms_parallel.strategy.base import parallel_of


@dataclass
class Notes:
    """What this rank has noted: work, from, until, in seconds of the wall clock."""

    device: torch.device
    entries: list[tuple[Work, float, float]] = field(default_factory=list)

    @contextmanager
    def of(self, kind: str, stage: int, micro: int) -> Iterator[None]:
        """Note what the body does."""
        start = self.now()
        yield
        self.entries.append((Work(kind, stage, micro), start, self.now()))

    def now(self) -> float:
        """On a GPU when everything asked for so far is done: a recorded step overlaps less than others."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.time()  # the clock that ranks share: that of the machine, or what keeps machines together


class RecordedStage(PipelineStage):
    """A stage of torch's that notes when it works, while `notes` is set."""

    notes: Notes | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch."""
        return self._noted(F, fwd_chunk_id, super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Backward of one micro-batch, or of its inputs alone."""
        return self._noted(B, bwd_chunk_id, super().backward_one_chunk, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """The gradients of the weights."""
        return self._noted(W, bwd_chunk_id, super().backward_weight_one_chunk, *args, **kwargs)

    def _noted(self, kind: str, micro: int, work: Any, *args: Any, **kwargs: Any) -> Any:
        if self.notes is None:
            return work(micro, *args, **kwargs)
        with self.notes.of(kind, self.stage_index, micro):
            return work(micro, *args, **kwargs)


class Recording:
    """A step that was recorded."""

    def __init__(self, notes: Notes, group: dist.ProcessGroup, start: float) -> None:
        self._notes, self._group, self._start = notes, group, start

    def events(self) -> list[Event]:
        """What every rank of this pipeline did, in seconds since the step began. Collective over the pipeline."""
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, (self._start, self._notes.entries), group=self._group)
        zero = min(start for start, _ in found)
        return [
            Event(rank, work, start - zero, end - zero)
            for rank, (_, entries) in enumerate(found)
            for work, start, end in entries
        ]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recording]:
    """Note what the model's pipeline does in the body. Collective: the ranks of a pipeline begin together.

    Raises:
        ConfigError: the model has no pipeline.
    """
    pipeline = parallel_of(model).pipeline
    if pipeline is None:
        raise ConfigError("a timeline is drawn of pipeline stages: this model's layout has no pp=N.")
    notes = Notes(pipeline.device)
    dist.barrier(pipeline.group)
    pipeline.notes = notes
    try:
        yield Recording(notes, pipeline.group, notes.now())
    finally:
        pipeline.notes = None


def promised(layout: ParallelLayout, events: Sequence[Event]) -> list[Event]:
    """The schedule's own timeline, when each stage's work takes what it took on average."""
    halves = any(event.work.kind == W for event in events)
    mean = {
        (kind, stage): fmean(
            [e.end - e.start for e in events if e.work.kind == kind and e.work.stage == stage] or [0.0]
        )
        for kind in (F, B, W)
        for stage in range(layout.stages)
    }
    forward, inputs, weight = ([mean[kind, stage] for stage in range(layout.stages)] for kind in (F, B, W))
    both = [a + b for a, b in zip(inputs, weight, strict=True)]
    # Here, because `python -m` warns of a module that its own package has imported before it runs.
    from fms_parallel.strategy.show import timeline

    return timeline(layout, Stages(forward, both, weight=weight if halves else None))


def write_timeline(layout: ParallelLayout, events: Sequence[Event], folder: Path) -> None:
    """`timeline.png`: what was promised above what was measured; `timeline.json`: the Chrome trace of the latter."""
    panels = {f"{layout.schedule}, with the stages' mean times": promised(layout, events), "measured": events}
    write_plots(panels, layout.pp, folder / "timeline.png")
    write_trace(events, folder / "timeline.json")
