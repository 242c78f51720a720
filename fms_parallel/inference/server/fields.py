"""What a client asks for: a JSON body -> `Wanted`, or a `Failure` that names the field.

Tables say which fields there are. No field is ignored: one that is unknown, or asks for what this server cannot do, is
refused, unless its value asks for nothing. It knows OpenAI's words and the engine's; it knows no engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fms_parallel.errors import unknown
from fms_parallel.inference.server.failure import Failure, bad

Prompt = str | tuple[int, ...]
Reader = Callable[[str, Any], Any]

DEFAULT_MAX_TOKENS = 16
"""Of `/v1/completions`, as OpenAI has it; a chat goes on as long as it fits."""
MOST_CHOICES, MOST_TOP_LOGPROBS, MOST_STOPS = 128, 20, 16


@dataclass(frozen=True)
class Wanted:
    """One request.

    Attributes:
        model: the name the client used. prompts, or messages of a chat (then `template` words go to its template).
        n: choices per prompt; best_of: rows of which they are the likeliest. max_tokens: None: as many as fit.
        options: for the engine, in its words. ends: further tokens that end a row.
        logprobs: how many of the likeliest tokens to tell beside the chosen one; None: tell nothing.
        echo: begin with the prompt. stream: in events; usage: with the counts in a last one.
    """

    model: str | None = None
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False

    @property
    def rows(self) -> int:
        """Rows of the engine per prompt."""
        return self.best_of or self.n

    @property
    def prompt_logprobs(self) -> int | None:
        """As `logprobs`, of the prompt's tokens; 0 where nothing else is asked of the model."""
        if not self.echo:
            return None
        return 0 if self.logprobs is None and self.max_tokens == 0 else self.logprobs


# ---- values -------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as it is quoted in a sentence, not longer than one."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text(name: str, value: Any) -> str:
    """A text. Raises a 400 that names the field, as all readers here do."""
    if not isinstance(value, str):
        raise bad(name, f"{name}={shown(value)}: must be a text.")
    return value


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise bad(name, f"{name}={shown(value)}: must be true or false.")
    return value


def whole(least: int, most: float = math.inf) -> Reader:
    """Reads a whole number in that range."""

    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            rule = f"a whole number >= {least}" if most == math.inf else f"a whole number in {least:,}..{most:,}"
            raise bad(name, f"{name}={shown(value)}: must be {rule}.")
        return value

    return read


