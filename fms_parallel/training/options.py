"""`TrainOptions`: every number of a training run except the model, the layout and the data.

It knows numbers and rules; no torch, so that a command line is checked before anything slow is imported. The help texts
here are the ones that `scripts/train_causal.py --help` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from math import isfinite
from numbers import Integral, Real
from os import PathLike
from typing import Any

from fms_parallel.errors import ConfigError, unknown

SCHEDULES = ("cosine", "wsd", "constant")
RESUME = ("never", "auto")


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainOptions:
    """One run. Each field's meaning is its help text; `output_path=None` writes nothing."""

    steps: int | None = _option(None, "optimizer steps (instead of --epochs)", type=int)
    epochs: int | None = _option(
        None, "passes over the training data (default: one, when --steps is not given)", type=int
    )
    batch_size: int = _option(8, "sequences per optimizer step, over all ranks and micro-batches")
    grad_accum_steps: int = _option(1, "micro-batches that a rank's share of a step is worked on in")
    lr: float = _option(3e-4, "highest learning rate")
    min_lr: float = _option(0.1, "learning rate at the end, as a fraction of --lr")
    lr_schedule: str = _option("cosine", "after the warm-up", choices=SCHEDULES)
    warmup_steps: int = _option(0, "steps of linear warm-up")
    decay_steps: int | None = _option(
        None, "wsd only: steps of the final decay (default: a fifth of the run)", type=int
    )
    weight_decay: float = _option(0.1, "decoupled; of matrices and embeddings, not of norms and biases")
    beta1: float = _option(0.9, "of AdamW")
    beta2: float = _option(0.95, "of AdamW")
    max_grad_norm: float = _option(1.0, "clip the gradient norm of the whole model to this; 0 does not clip")
    offload_bucket_bytes: int = _option(
        64 * 2**20, "with offload=optimizer_state or optimizer_step: how much is moved at a time"
    )
    seed: int = _option(0, "of the data order, of dropout and of the initial weights")
    report_steps: int = _option(10, "show a progress line every so many steps; metrics.jsonl has every step")
    validate_steps: int | None = _option(
        None, "measure the validation loss every so many steps, and at the end", type=int
    )
    validation_rows: int = _option(64, "rows of the validation data that are measured")
    sample_steps: int | None = _option(None, "write a generated sample every so many steps, and at the end", type=int)
    checkpoint_steps: int | None = _option(None, "write a checkpoint every so many steps; always at the end", type=int)
    timeline_step: int | None = _option(
        None, "draw what the pipeline does in this step (timeline.png, .json)", type=int
    )
    checkpoint_async: bool = _option(
        False, "write checkpoints in a thread, from a host copy of weights and optimizer, while training goes on"
    )
    keep_checkpoints: int | None = _option(2, "newest checkpoints that are kept", type=int)
    output_path: str | None = _option(None, "folder for metrics, samples and checkpoints", type=str)
    resume: str = _option("never", "auto: go on from the newest whole checkpoint in --output_path", choices=RESUME)

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: must be >= {least}.")
        for name, known in (("lr_schedule", SCHEDULES), ("resume", RESUME)):
            if getattr(self, name) not in known:
                raise ConfigError(unknown(name, getattr(self, name), known))
        if not (self.lr > 0 and 0 <= self.min_lr <= 1):
            raise ConfigError(
                f"lr={self.lr}, min_lr={self.min_lr}: lr must be > 0 and min_lr a fraction of it in [0, 1]."
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1={self.beta1}, beta2={self.beta2}: must lie in [0, 1).")
        self._check_pairs()

    def _check_kinds(self) -> None:
        """Numbers are numbers of their field's kind, and finite."""
        for each in fields(self):
            value, kind = getattr(self, each.name), each.metadata.get("type") or type(each.default)
            if value is None and "type" in each.metadata:
                continue
            if not isinstance(value, _TAKEN[kind]) or isinstance(value, bool) is not (kind is bool):
                raise ConfigError(f"{each.name}={value!r}: must be {_KINDS[kind]}.")
            if kind is float and not isfinite(value):
                raise ConfigError(f"{each.name}={value}: must be a finite number.")

    def check_schedule(self, steps: int) -> None:
        """Raises ConfigError when a run of so many steps is too short for the warm-up or the final decay."""
        if self.warmup_steps > steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} is longer than the run of {steps} steps, which would never reach "
                f"lr={self.lr}: warm up for at most {steps} steps, or train longer."
            )
        if self.decay_steps is not None and self.decay_steps > steps - self.warmup_steps:
            raise ConfigError(
                f"decay_steps={self.decay_steps} after warmup_steps={self.warmup_steps} in a run of {steps} steps: "
                f"decay for at most {steps - self.warmup_steps} steps, or train longer."
            )

    def _check_pairs(self) -> None:
        """What is given must have an effect."""
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"steps={self.steps} and epochs={self.epochs}: give one of them.")
        if self.steps is not None:
            self.check_schedule(self.steps)
        if self.decay_steps is not None and self.lr_schedule != "wsd":
            raise ConfigError(f"decay_steps={self.decay_steps} belongs to lr_schedule=wsd, not {self.lr_schedule}.")
        for name, idle, way_out in (
            ("min_lr", self.lr_schedule == "constant", "lr_schedule=constant ends at lr: choose cosine or wsd"),
            ("validation_rows", self.validate_steps is None, "nothing is validated: give validate_steps"),
            ("keep_checkpoints", self.output_path is None, "no checkpoint is written: give output_path"),
        ):
            if idle and getattr(self, name) != getattr(TrainOptions, name):
                raise ConfigError(f"{name}={getattr(self, name)} has no effect, {way_out}, or leave it out.")
        if self.output_path is None:
            for name in ("checkpoint_steps", "sample_steps", "timeline_step"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}={getattr(self, name)} without output_path: there is nowhere to write.")
            if self.checkpoint_async:
                raise ConfigError("checkpoint_async without output_path: there is nowhere to write.")
            if self.resume != "never":
                raise ConfigError("resume=auto without output_path: there is nothing to resume from.")

    @classmethod
    def of(cls, **values: Any) -> TrainOptions:
        """Options by name; an unknown name is a ConfigError with the nearest known one."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown("training option", name, known))
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_TAKEN: Mapping[type, Any] = {int: Integral, float: Real, bool: bool, str: (str, PathLike)}
"""Kind of a field -> what its values may be."""

_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("steps", "epochs", "batch_size", "grad_accum_steps", "report_steps"), 1),
    **dict.fromkeys(("validate_steps", "validation_rows", "sample_steps", "checkpoint_steps"), 1),
    "timeline_step": 1,
    **dict.fromkeys(("keep_checkpoints", "decay_steps", "offload_bucket_bytes"), 1),
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "seed"), 0),
}


def option_fields() -> list[Field[Any]]:
    """The fields in order, for a command line."""
    return list(fields(TrainOptions))
