"""Whether a config's values are of the kinds that its fields say: a file or a flag can hold anything.

It knows dataclasses and their annotations; it knows no architecture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from fms_parallel.errors import ConfigError, FmsError

from .registry import Architecture

SIZES = frozenset(
    (
        *("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "max_positions"),
        *("experts", "experts_used", "classes", "token_types"),
    )
)
"""Fields that count something there is at least one of."""
SPREADS = frozenset(("std", "norm_eps", "dropout"))
"""Fields that are zero at least."""


def config_from_hf(known: Architecture, raw: Mapping[str, Any], file: object) -> Any:
    """The config that an architecture reads from a `config.json`, its values checked.

    Raises:
        ConfigError: naming the file, and the field where it can be told.
    """
    assert known.from_hf is not None
    try:
        return checked(known.from_hf(raw), file)
    except FmsError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read as {known.name}: {error}.") from error


def checked(config: Any, where: object) -> Any:
    """The config itself, when every value is of its field's kind.

    Raises:
        ConfigError: naming the first that is not.
    """
    allowed = _kinds(type(config))
    for field in fields(config):
        value, kinds = getattr(config, field.name), allowed[field.name]
        if not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
            raise ConfigError(f"{where}: {field.name}={value!r} must be {wanted}.")
        least = 1 if field.name in SIZES else 0 if field.name in SPREADS else None
        if least is not None and value is not None and value < least:
            raise ConfigError(f"{where}: {field.name}={value} must be at least {least}.")
    return config


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "null"}


def _kinds(config: type) -> dict[str, tuple[type, ...]]:
    """Field -> the types that its annotation allows, without their parameters."""
    hints = get_type_hints(config)
    return {
        field.name: tuple(get_origin(kind) or kind for kind in _union(hints[field.name])) for field in fields(config)
    }


def _union(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if NoneType in get_args(hint) else (hint,)


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_is_number(number) for number in value.values())
    return isinstance(value, kind)


def _is_number(value: Any) -> bool:
    """What a scaled rope is described by; null where it has a default."""
    return value is None or isinstance(value, bool | int) or _is(value, float)
