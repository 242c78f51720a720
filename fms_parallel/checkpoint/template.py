"""Key templates: `"layers.{n}.attention.query.{kind}"` stands for one key per block and kind, read or written alike.

A pair of templates with the same fields is a renaming that can be undone, by construction. It knows text only.
"""

from __future__ import annotations

import re

from fms_parallel.errors import ConfigError, unknown

FIELDS = {"n": r"\d+", "kind": r"weight|bias"}
"""What a `{field}` stands for."""

_FIELD = re.compile(r"\{(\w+)\}")


class Template:
    """A key with `{n}` (digits) and `{kind}` (weight or bias) in it.

    Raises:
        ConfigError: a field that is not in `FIELDS`, or one written twice.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields = tuple(_FIELD.findall(text))
        for field in self.fields:
            if field not in FIELDS:
                raise ConfigError(f"template {text!r}: {unknown('field', field, FIELDS)}")
        if len(set(self.fields)) < len(self.fields):
            raise ConfigError(f"template {text!r} has the same field twice: each stands for one value.")
        pieces = _FIELD.split(text)  # text, field, text, field, ..., text
        pattern = "".join(
            f"(?P<{piece}>{FIELDS[piece]})" if index % 2 else re.escape(piece) for index, piece in enumerate(pieces)
        )
        self._pattern = re.compile(pattern)

    def match(self, key: str) -> dict[str, str] | None:
        """The fields' values in `key`, or None when the key is not of this form."""
        found = self._pattern.fullmatch(key)
        return found.groupdict() if found else None

    def fill(self, values: dict[str, str]) -> str:
        """The key with these values."""
        return self.text.format(**values)


def templates_alike(*texts: str) -> list[Template]:
    """Templates that name the same things: each has the fields of the first.

    Raises:
        ConfigError: one has a field that another lacks, so keys could not be mapped back.
    """
    made = [Template(text) for text in texts]
    for template in made[1:]:
        if set(template.fields) != set(made[0].fields):
            raise ConfigError(f"templates {made[0].text!r} and {template.text!r} must have the same fields.")
    return made
