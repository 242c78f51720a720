"""`Options`: how one request is to be continued, as plain values, checked when they are given.

It knows words, numbers and rules; it knows nothing of modules, caches or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any

from torch import Tensor

from fms_parallel.errors import ConfigError, unknown
from fms_parallel.inference.request import Endings, Ids
from fms_parallel.inference.sampling import Sampling

MOST_LOGPROBS = 64
"""Of the likeliest tokens that are told beside the chosen one: as many candidates as ranks always exchange."""


@dataclass(frozen=True)
class Options:
    """How to continue one prompt.

    Attributes:
        max_new_tokens: at most. temperature, top_k, top_p, seed: see `Sampling`.
        row: with `seed` names the random numbers: rows of one batch share a seed and differ in this.
        min_p: drop tokens less likely than this fraction of the likeliest, after temperature.
        repetition_penalty: logits of tokens that occur in prompt or continuation are divided by it where positive and
            multiplied where negative (arXiv 1909.05858). presence_penalty: taken off the logits of tokens that occur in
            the continuation; frequency_penalty: as many times as they occur.
        logit_bias: added to the logits of these tokens, (token, bias) each.
        stop_text: texts that end a row where they first occur; they are no part of its text. endings: tokens that do.
        logprobs: tell the log-probability of each new token, and of this many of the likeliest; None: of none.
        prompt_logprobs: the same of each token of the prompt but the first; then max_new_tokens may be 0.
        min_new_tokens: before so many nothing ends a row: no token of `endings.eos` is chosen, no stop is looked for.
        priority: of rows that wait the one with the least begins first; when the cache is full, the one with the
            greatest gives its blocks back.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    row: int = 0
    stop_text: tuple[str, ...] = ()
    endings: Endings = field(default_factory=Endings)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        for name, (least, most, rule) in _RANGES.items():
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and least <= value <= most):
                raise ConfigError(f"{name}={value!r}: must be {rule}.")
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name}={value!r}: must be a whole number.")
        if not isinstance(self.top_p, int | float | None):
            raise ConfigError(f"top_p={self.top_p!r}: must be a number in (0, 1], or None to keep every token.")
        if self.max_new_tokens < 1 and (self.max_new_tokens < 0 or self.prompt_logprobs is None):
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be >= 1 (0 with prompt_logprobs).")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens}: must be in 0..max_new_tokens={self.max_new_tokens}."
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST_LOGPROBS:
                raise ConfigError(f"{name}={value}: must be 0..{MOST_LOGPROBS}, or None for none.")
        if self.min_p and self.temperature == 0:
            raise ConfigError(f"min_p={self.min_p} with temperature=0: the likeliest token is taken; drop one of them.")
        for token, bias in self.logit_bias:
            if not math.isfinite(bias):
                raise ConfigError(f"logit_bias of token {token} is {bias}: must be a finite number.")
        if "" in self.stop_text:
            raise ConfigError("stop has an empty text, which would end every row at once; drop it.")
        self.sampling  # noqa: B018 - checks its own numbers

    @classmethod
    def read(cls, words: Mapping[str, Any], eos_id: int | None = None) -> Options:
        """From what a caller passes.

        Args:
            words: fields of this class (but not stop_text and endings), and
                stop: a text, or texts or token sequences; eos_id: token or tokens that end a row (default: `eos_id`;
                None: none); ignore_eos: let no token end it.
        Raises:
            ConfigError: an unknown word, or an impossible value.
        """
        given = dict(words)
        stop, ending = given.pop("stop", ()), given.pop("eos_id", eos_id)
        if not isinstance(ignore := given.pop("ignore_eos", False), bool | None):
            raise ConfigError(f"ignore_eos={ignore!r}: must be True or False.")
        ending = None if ignore else ending
        known = [f.name for f in fields(cls) if f.name not in ("stop_text", "endings")]
        for name in given:
            if name not in known:
                raise ConfigError(unknown("sampling option", name, [*known, "stop", "eos_id", "ignore_eos"]))
        texts, sequences = read_stop(stop)
        if (bias := given.get("logit_bias")) is not None:
            given["logit_bias"] = read_biases(bias)
        given = {name: value for name, value in given.items() if value is not None or name in _MAY_BE_NONE}
        return cls(**given, stop_text=texts, endings=Endings.read(ending, sequences))

    @property
    def sampling(self) -> Sampling:
        """What `inference.sampling` knows of this."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far, or on a bias."""
        plain = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not plain or bool(self.logit_bias)

    def check_vocabulary(self, vocab: int) -> None:
        """Raise ConfigError when a token is named, or a number of tokens, that a vocabulary of `vocab` lacks."""
        self.sampling.check_vocabulary(vocab)
        named = [("eos_id", self.endings.eos), ("logit_bias", tuple(token for token, _ in self.logit_bias))]
        named += [(f"stop sequence {number}", ids) for number, ids in enumerate(self.endings.stop)]
        for name, ids in named:
            check_tokens(name, ids, vocab)


