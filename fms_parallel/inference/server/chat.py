"""Chats: messages -> token ids, by the model's own template where it has one.

A template is text with special tokens in it. Those that the template writes become tokens; a message that spells one
stays text, or a user could close his own turn and speak as somebody else. It knows templates and tokenizers; it knows
no HTTP and no models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError
from fms_parallel.tokenizers import Tokenizer

PLAIN = """\
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
"""For a tokenizer without a template: one line per message, `role: content`, and `assistant:` at the end."""

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
HIDDEN = "\ue000{}\ue001"
"""What stands for the special tokens that a message spells while the template is filled in (private characters)."""


class TemplateError(ConfigError):
    """These messages do not go into this template."""


class ChatTemplate:
    """Turns messages into token ids.

    Args:
        source: the Jinja template. tokenizer: of the model. special: spelling of special tokens -> id.
        words: what the template may ask for by name, as bos_token.
    Raises:
        ConfigError: the template cannot be read.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, special: Mapping[str, int], words: Mapping[str, Any]) -> None:
        self.source, self._tokenizer, self._special, self._words = source, tokenizer, dict(special), dict(words)
        self._render = _compiled(source)
        spelt = sorted(filter(None, special), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spelt))) if spelt else None
        self._begins_plain = source == PLAIN

    @classmethod
    def find(cls, tokenizer: Tokenizer, folder: Path | None, file: str | None = None) -> ChatTemplate:
        """That of `file`; else of the tokenizer's folder (`chat_template.jinja`, or in its config); else `PLAIN`."""
        config = _json(folder / CONFIG_FILE) if folder is not None else {}
        words = {name: _spelt(value) for name, value in config.items() if name.endswith("_token") and _spelt(value)}
        special = {} if folder is None else _special_tokens(folder / "tokenizer.json")
        if file is not None:
            if not Path(file).is_file():
                raise ConfigError(f"chat_template={file!r}: no such file.")
            return cls(Path(file).read_text(encoding="utf-8"), tokenizer, special, words)
        if folder is not None and (folder / TEMPLATE_FILE).is_file():
            return cls((folder / TEMPLATE_FILE).read_text(encoding="utf-8"), tokenizer, special, words)
        return cls(_of_config(config) or PLAIN, tokenizer, special, words)

    def ids(self, messages: Sequence[Mapping[str, str]], more: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of a chat up to where the assistant speaks.

        Args:
            more: further words for the template.
        Raises:
            TemplateError: the template refuses these messages.
        """
        safe = [{name: self._hide(said) for name, said in message.items()} for message in messages]
        text = self._render({**self._words, **more, "messages": safe, "add_generation_prompt": True})
        pieces = [(text, None)] if self._spelling is None else self._pieces(text)
        ids: list[int] = []
        if self._begins_plain and self._tokenizer.bos_id is not None:
            ids.append(self._tokenizer.bos_id)
        for plain, token in pieces:
            ids += self._tokenizer.encode(self._show(plain)) if plain else []
            ids += [] if token is None else [token]
        return tuple(ids)

    def _pieces(self, text: str) -> list[tuple[str, int | None]]:
        """Plain text, and the special token behind it."""
        assert self._spelling is not None
        pieces: list[tuple[str, int | None]] = []
        start = 0
        for found in self._spelling.finditer(text):
            pieces.append((text[start : found.start()], self._special[found.group()]))
            start = found.end()
        return [*pieces, (text[start:], None)]

    def _hide(self, said: str) -> str:
        if self._spelling is None:
            return said
        spelt = list(self._special)
        return self._spelling.sub(lambda found: HIDDEN.format(spelt.index(found.group())), said)

    def _show(self, text: str) -> str:
        spelt = list(self._special)
        return re.sub(
            HIDDEN.format(r"(\d+)"),
            lambda found: spelt[int(found[1])] if int(found[1]) < len(spelt) else found[0],
            text,
        )


def _compiled(source: str) -> Callable[[Mapping[str, Any]], str]:
    """Fills a template in: words -> text."""
    try:
        from jinja2 import TemplateError as JinjaError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise ConfigError("chat templates need `jinja2`: pip install 'fms_parallel[serve]'.") from None

    class Generation(Extension):
        """`{% generation %}` marks, for training, what the assistant says; here it is its text."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own form

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(sentence: str) -> None:
        raise JinjaError(sentence)

    # What templates of Hugging Face models are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, **words: json.dumps(value, **{"ensure_ascii": False, **words})
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        template = environment.from_string(source)
    except JinjaError as error:
        raise ConfigError(f"the chat template cannot be read: {error}.") from None

    def render(words: Mapping[str, Any]) -> str:
        try:
            return template.render(words)
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            raise TemplateError(f"the chat template refuses these messages: {error}") from None

    return render


def _of_config(config: Mapping[str, Any]) -> str | None:
    """The template in a tokenizer's config: a text, or named ones."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _spelt(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _special_tokens(file: Path) -> dict[str, int]:
    """Spelling -> id, of a tokenizer.json."""
    return {one["content"]: one["id"] for one in _json(file).get("added_tokens", ()) if one.get("special")}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
