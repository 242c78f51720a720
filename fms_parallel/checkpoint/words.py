"""How messages list keys: the first few and how many more. It knows text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fms_parallel.errors import CheckpointError

SHOWN = 10
"""Keys of each kind that a message names before it only counts."""


def listed(kind: str, keys: Sequence[str]) -> str:
    """`missing (2): a, b`, or the first ten and how many more there are."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{kind} ({len(keys)}): {', '.join(keys[:SHOWN])}{more}"


def refuse_misfits(source: str, misfits: Mapping[str, Sequence[str]]) -> None:
    """Raise one CheckpointError with everything that does not fit, if anything does not.

    Args:
        misfits: kind (`missing`, `extra`, ...) -> keys.
    """
    wrong = [listed(kind, keys) for kind, keys in misfits.items() if keys]
    if wrong:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(wrong)}.")
