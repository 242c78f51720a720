"""The training loop, the same in every layout.

    for each step:   rows from (step, seed)  ->  gradients of the mean loss  ->  clip  ->  update  ->  write one line

It knows options, rows and steps. What a run is made of (model, optimizer, step number) is all that a checkpoint holds:
data, dropout and learning rate are functions of the step. It prints nothing; `on_step` is told each step's numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fms_parallel.checkpoint.agree import on_every_rank
from fms_parallel.checkpoint.background import BackgroundSaver
from fms_parallel.checkpoint.training_state import latest_training_state, load_training_state, save_training_state
from fms_parallel.data.feed import Feed
from fms_parallel.data.rows import RowDataset
from fms_parallel.distributed.mesh import data_shard
from fms_parallel.distributed.start import require_group
from fms_parallel.errors import ConfigError, TrainingError
from fms_parallel.log import get_logger
from fms_parallel.modules.dropout import Dropout
from fms_parallel.phases import Phase, Phases
from fms_parallel.strategy.base import compute_device, parallel_of
from fms_parallel.strategy.record import recorded, write_timeline
from fms_parallel.training.interrupt import Interrupt, catch_interrupts
from fms_parallel.training.metrics import METRICS, MetricsWriter, peak_memory_bytes
from fms_parallel.training.optimizer import learning_rate, make_optimizer
from fms_parallel.training.options import TrainOptions
from fms_parallel.training.step import (
    LossFunction,
    StepResult,
    TokenBatch,
    dropout_keys,
    model_loss,
    to_device,
    train_step,
)
from fms_parallel.training.validation import evaluate

logger = get_logger(__name__)

CHECKPOINTS = "checkpoints"
SAMPLES = "samples.txt"

Numbers = dict[str, Any]
"""One step: step, loss, grad_norm, lr, tokens, total_tokens, tokens_per_second, seconds, peak_memory_bytes, and
validation_loss where it was measured."""


@dataclass(frozen=True)
class Outcome:
    """Of a run: the last step's numbers, its newest checkpoint, and whether a signal ended it early."""

    step: int
    steps: int
    last: Numbers | None
    checkpoint: Path | None
    interrupted: Interrupt | None
    model: nn.Module | None = None
    """The model as it was last: another object than was given when the layout changed on the way."""


def train(
    model: nn.Module,
    data: RowDataset,
    *,
    validation: RowDataset | None = None,
    options: TrainOptions | None = None,
    on_step: Callable[[Numbers], None] | None = None,
    sample: Callable[[nn.Module], str] | None = None,
    loss_function: LossFunction = model_loss,
    between_steps: Callable[[Trainer], None] | None = None,
    phases: Sequence[Phase] = (),
    **values: Any,
) -> Outcome:
    """Train `model` on `data` in the layout that it was built in. Collective: every rank calls it alike.

    Args:
        model: from `get_model` or `compose`. data: rows, see `get_dataset`. validation: held-out rows.
        options: or their fields as keywords: `train(model, data, steps=100, lr=1e-3)`.
        on_step: told the numbers of every step, on every rank.
        sample: makes the text for `samples.txt`; called on every rank.
        loss_function: how a model is asked for its summed loss; `logits_loss` fits any module that returns logits.
        between_steps: called before every step, on every rank; may `adopt` the run's model in another layout.
        phases: steps from which on rows are longer or batches larger; `data` has rows of the longest.
    Raises:
        ConfigError: options that contradict each other, the length of the run or the data; no process group for ranks.
        TrainingError: see `train_step`.
    """
    require_group()
    if options is not None and values:
        raise ConfigError(f"give options or their fields, not both ({', '.join(values)}).")
    chosen = options or TrainOptions.of(**values)
    run = Trainer(model, data, chosen, validation, on_step, sample, loss_function, phases)
    run.between_steps = between_steps
    return run.run()