def number(name: str, value: Any) -> float:
    """A finite number; which ones are possible is the engine's to say."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise bad(name, f"{name}={shown(value)}: must be a finite number.")
    return value


def stops(name: str, value: Any) -> tuple[str, ...]:
    """Texts that end a completion: one, or a few, none of them empty."""
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not all(isinstance(one, str) and one for one in several):
        raise bad(name, f"{name}={shown(value)}: must be a text, or a list of texts, none of them empty.")
    if len(several) > MOST_STOPS:
        raise bad(name, f"{name} has {len(several)} texts: at most {MOST_STOPS}.")
    return tuple(several)


def biases(name: str, value: Any) -> dict[int, float]:
    """Token number -> what is added to its logit, -100 to 100."""
    if not isinstance(value, dict) or not all(token.isascii() and token.isdecimal() for token in value):
        raise bad(name, f"{name}={shown(value)}: must be an object of token numbers and what is added to their logits.")
    found = {int(token): number(f"{name}[{token}]", added) for token, added in value.items()}
    for token, added in found.items():
        if not -100 <= added <= 100:
            raise bad(name, f"{name}[{token}]={added}: must be in -100..100.")
    return found


def top_k(name: str, value: Any) -> int | None:
    """0 and -1 are how other servers write "all"."""
    return None if value in (0, -1) and value is not False else whole(1)(name, value)


def stream_options(name: str, value: Any) -> bool:
    """Whether the last chunk of a stream tells the usage."""
    if not isinstance(value, dict):
        raise bad(name, f"{name}={shown(value)}: must be an object, as {{'include_usage': true}}.")
    for word in value:
        if word not in ("include_usage", "include_obfuscation"):
            raise bad(f"{name}.{word}", unknown(f"field of {name}", word, ["include_usage"]))
    if value.get("include_obfuscation"):
        raise bad(f"{name}.include_obfuscation", "include_obfuscation=true is not supported: leave it out.")
    return flag(f"{name}.include_usage", value.get("include_usage", False))


def token(one: Any) -> bool:
    """Whether it may be the number of one."""
    return isinstance(one, int) and not isinstance(one, bool)


def ends(name: str, value: Any) -> tuple[int, ...]:
    """Token numbers."""
    if not isinstance(value, list) or not all(map(token, value)):
        raise bad(name, f"{name}={shown(value)}: must be a list of token numbers.")
    return tuple(value)


def prompts(name: str, value: Any) -> tuple[Prompt, ...]:
    """A text, token numbers, or a list of either."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if all(map(token, value)):
            return (tuple(value),)
        if all(isinstance(one, list) and one and all(map(token, one)) for one in value):
            return tuple(map(tuple, value))
    raise bad(name, f"{name}={shown(value)}: must be a text, a list of token numbers, or a list of either; not empty.")


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""As clients write them -> as templates know them."""
OF_MESSAGES = ("role", "content", "name")


def messages(name: str, value: Any) -> tuple[dict[str, str], ...]:
    """The messages of a chat, with roles as templates know them."""
    if not isinstance(value, list) or not value:
        raise bad(name, f"{name}={shown(value)}: must be a list of messages, at least one.")
    return tuple(_message(f"{name}[{place}]", one) for place, one in enumerate(value))


def _message(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise bad(name, f"{name}={shown(value)}: must be an object with role and content.")
    given = {word: said for word, said in value.items() if said is not None and said != []}
    for word in given:
        if word not in OF_MESSAGES:
            raise bad(f"{name}.{word}", f"{name}: {unknown('or unsupported field', word, OF_MESSAGES)}")
    role = text(f"{name}.role", given.get("role"))
    if role not in ROLES:
        raise bad(f"{name}.role", f"{name}: {unknown('or unsupported role', role, ROLES)}")
    content = given.get("content", [] if value.get("content") == [] else None)
    if isinstance(content, list):
        content = "".join(_part(f"{name}.content[{place}]", one) for place, one in enumerate(content))
    if "name" in given:
        text(f"{name}.name", given["name"])
    return {**given, "role": ROLES[role], "content": text(f"{name}.content", content)}


def _part(name: str, value: Any) -> str:
    if not isinstance(value, dict) or value.get("type") != "text" or set(value) != {"type", "text"}:
        raise bad(name, f"{name}={shown(value)}: only parts {{'type': 'text', 'text': ...}} are supported.")
    return text(f"{name}.text", value["text"])


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise bad(name, f"{name}={shown(value)}: must be an object.")
    return value


# ---- tables -------------------------------------------------------------------------------------------------------

ENGINE: dict[str, Reader] = {
    "temperature": number,
    "top_p": number,
    "min_p": number,
    "top_k": top_k,
    "repetition_penalty": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "logit_bias": biases,
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": stops,
    "ignore_eos": flag,
    "priority": whole(-(2**31), 2**31 - 1),
}
"""Fields that are the engine's options, under the same name."""
SHARED: dict[str, Reader] = ENGINE | {
    "model": text,
    "n": whole(1, MOST_CHOICES),
    "max_tokens": whole(1),
    "min_tokens": whole(0),
    "stop_token_ids": ends,
    "stream": flag,
    "stream_options": stream_options,
}
COMPLETION: dict[str, Reader] = SHARED | {
    "prompt": prompts,
    "max_tokens": whole(0),
    "best_of": whole(1, MOST_CHOICES),
    "echo": flag,
    "logprobs": whole(0, MOST_TOP_LOGPROBS),
}
CHAT: dict[str, Reader] = SHARED | {
    "messages": messages,
    "max_completion_tokens": whole(1),
    "logprobs": flag,
    "top_logprobs": whole(0, MOST_TOP_LOGPROBS),
    "chat_template_kwargs": mapping,
}
TOKENIZE: dict[str, Reader] = {
    "model": text,
    "prompt": text,
    "messages": messages,
    "chat_template_kwargs": mapping,
}
DETOKENIZE: dict[str, Reader] = {"model": text, "tokens": ends}

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Notes of a client for itself: they ask for nothing."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": (),
}
"""Fields of OpenAI that this server cannot serve -> values that ask for nothing (null always does)."""


