"""What a batch is trained on: which labels count, and the loss, *summed* over them.

    causal_lm             logits [B, S, V], labels [B, S] as the ids: the model is asked for the next one, shifted here
    masked_lm             labels [B, S], each at its own place
    seq2seq               the same over the decoder's places; decoder_input_ids are made from labels when not given
    classification        logits [B, C], labels [B]: images, sentences
    UserLoss(...)         any function of the model's output and the batch

Sums divided by the count over the whole global batch, so that micro-batches, padding and unequal rows never change the
result. A label of -100 does not count. Models' own loss code is not used: it averages over whatever it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.modules.loss import IGNORE

Batch = Mapping[str, Tensor]


def logits_of(out: Any) -> Tensor:
    """The logits of whatever a model returned: `.logits`, the first of a tuple, or the tensor itself.

    Raises:
        ConfigError: there is no such tensor.
    """
    found = getattr(out, "logits", None)
    if found is None:
        found = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(found, Tensor):
        raise ConfigError(f"the model returned {type(out).__name__}, which has no logits: give parallelize(loss=...).")
    return found


@dataclass(frozen=True)
class Task:
    """Cross entropy over labels.

    Attributes:
        shift: each place is asked for the label of the next one. labels: their name in the batch.
    """

    name: str
    shift: bool = False
    labels: str = "labels"

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model's forward is given."""
        return {name: value for name, value in batch.items() if name != self.labels}

    def prepare(self, batch: Batch, config: Any) -> dict[str, Tensor]:
        """The batch with everything that the model needs.

        Raises:
            ConfigError: no labels.
        """
        if self.labels not in batch:
            raise ConfigError(f"task {self.name}: the batch has no {self.labels!r}, only {', '.join(batch)}.")
        return dict(batch)

    def targets(self, batch: Batch) -> Tensor:
        """The label of every place that has logits."""
        labels = batch[self.labels]
        return labels[:, 1:] if self.shift else labels

    def count(self, batch: Batch) -> Tensor:
        """How many labels count, a scalar."""
        return (self.targets(batch) != IGNORE).sum()

    def wanted(self, out: Any) -> Any:
        """What of the model's output the loss reads."""
        return logits_of(out), getattr(out, "aux_loss", None)

    def loss_sum(self, out: Any, batch: Batch) -> Tensor:
        """Summed over the labels that count, in fp32 at least."""
        logits = logits_of(out)
        logits = logits[:, :-1] if self.shift else logits
        targets = self.targets(batch)
        if logits.shape[:-1] != targets.shape:
            raise ConfigError(
                f"task {self.name}: logits {tuple(logits.shape)} do not go with labels {tuple(targets.shape)}."
            )
        wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")

    def add_rows(self, batch: dict[str, Tensor], missing: int) -> dict[str, Tensor]:
        """`missing` rows more, copies of the last one, whose labels do not count."""
        padded = {name: repeat_last(value, missing) for name, value in batch.items()}
        padded[self.labels][-missing:] = IGNORE
        return padded


class SequenceToSequence(Task):
    """Makes `decoder_input_ids` of the labels: one to the right, the start token first."""

    def prepare(self, batch: Batch, config: Any) -> dict[str, Tensor]:
        """As `Task.prepare`."""
        found = super().prepare(batch, config)
        if "decoder_input_ids" not in found:
            start, padding = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
            if start is None or padding is None:
                raise ConfigError(
                    "seq2seq: the config has no decoder_start_token_id or no pad_token_id to make decoder_input_ids "
                    "from: give them in the batch."
                )
            labels = found[self.labels]
            shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
            found["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORE, padding)
        return found


class UserLoss(Task):
    """A loss of the caller's own.

    Args:
        loss: (model output, batch) -> loss summed over what counts. count: batch -> how much that is (default: rows).
        model_inputs: names of what the model's forward takes; None is everything but `labels`.
    """

    def __init__(
        self,
        loss: Callable[[Any, Batch], Tensor],
        count: Callable[[Batch], Tensor] | None = None,
        model_inputs: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__("the given loss")
        object.__setattr__(self, "_parts", (loss, count, model_inputs))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As `Task.inputs`."""
        names = self._parts[2]  # type: ignore[attr-defined]
        return super().inputs(batch) if names is None else {name: batch[name] for name in names}

    def prepare(self, batch: Batch, config: Any) -> dict[str, Tensor]:
        """The batch as it is."""
        return dict(batch)

    def count(self, batch: Batch) -> Tensor:
        """As `Task.count`."""
        count = self._parts[1]  # type: ignore[attr-defined]
        return count(batch) if count is not None else torch.tensor(len(next(iter(batch.values()))))

    def wanted(self, out: Any) -> Any:
        """Everything: nobody knows what the loss reads."""
        return out

    def loss_sum(self, out: Any, batch: Batch) -> Tensor:
        """As `Task.loss_sum`."""
        return self._parts[0](out, batch)  # type: ignore[attr-defined, no-any-return]

    def add_rows(self, batch: dict[str, Tensor], missing: int) -> dict[str, Tensor]:
        """Refused: an added row would count."""
        rows = len(next(iter(batch.values())))
        raise ConfigError(
            f"{rows} rows do not divide into equal micro-batches, and with a loss of your own added rows would count: "
            f"give {missing} rows more, or other microbatches."
        )


TASKS: dict[str, Task] = {
    "causal_lm": Task("causal_lm", shift=True),
    "masked_lm": Task("masked_lm"),
    "seq2seq": SequenceToSequence("seq2seq"),
    "classification": Task("classification"),
}
"""Word -> task."""

_ENDINGS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "masked_lm",
    "ForConditionalGeneration": "seq2seq",
    "ForImageClassification": "classification",
    "ForSequenceClassification": "classification",
    "ForAudioClassification": "classification",
}
"""How transformers names the classes of a task."""


def get_task(model: nn.Module, task: str | Task | None) -> Task:
    """The task that is asked for, or the one that the model's class is named after.

    Raises:
        ConfigError: an unknown word, or a class whose name says nothing.
    """
    if isinstance(task, Task):
        return task
    if task is not None:
        if task not in TASKS:
            raise ConfigError(unknown("task", task, TASKS))
        return TASKS[task]
    name = type(model).__name__
    for ending, word in _ENDINGS.items():
        if name.endswith(ending):
            return TASKS[word]
    raise ConfigError(f"{name} does not say what it is trained on: give task= ({', '.join(TASKS)}) or loss=.")


def repeat_last(value: Tensor, missing: int) -> Tensor:
    """`missing` rows more, copies of the last one."""
    return torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])
