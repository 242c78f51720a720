"""The errors a caller can make, one class per kind.

Every message names the number, the rule and the way out. `FmsError` is what a script catches to print one sentence
and exit non-zero; anything else that escapes is a bug in the library and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FmsError(ValueError):
    """Base of every error that the caller can mend."""


class LayoutError(FmsError):
    """A `ParallelLayout` that cannot be: unknown word, impossible degrees, or an axis no strategy implements."""


class ConfigError(FmsError):
    """A model, data or training setting that is unknown or impossible."""


class CheckpointError(FmsError):
    """A checkpoint that is missing, torn, or does not fit the model."""


class DataError(FmsError):
    """A dataset or tokenizer that is missing, empty or does not fit the model."""


class TrainingError(FmsError):
    """A run that must stop: non-finite loss, a parameter without a gradient, a lost rank."""


class RankFailed(FmsError):
    """A rank of a multi-rank job failed or never answered; the message names the first one and shows its traceback."""


def suggest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` when a known word is close to `word` in any case, else the empty string."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """One sentence for an unknown `word`: what it is, the nearest known one, and all that are known."""
    names = sorted(known)
    return f"unknown {kind} {word!r}.{suggest(word, names)} Known: {', '.join(names) or 'none'}."