# ---- bodies -------------------------------------------------------------------------------------------------------


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Failure(400, f"the body is not JSON: {str(error).splitlines()[0]}.") from None
    if not isinstance(found, dict):
        raise Failure(400, f"the body must be one JSON object, not {shown(found)}.")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _read(body: Mapping[str, Any], table: Mapping[str, Reader]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in body.items():
        if name in table:
            if value is not None:
                found[name] = table[name](name, value)
        elif name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise bad(name, f"{name}={shown(value)} is not supported by this server: leave it out.")
        elif name not in LABELS:
            raise bad(name, unknown("field", name, [*table, *LABELS]))
    if "stream_options" in found and not found.get("stream"):
        raise bad("stream_options", "stream_options without stream=true: add that, or leave them out.")
    return found


def _common(found: Mapping[str, Any], max_tokens: int | None) -> dict[str, Any]:
    """Fields of `Wanted` that both kinds have. OpenAI's temperature is 1 unless said otherwise, the engine's 0."""
    options = {name: found[name] for name in ENGINE if name in found and found[name] is not None}
    options.setdefault("temperature", 1.0)
    if options["temperature"] == 0:
        for name in ("top_k", "top_p", "min_p"):  # the likeliest token is taken, whatever they keep
            options.pop(name, None)
    if "min_tokens" in found:
        options["min_new_tokens"] = found["min_tokens"]
    return {
        **{name: found[name] for name in ("model", "n", "stream") if name in found},
        **{"max_tokens": max_tokens, "options": options, "usage": found.get("stream_options", False)},
        "ends": found.get("stop_token_ids", ()),
    }


def completion(body: Mapping[str, Any]) -> Wanted:
    """A body of `/v1/completions`."""
    found = _read(body, COMPLETION)
    if "prompt" not in found:
        raise bad("prompt", "prompt is missing: a text, a list of token numbers, or a list of either.")
    n, best_of, echo = found.get("n", 1), found.get("best_of"), found.get("echo", False)
    if best_of is not None and best_of < n:
        raise bad("best_of", f"best_of={best_of} with n={n}: must be at least n.")
    if best_of not in (None, n) and found.get("stream"):
        raise bad("best_of", f"best_of={best_of} with stream=true: the best are known at the end; drop one of them.")
    if found.get("max_tokens") == 0 and not echo:
        raise bad("max_tokens", "max_tokens=0 without echo=true asks for nothing: must be >= 1.")
    common = _common(found, found.get("max_tokens", DEFAULT_MAX_TOKENS))
    logprobs = found.get("logprobs")
    return Wanted(prompts=found["prompt"], echo=echo, logprobs=logprobs, best_of=best_of, **common)


def chat(body: Mapping[str, Any]) -> Wanted:
    """A body of `/v1/chat/completions`."""
    found = _read(body, CHAT)
    if "messages" not in found:
        raise bad("messages", "messages is missing: a list of {'role': ..., 'content': ...}.")
    limits = {found[name] for name in ("max_tokens", "max_completion_tokens") if name in found}
    if len(limits) > 1:
        raise bad("max_tokens", "max_tokens and max_completion_tokens differ: give one of them.")
    if "top_logprobs" in found and not found.get("logprobs"):
        raise bad("top_logprobs", "top_logprobs without logprobs=true: add that, or leave it out.")
    logprobs = found.get("top_logprobs", 0) if found.get("logprobs") else None
    common = _common(found, next(iter(limits), None))
    return Wanted(
        messages=found["messages"], template=found.get("chat_template_kwargs", {}), logprobs=logprobs, **common
    )


def tokenize(body: Mapping[str, Any]) -> Wanted:
    """A body of `/tokenize`: what `/v1/completions` or `/v1/chat/completions` would read."""
    found = _read(body, TOKENIZE)
    if ("prompt" in found) == ("messages" in found):
        raise bad("prompt", "give one of prompt (a text) and messages.")
    prompts = (found["prompt"],) if "prompt" in found else ()
    template = found.get("chat_template_kwargs", {})
    return Wanted(found.get("model"), prompts, found.get("messages", ()), template)


def detokenize(body: Mapping[str, Any]) -> tuple[str | None, tuple[int, ...]]:
    """A body of `/detokenize`: the model's name, and tokens."""
    found = _read(body, DETOKENIZE)
    if "tokens" not in found:
        raise bad("tokens", "tokens is missing: a list of token numbers.")
    return found.get("model"), found["tokens"]
