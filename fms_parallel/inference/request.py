"""`Request`: what one call of `generate` asks for, as plain values, checked before anything is computed.

It knows numbers and rules; it knows nothing of modules or ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

from torch import Tensor

from fms_parallel.errors import ConfigError
from fms_parallel.inference.sampling import Sampling

Ids = tuple[int, ...]
Prompts = Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Endings:
    """What ends a row.

    Attributes:
        eos: ids that end a row. stop: id sequences that end a row, wherever its new tokens end with one.
    """

    eos: Ids = ()
    stop: tuple[Ids, ...] = ()

    @classmethod
    def read(cls, eos_id: int | Collection[int] | None, stop: Sequence[Sequence[int]]) -> Endings:
        """From what a caller passes. Raises ConfigError on something that is not token ids."""
        eos = () if eos_id is None else _ids("eos_id", eos_id if isinstance(eos_id, Collection) else [eos_id])
        return cls(tuple(sorted(set(eos))), _rows("stop sequence", stop))

    def __post_init__(self) -> None:
        for number, sequence in enumerate(self.stop):
            if not sequence:
                raise ConfigError(f"stop sequence {number} is empty and would end every row at once; drop it.")

    def of(self, new: Sequence[int]) -> int:
        """How many of the last of these new tokens end the row there (the longest stop sequence counts); 0: go on."""
        stops = [len(sequence) for sequence in self.stop if tuple(new[-len(sequence) :]) == sequence]
        return max([*stops, 1 if new and new[-1] in self.eos else 0])


@dataclass(frozen=True)
class Request:
    """Prompts and how to continue them.

    Attributes:
        prompts: token ids of each row. max_new_tokens: of each row, at most. sampling: how a token is chosen.
        endings: what ends a row earlier. use_cache: keep keys and values between steps.
    """

    prompts: tuple[Ids, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    endings: Endings = field(default_factory=Endings)
    use_cache: bool = True

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("no prompts: give at least one list of token ids.")
        for row, prompt in enumerate(self.prompts):
            if not prompt:
                raise ConfigError(f"prompt {row} of {len(self.prompts)} is empty: start it with a token, bos say.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be >= 1.")

    @property
    def width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    def check_fits(self, vocab: int | None, max_positions: int | None) -> None:
        """Raise ConfigError when the model has no such token or not as many positions (None: it does not say)."""
        if vocab is not None:
            self._check_vocabulary(vocab)
        total = self.width + self.max_new_tokens
        if max_positions is not None and total > max_positions:
            row = next(row for row, prompt in enumerate(self.prompts) if len(prompt) == self.width)
            raise ConfigError(
                f"prompt {row} has {self.width} tokens; with max_new_tokens={self.max_new_tokens} that makes {total}, "
                f"beyond max_positions={max_positions} of this model: shorten the prompt or ask for at most "
                f"{max(0, max_positions - self.width)} new tokens."
            )

    def _check_vocabulary(self, vocab: int) -> None:
        self.sampling.check_vocabulary(vocab)
        named = [(f"prompt {row}", ids) for row, ids in enumerate(self.prompts)]
        named += [(f"stop sequence {number}", ids) for number, ids in enumerate(self.endings.stop)]
        for name, ids in [*named, ("eos_id", self.endings.eos)]:
            if wrong := [token for token in ids if not 0 <= token < vocab]:
                raise ConfigError(f"{name} has token {wrong[0]}, but this model's tokens are 0..{vocab - 1}.")


def read_prompts(prompts: Prompts) -> tuple[Ids, ...]:
    """Token ids of each row. Raises ConfigError on something that is not rows of token ids."""
    return _rows("prompt", prompts)


def _rows(name: str, rows: Iterable[Any]) -> tuple[Ids, ...]:
    if isinstance(rows, Tensor) and rows.ndim != 2:
        raise ConfigError(f"{name}s as one tensor must be [B, S], got {tuple(rows.shape)}.")
    found = []
    for row, ids in enumerate(rows):
        if not isinstance(ids, Iterable) or (isinstance(ids, Tensor) and ids.ndim != 1):
            raise ConfigError(f"{name} {row} is {ids!r}, not a list of token ids: one {name} is written [[1, 2, 3]].")
        found.append(_ids(f"{name} {row}", ids))
    return tuple(found)


def _ids(name: str, ids: Iterable[Any]) -> Ids:
    values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    try:
        return tuple(index(value) for value in values)
    except TypeError:
        wrong = next(value for value in values if not hasattr(value, "__index__"))
        raise ConfigError(f"{name} has {wrong!r}: token ids are whole numbers.") from None
