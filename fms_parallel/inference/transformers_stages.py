"""Models of transformers over tp and pipeline stages, for the engine: cut by `auto/`, run over ragged batches.

    stage 0   its own forward, embedding to the last block here   --[1, N, E]-->   stage 1   its own forward, from there

`auto/` knows what every module of another stage hands out from one recorded forward, for the very shapes of it. Steps
of an engine have any number of tokens N; so one forward of a telling number of tokens is recorded, a prime that no size
of the model is, and wherever that number stands in a shape, N belongs. What the stages give together is compared with
what the whole model gave before anything is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fms_parallel.auto.blocks import BlockCall, Meta, Output, Recording
from fms_parallel.auto.cut import EndOfStage, Run
from fms_parallel.auto.engine import Engine, parallelize
from fms_parallel.auto.stage import AutoStage
from fms_parallel.errors import LayoutError
from fms_parallel.inference.ragged import RaggedBatch
from fms_parallel.inference.transformers_model import TransformersModel
from fms_parallel.layout import ParallelLayout
from fms_parallel.strategy.base import Parallel

TELLING = (997, 499, 251, 127, 61, 31, 13, 7)
"""Numbers of tokens for the recorded forward."""


@dataclass(frozen=True)
class Line:
    """What the engine reads of a pipeline (see `strategy.pipeline.Pipeline`)."""

    homes: Sequence[int]
    group: dist.ProcessGroup
    stages: list[TransformersStage]
    is_last: bool


def spread(model: nn.Module, layout: ParallelLayout) -> TransformersModel:
    """A model of transformers cut over tp and pp as `auto/` cuts it; each rank holds the same whole weights before.

    Raises:
        LayoutError: other words than tp and pp, or a model that cannot be cut so. ConfigError: see `TransformersModel`.
    """
    if layout.world_size != layout.tp * layout.pp or layout.sp:
        raise LayoutError(
            f"layout {str(layout)!r}: a model of transformers generates over tp and pp only. For others load it "
            'as one of ours: get_model("hf_pretrained", model_path=FOLDER, distributed_strategy=...).'
        )
    whole = TransformersModel(model)
    if layout.world_size == 1:
        return whole
    alone, training = whole.alone(), model.training
    rows = torch.zeros(2 * layout.pieces, 8, dtype=torch.int64)
    engine = parallelize(model, layout, {"input_ids": rows, "labels": rows}, task="causal_lm")
    parts = [stage.model.train(training) for stage in engine.stages]
    if layout.pp == 1:
        return TransformersModel(parts[0], Parallel(engine.layout, engine.mesh))
    found = TransformersModel(model, Parallel(engine.layout, engine.mesh), parts)
    found.expected, found.config.windows = alone, whole.config.windows
    recording, tokens = _recorded(engine, whole)
    _refuse_crossing(found, engine.stages[0].cut_run, recording, tokens)
    stages = [TransformersStage(found, stage, recording, tokens) for stage in engine.stages]
    assert engine.mesh is not None
    line = Line(engine.layout.homes, engine.mesh["pp"].get_group(), stages, any(stage.is_last for stage in stages))
    found.parallel = Parallel(engine.layout, engine.mesh, line)
    return found


class TransformersStage(nn.Module):
    """One stage, as `StagedRunner` runs it."""

    def __init__(self, model: TransformersModel, stage: AutoStage, recording: Recording, tokens: int) -> None:
        super().__init__()
        assert stage.cut_run is not None
        self.part, self._run = stage.model, stage.cut_run
        self._model, self._recording, self._tokens = (model,), recording, tokens  # a tuple: no submodule
        self._made: dict[int, Recording] = {}
        self.index, self.is_first, self.is_last = stage.index, stage.index == 0, stage.is_last

    def generate(self, x: Tensor, told: RaggedBatch) -> Tensor:
        """As `strategy.stages.Stage.generate`: `x` is `[1, N]` ids in the first stage, else `[1, N, E]`."""
        count = told.input_ids.shape[1]
        if count not in self._made:
            self._made[count] = _of_length(self._recording, self._tokens, count)
        self._run.begin(self._made[count], () if self.is_first else (x,), told.input_ids.device)
        try:
            return self._model[0].run(self.part, told, told.input_ids, told.positions, told.wanted)
        except EndOfStage:
            return self._run.leaving()[0]
        finally:
            self._run.values = {}


def _recorded(engine: Engine, model: TransformersModel) -> tuple[Recording, int]:
    """A forward of a number of tokens that is no size of the model, and that number."""
    sizes = {size for parameter in model.inner.parameters() for size in parameter.shape}
    longest = model.config.max_positions or TELLING[0]
    tokens = next((number for number in TELLING if number <= longest and number not in sizes), None)
    if tokens is None:
        raise LayoutError(
            f"{model.name} does not generate over pp: it takes {longest} positions, fewer than {TELLING[-1]}."
        )
    return engine.record({"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}), tokens


def _refuse_crossing(model: TransformersModel, run: Run | None, recording: Recording, tokens: int) -> None:
    """What crosses any of the cuts must be the activations alone; found alike on every rank."""
    assert run is not None
    for arriving in run.cut.arriving[1:]:
        shapes = [recording.metas[item].shape for item in arriving]
        if shapes != [(1, tokens, model.activation_width)]:
            names = ", ".join(
                f"{list(shape)} of {run.cut.blocks[i.block]}" for shape, i in zip(shapes, arriving, strict=True)
            )
            raise LayoutError(
                f"{model.name} does not generate over pp: of {tokens} tokens {names} crosses a cut, where only one "
                f"[1, {tokens}, {model.activation_width}] may. Use tp."
            )


def _of_length(recording: Recording, recorded: int, tokens: int) -> Recording:
    """The recording as one of so many tokens would be."""

    def scaled(output: Output) -> Output:
        return replace(output, leaves=tuple(leaf_of(leaf) for leaf in output.leaves))

    def leaf_of(leaf: Any) -> Any:
        if not isinstance(leaf, Meta):
            return leaf
        return leaf._replace(shape=tuple(tokens if size == recorded else size for size in leaf.shape))

    def call_of(call: BlockCall) -> BlockCall:
        return replace(call, output=scaled(call.output), inside={name: scaled(o) for name, o in call.inside.items()})

    outside = {name: [scaled(output) for output in calls] for name, calls in recording.outside.items()}
    return replace(recording, blocks=[call_of(call) for call in recording.blocks], outside=outside)
