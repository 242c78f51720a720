"""The text of a layout: comma-separated words to values and back. It knows text; `layout` knows the rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from fms_parallel.errors import LayoutError, unknown

REST = 0
"""A degree still open: the ranks that the other axes leave. `ParallelLayout.resolve` replaces it."""

RECOMPUTE = ("none", "full", "selective")
RECOMPUTE_WORDS = (*RECOMPUTE, "every=N", "budget=FRACTION")


def split_words(text: str) -> list[tuple[str, str | None]]:
    """`"a=1,b"` -> [("a", "1"), ("b", None)]; a number alone continues the list before it (`stage_split=7,9,9,7`)."""
    words: list[tuple[str, str | None]] = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            if text.strip():
                raise LayoutError(f"{text!r}: an empty word between commas.")
            continue
        name, equals, value = part.partition("=")
        if not equals and part.isdecimal() and words and words[-1][0] == "stage_split" and words[-1][1]:
            words[-1] = ("stage_split", f"{words[-1][1]},{part}")
        else:
            words.append((name.strip(), value.strip() if equals else None))
    return words


def read_degree(name: str, value: str | None) -> int:
    """`tp=2`, or bare `tp`, which is `REST`."""
    return REST if value is None else read_number(name, value)


def read_number(name: str, value: str | None) -> int:
    """A whole number >= 1."""
    if value is None or not value.isdecimal() or int(value) < 1:
        raise LayoutError(f"{name}={value or ''}: needs a whole number >= 1, as in {name}=2.")
    return int(value)


def read_numbers(name: str, value: str | None) -> tuple[int, ...]:
    """`7,9,9,7`."""
    return tuple(read_number(name, piece.strip()) for piece in (value or "").split(","))


def read_flag(name: str, value: str | None) -> bool:
    """`sp`, or `sp=off`."""
    flags = {None: True, "true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    if value not in flags:
        raise LayoutError(f"{name}={value}: is on or off; write {name} or {name}=off.")
    return flags[value]


def choice_reader(known: Iterable[str]) -> Callable[[str, str | None], str]:
    """Reads any word; `known` are those that an error tells of when there is none."""

    def read(name: str, value: str | None) -> str:
        if not value:
            raise LayoutError(f"{name} needs a value: one of {', '.join(known)}.")
        return value

    return read


def recompute_number(policy: object) -> float:
    """What follows `every=` or `budget=`; 0 for a word alone.

    Raises:
        LayoutError: an unknown policy, or a number that it cannot have.
    """
    word, _, number = str(policy).partition("=")
    if policy in RECOMPUTE:
        return 0
    if word == "every" and number.isdecimal() and int(number) >= 1:
        return int(number)
    if word != "budget":
        raise LayoutError(unknown("recompute policy", str(policy), RECOMPUTE_WORDS))
    if re.fullmatch(r"0(\.[0-9]+)?", number) is None:
        raise LayoutError(f"recompute={policy}: give the part to keep, 0 <= part < 1, as in budget=0.5.")
    return float(number)


def as_text(name: str, value: Any) -> str:
    """The word that reads back as `value`."""
    if isinstance(value, bool):
        return name if value else f"{name}=off"
    if value == REST:  # only degrees can be
        return name
    if isinstance(value, tuple):
        return f"{name}={','.join(map(str, value))}"
    return f"{name}={value}"