class Trainer:
    """One run: what `train` does, step by step."""

    def __init__(
        self,
        model: nn.Module,
        data: RowDataset,
        options: TrainOptions,
        validation: RowDataset | None = None,
        on_step: Callable[[Numbers], None] | None = None,
        sample: Callable[[nn.Module], str] | None = None,
        loss_function: LossFunction = model_loss,
        phases: Sequence[Phase] = (),
    ) -> None:
        self.model, self.data, self.options, self.validation = model, data, options, validation
        self.on_step, self.sample, self.loss_function = on_step, sample, loss_function
        self.parallel = parallel_of(model)
        self.device = compute_device(next(model.parameters()))
        self.between_steps: Callable[[Trainer], None] | None = None
        self.phases = Phases(phases, data.seq_len, options.batch_size)
        self.first_step = self.step = self.total_tokens = 0
        self.feed = self.feed_of(data_shard(self.parallel.mesh))
        self.steps = options.steps or self.phases.steps_for((options.epochs or 1) * len(data))
        self.optimizer = make_optimizer(model, options)
        self.checkpoint: Path | None = None
        self.notes: dict[str, Callable[[], Any]] = {}
        """What checkpoints keep beside the run, by name: gives JSON values or None, the same on every rank."""
        self.noted: dict[str, Any] = {}
        """What the checkpoint that was resumed has kept."""
        self._saver: BackgroundSaver | None = None
        self.drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())
        self._check()

    def _check(self) -> None:
        self.options.check_schedule(self.steps)
        if self.options.validate_steps and self.validation is None:
            raise ConfigError(f"validate_steps={self.options.validate_steps} without validation data.")
        if self.options.sample_steps and self.sample is None:
            raise ConfigError(f"sample_steps={self.options.sample_steps} without a sample function.")
        if self.options.timeline_step:
            self._check_timeline(self.options.timeline_step)
        if self.phases.last >= self.steps:
            raise ConfigError(
                f"phases: step {self.phases.last} comes after the last of {self.steps} steps: choose an earlier one."
            )

    def _check_timeline(self, step: int) -> None:
        if step > self.steps:
            raise ConfigError(
                f"timeline_step={step} comes after the last of {self.steps} steps: choose an earlier one."
            )
        if self.parallel.layout.pp == 1:
            raise ConfigError(f"timeline_step={step} draws pipeline stages: the layout has no pp=N.")
        # Asked for here: one rank alone draws, and its failure in the middle of a run would cost the others theirs.
        if find_spec("matplotlib") is None:
            raise ConfigError(f"timeline_step={step} needs matplotlib: pip install 'fms_parallel[plot]'.")

    def feed_of(self, shard: tuple[int, int]) -> Feed:
        """The rows of one shard. Raises ConfigError when the batch of the step that is next does not divide."""
        feed = Feed(
            self.data,
            global_batch=self.options.batch_size,
            seed=self.options.seed,
            shard=shard,
            micro_batches=self.options.grad_accum_steps,
            phases=self.phases,
        )
        feed.check(self.step)
        return feed

    def adopt(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on with the same run in another layout: a model and an optimizer that hold what the old ones held."""
        self.model, self.optimizer, self.parallel = model, optimizer, parallel_of(model)
        self.feed = self.feed_of(data_shard(self.parallel.mesh))
        self.first_step = self.step

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Resume when asked to, then step until the end or a signal."""
        if self.between_steps is None:  # else another layout may run the rows of a later phase
            for start in self.phases.starts:
                self.feed.check(start)
        self._begin()
        last: Numbers | None = None
        self.model.train()
        with catch_interrupts() as interrupt, self._saving():
            writer = self._writer()
            try:
                stop: Interrupt | None = None
                while self.step < self.steps and stop is None:
                    if self.between_steps is not None:
                        self.between_steps(self)
                    last, stop = self._one_step(interrupt.pending)
                    self._report(last, writer)
                    if self.folder is not None and (stop is not None or self._due(self.options.checkpoint_steps)):
                        self.save()
            finally:
                if writer is not None:
                    writer.close()
        return Outcome(self.step, self.steps, last, self.checkpoint, stop, self.model)

    def _one_step(self, pending: Callable[[], int]) -> tuple[Numbers, Interrupt | None]:
        """One optimizer step, what it cost, and whether any rank was asked to stop."""
        start = time.perf_counter()
        result = self._update()
        rate = learning_rate(self.step, self.steps, self.options)
        self.step += 1
        self.total_tokens += result.tokens
        numbers = self._numbers(result, rate, time.perf_counter() - start)
        # Signals reach ranks at different moments: the largest of all ranks' numbers stops all of them together.
        signal, memory = self._largest(pending(), peak_memory_bytes(self.device))
        numbers["peak_memory_bytes"] = memory
        return numbers, Interrupt(signal) if signal else None

    def _update(self) -> StepResult:
        """The rows of this step, their gradients, one update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.options)
        batches: list[TokenBatch] = [to_device(batch, self.device) for batch in self.feed.pieces(self.step)]
        with self._drawn() if self.options.timeline_step == self.step + 1 else nullcontext():
            return train_step(
                self.model,
                self.optimizer,
                batches,
                max_grad_norm=self.options.max_grad_norm or None,
                loss_function=self.loss_function,
                keys=dropout_keys(batches, self._step_seed(), self.feed.shard[0]) if self.drops else None,
                check_gradients=self.step == self.first_step,
            )

    @contextmanager
    def _drawn(self) -> Iterator[None]:
        """The body's timeline into the output folder."""
        with recorded(self.model) as recording:
            yield
        events = recording.events()
        if self._is_first:
            assert self.options.output_path is not None
            write_timeline(self.parallel.layout, events, Path(self.options.output_path))

    def _step_seed(self) -> int:
        return self.options.seed * 1_000_003 + self.step

    def _numbers(self, result: StepResult, rate: float, seconds: float) -> Numbers:
        return {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": result.tokens,
            "total_tokens": self.total_tokens,
            "tokens_per_second": result.tokens / seconds,
            "seconds": seconds,
        }

    def _largest(self, *values: int) -> list[int]:
        if self.parallel.layout.world_size == 1:
            return list(values)
        both = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return [int(value) for value in both]

    def _due(self, every: int | None) -> bool:
        """Every so many steps, and at the end."""
        return self.step == self.steps or (every is not None and self.step % every == 0)

    def _report(self, numbers: Numbers, writer: MetricsWriter | None) -> None:
        if self.options.validate_steps and self._due(self.options.validate_steps):
            numbers["validation_loss"] = self.validate()
        if writer is not None:
            writer.write(numbers)
        if self.on_step is not None:
            self.on_step(numbers)
        if self.options.sample_steps and self._due(self.options.sample_steps):
            self._write_sample()

    def validate(self) -> float:
        """Mean loss over the validation rows."""
        assert self.validation is not None
        return evaluate(
            self.model,
            self.validation,
            rows=self.options.validation_rows,
            batch_size=self.options.batch_size,
            device=self.device,
            loss_function=self.loss_function,
        )

    def _write_sample(self) -> None:
        assert self.sample is not None and self.options.output_path is not None
        text = self.sample(self.model)
        if self._is_first:
            with open(Path(self.options.output_path) / SAMPLES, "a", encoding="utf-8") as file:
                file.write(f"---- step {self.step}\n{text}\n")

    # ---- checkpoints --------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """Where checkpoints are."""
        return None if self.options.output_path is None else self.checkpoints_in(self.options.output_path)

    @staticmethod
    def checkpoints_in(output_path: str) -> Path:
        """Where checkpoints are below a run's folder."""
        return Path(output_path) / CHECKPOINTS

    def _fingerprint(self) -> Numbers:
        """What the data order depends on: a resumed run must have the same."""
        chosen = {"seed": self.options.seed, "batch_size": self.options.batch_size}
        begun = self.phases.begun(self.step)
        plain = begun == [[0, self.data.seq_len, self.options.batch_size]]
        return {**chosen, "seq_len": self.data.seq_len, "rows": len(self.data), **({} if plain else {"phases": begun})}

    def save(self) -> Path | None:
        """Write a checkpoint of this step; None while a thread still writes it. Collective."""
        if self.folder is None:
            raise ConfigError("a checkpoint needs output_path.")
        notes = {name: told for name, tell in self.notes.items() if (told := tell()) is not None}
        numbers = {"total_tokens": self.total_tokens, "data": self._fingerprint(), "steps": self.steps}
        state: dict[str, Any] = {
            "step": self.step,
            "model": self.model,
            "optimizer": self.optimizer,
            "numbers": {**numbers, **({"notes": notes} if notes else {})},
            "keep": self.options.keep_checkpoints,
        }
        if self._saver is not None:
            self._saver.save(self.folder, **state)
            return None
        self.checkpoint = save_training_state(self.folder, **state)
        return self.checkpoint

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """With checkpoint_async, a thread that writes; the last checkpoint is whole when the body has ended."""
        if not self.options.checkpoint_async:
            yield
            return
        with BackgroundSaver() as self._saver:
            yield
            self.checkpoint = self._saver.wait() or self.checkpoint
        self._saver = None

    def _begin(self) -> None:
        """A fresh folder, or the newest checkpoint in it."""
        if self.folder is None:
            return
        # All ranks have looked before one of them writes here.
        with on_every_rank(f"looking into {self.folder}"):
            found = latest_training_state(self.folder)
            taken = found is not None or (self.folder.parent / METRICS).exists()
            if taken and self.options.resume == "never":
                raise ConfigError(
                    f"{self.folder.parent} holds a run already: resume=auto goes on with it, or name another."
                )
        if found is not None:
            self.restore(found)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, which may come from another layout. Collective.

        Raises:
            TrainingError: it was trained on rows in another order.
        """
        numbers = load_training_state(path, self.model, self.optimizer)
        self.first_step = self.step = numbers["step"]
        then, now = numbers["data"], self._fingerprint()
        if changed := [
            f"{name}: {then.get(name)} then, {now.get(name)} now"
            for name in {**now, **then}
            if then.get(name) != now.get(name)
        ]:
            raise TrainingError(f"{path} cannot be continued, its data order would change: {'; '.join(changed)}.")
        self.total_tokens, self.checkpoint = numbers["total_tokens"], path
        self.noted = numbers.get("notes", {})
        logger.info("resumed from %s at step %d of %d", path, self.step, self.steps)

    @property
    def _is_first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def _writer(self) -> MetricsWriter | None:
        if self.options.output_path is None or not self._is_first:
            return None
        return MetricsWriter(Path(self.options.output_path), self.step)
