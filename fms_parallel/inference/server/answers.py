"""What clients are told, in OpenAI's two dialects: whole answers, and chunks of a stream.

A `Dialect` is of one request; it knows completions and JSON, and how many rows there are of how many prompts. It knows
no HTTP.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

from fms_parallel.inference.handle import Completion, Event
from fms_parallel.inference.request import Ids
from fms_parallel.inference.sampler import Chosen
from fms_parallel.inference.server.fields import Wanted
from fms_parallel.tokenizers import UNREADABLE, Tokenizer

Json = dict[str, Any]


def encode(value: Any) -> bytes:
    """JSON in UTF-8; half a character, as broken JSON of a client has it, becomes `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class TokenTexts:
    """The text of single tokens, as it would stand behind a letter: by itself, a first space may be dropped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")[-1:]
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            before, both = (self._tokenizer.decode(ids) for ids in (self._before, [*self._before, token]))
            alone = self._tokenizer.decode([token])
            self._known[token] = both[len(before) :] if both.startswith(before) else alone
        return self._known[token]


class Dialect(ABC):
    """Answers to one request.

    Args:
        wanted: the request. model: its name here. prompts: token ids. ends: tokens that end a row, and are no text.
        texts: of tokens. tokenizer: for the texts of prompts that came as tokens.
    """

    prefix: str
    objects: tuple[str, str]
    """What a whole answer and a chunk call themselves."""

    def __init__(
        self,
        wanted: Wanted,
        model: str,
        prompts: Sequence[Ids],
        ends: Collection[int],
        texts: TokenTexts,
        tokenizer: Tokenizer,
    ) -> None:
        self.wanted, self.prompts, self._ends = wanted, prompts, ends
        self.texts, self.tokenizer = texts, tokenizer
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, rows: Sequence[Completion]) -> Json:
        """The answer to a request that did not ask for a stream."""
        choices = [
            {
                "index": row,
                **self.content(row, one.text),
                "logprobs": self.logprobs(self.seen(one.logprobs, one.finish), 0, self.echoed(row, one)),
                "finish_reason": one.finish,
            }
            for row, one in enumerate(self._likeliest(rows))
        ]
        return {**self.head, "object": self.objects[0], "choices": choices, "usage": self.usage(rows)}

    def _likeliest(self, rows: Sequence[Completion]) -> list[Completion]:
        """Of each prompt's rows those whose tokens are likeliest in the mean, as many as are wanted."""
        several, kept = self.wanted.rows, self.wanted.n
        groups = [rows[start : start + several] for start in range(0, len(rows), several)]
        best = groups if several == kept else [sorted(group, key=_unlikely)[:kept] for group in groups]
        return [one for group in best for one in group]

    def chunk(self, choices: Sequence[Json], usage: Json | None = None) -> bytes:
        """One event of a stream."""
        body: Json = {**self.head, "object": self.objects[1], "choices": list(choices)}
        if self.wanted.usage:
            body["usage"] = usage
        return b"data: " + encode(body) + b"\n\n"

    def choice(self, row: int, content: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        """A row's part of a chunk."""
        return {"index": row, **content, "logprobs": logprobs, "finish_reason": finish}

    def usage(self, rows: Sequence[Completion]) -> Json:
        """Tokens that were read and made: prompts count once, however many choices they have."""
        read = sum(map(len, self.prompts))
        made = sum(len(one.tokens) for one in rows)
        found = sum(one.shared for one in rows[:: self.wanted.rows])
        return {
            **{"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
            "prompt_tokens_details": {"cached_tokens": found},
        }

    def seen(self, chosen: Sequence[Chosen], finish: str | None) -> Sequence[Chosen]:
        """Tokens that stand for text: one that ended the row does not."""
        return chosen[:-1] if finish == "stop" and chosen and chosen[-1].token in self._ends else chosen

    @abstractmethod
    def content(self, row: int, text: str) -> Json:
        """A whole text."""

    @abstractmethod
    def first(self, row: int) -> Json | None:
        """What a row's first chunk has before there is any text."""

    def echoed(self, row: int, told: Completion | Event | None) -> tuple[Ids, Sequence[Chosen]]:
        """The prompt's tokens, and what is told of all but the first, where its log-probabilities are wanted too."""
        if self.wanted.logprobs is None or not self.wanted.echo:
            return (), ()
        return self.prompts[row // self.wanted.n], () if told is None else told.prompt_logprobs

    @abstractmethod
    def more(self, text: str) -> Json:
        """What a chunk adds; "" in a row's last."""

    @abstractmethod
    def logprobs(
        self, chosen: Sequence[Chosen], offset: int, echoed: tuple[Ids, Sequence[Chosen]] = ((), ())
    ) -> Json | None:
        """Of these tokens, behind what is `echoed`; None where nobody asked.

        Args:
            offset: characters of the row's text before them.
        """


def _unlikely(row: Completion) -> float:
    return -sum(one.logprob or 0.0 for one in row.logprobs) / max(1, len(row.logprobs))


class CompletionDialect(Dialect):
    """`/v1/completions`."""

    prefix, objects = "cmpl", ("text_completion", "text_completion")

    def content(self, row: int, text: str) -> Json:
        return {"text": self._echoed(row) + text}

    def first(self, row: int) -> Json | None:
        return {"text": self._echoed(row)} if self.wanted.echo else None

    def more(self, text: str) -> Json:
        return {"text": text}

    def logprobs(
        self, chosen: Sequence[Chosen], offset: int, echoed: tuple[Ids, Sequence[Chosen]] = ((), ())
    ) -> Json | None:
        if self.wanted.logprobs is None:
            return None
        ids, of_prompt = echoed
        told = [*of_prompt, *chosen]
        unknown = [None] * (1 if ids else 0)  # before the first token there is nothing that it could follow
        texts = [self.texts[token] for token in (*ids[:1], *(one.token for one in told))]
        return {
            "tokens": texts,
            "token_logprobs": [*unknown, *(one.logprob for one in told)],
            "top_logprobs": [*unknown, *map(self._top, told)],
            "text_offset": list(accumulate(map(len, texts), initial=offset))[: len(texts)],
        }

    def _top(self, one: Chosen) -> dict[str, float | None]:
        """Text -> log-probability of the likeliest tokens, and of the one that stands there."""
        found: dict[str, float | None] = {self.texts[one.token]: one.logprob}
        for token, logprob in reversed(one.top):  # where two have the same text, the likelier counts
            found.pop(self.texts[token], None)
            found[self.texts[token]] = logprob
        return found

    def _echoed(self, row: int) -> str:
        if not self.wanted.echo:
            return ""
        prompt = self.wanted.prompts[row // self.wanted.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)


class ChatDialect(Dialect):
    """`/v1/chat/completions`."""

    prefix, objects = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def content(self, row: int, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def first(self, row: int) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def more(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def logprobs(
        self, chosen: Sequence[Chosen], offset: int, echoed: tuple[Ids, Sequence[Chosen]] = ((), ())
    ) -> Json | None:
        if self.wanted.logprobs is None:
            return None
        content = [
            {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*pair) for pair in one.top]}
            for one in chosen
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> Json:
        text = self.texts[token]
        # A token that is no whole character shows no bytes: which ones it has, a tokenizer does not tell.
        known = None if UNREADABLE in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": logprob, "bytes": known}