_WHOLE = ("max_new_tokens", "min_new_tokens", "seed", "row", "top_k", "logprobs", "prompt_logprobs", "priority")
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, math.inf, "a number >= 0 (0 takes the likeliest token)"),
    "min_p": (0, 1, "in [0, 1]"),
    "repetition_penalty": (1e-3, 1e3, "in [0.001, 1000]; 1 is none"),
    "presence_penalty": (-100, 100, "in [-100, 100]; 0 is none"),
    "frequency_penalty": (-100, 100, "in [-100, 100]; 0 is none"),
}
_MAY_BE_NONE = ("top_k", "top_p", "logprobs", "prompt_logprobs")


def check_tokens(name: str, ids: Iterable[int], vocab: int) -> None:
    """Raise ConfigError when one of `ids` is no token of a vocabulary of `vocab`."""
    if wrong := [token for token in ids if not 0 <= token < vocab]:
        raise ConfigError(f"{name} has token {wrong[0]}, but this model's tokens are 0..{vocab - 1}.")


def read_biases(bias: Any) -> tuple[tuple[int, float], ...]:
    """(token, what is added) each, of what a caller passes as `logit_bias`."""
    try:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        return tuple(sorted((int(token), float(value)) for token, value in pairs))
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias={bias!r}: must be a dict, token -> what is added to its logit.") from None


def read_stop(stop: str | Sequence[Any] | None) -> tuple[tuple[str, ...], tuple[Sequence[int], ...]]:
    """Texts, and token sequences, of what a caller passes as `stop`."""
    if stop is None:
        return (), ()
    if not isinstance(stop, str | Sequence):
        raise ConfigError(f"stop={stop!r}: must be a text, or a list of texts or of token sequences.")
    several = [stop] if isinstance(stop, str) else list(stop)
    if any(isinstance(one, int) for one in several):
        raise ConfigError(f"stop={stop!r}: a sequence of tokens is written [[1, 2]], a text 'end' or ['end'].")
    return tuple(s for s in several if isinstance(s, str)), tuple(s for s in several if not isinstance(s, str))


def read_prompt(name: str, ids: Any) -> Ids:
    """Token ids of one prompt. Raises ConfigError on something that is none, or empty."""
    if isinstance(ids, Tensor):
        if ids.ndim != 1:
            raise ConfigError(f"{name} is a tensor {tuple(ids.shape)}: one prompt is [S].")
        ids = ids.tolist()
    if not isinstance(ids, Collection) or isinstance(ids, str | bytes | Set | Mapping):
        raise ConfigError(f"{name} is {ids!r}, not a list of token ids; texts need a tokenizer.")
    try:
        found = tuple(index(token) for token in ids)
    except TypeError:
        raise ConfigError(f"{name} has something that is no whole number: token ids are.") from None
    if not found:
        raise ConfigError(f"{name} is empty: start it with a token, bos say.")
    return found
