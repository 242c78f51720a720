"""`Row`: one request on its way through the engine: its tokens, how many of them are computed, where they lie.

    tokens     p p p p p p | n n n        prompt, then new ones
    computed   ------------>              the next piece starts here; when it reaches the end, a token is chosen

A decode step is the case in which one token is left to compute; after a preemption all are. It knows tokens and texts;
it decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fms_parallel.errors import FmsError
from fms_parallel.inference.handle import Completion, Event, Handle
from fms_parallel.inference.options import Options
from fms_parallel.inference.paged import Table
from fms_parallel.inference.request import Ids
from fms_parallel.inference.sampler import Ask, Chosen
from fms_parallel.inference.sampling import NOT_FINITE
from fms_parallel.inference.text import GrowingText
from fms_parallel.tokenizers import Tokenizer


class Row:
    """One request.

    Attributes:
        tokens: prompt and new ones. computed: so many of them have keys and values. table: where, while it is running.
        drafted: tokens proposed behind the last, for the step at hand. busy: its next token is under way.
        turn: number of the last step that it took part in.
        shared: prompt tokens found in the cache when it was begun. draft_table, draft_computed: as table and computed,
            in the cache of a draft model.
    """

    def __init__(self, number: int, prompt: Ids, options: Options, tokenizer: Tokenizer | None, handle: Handle) -> None:
        self.number, self.prompt, self.options, self.handle = number, prompt, options, handle
        self.tokens: list[int] = list(prompt)
        self.computed, self.shared, self.busy, self.turn = 0, 0, False, 0
        self.drafted: Sequence[int] = ()
        self.draft_computed = 0
        self.table: Table | None = None
        self.draft_table: Table | None = None
        self.finish: str | None = None
        self.error: FmsError | None = None
        self.logprobs: list[Chosen] = []
        self.first_token: float | None = None
        self.text = None if tokenizer is None else GrowingText(tokenizer, prompt, options.stop_text)

    @property
    def new(self) -> list[int]:
        """Tokens chosen so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def left(self) -> int:
        """Tokens still to compute; 1: the next step decodes."""
        return len(self.tokens) - self.computed

    @property
    def begun(self) -> bool:
        """Whether a token was chosen already."""
        return len(self.tokens) > len(self.prompt)

    @property
    def longest(self) -> int:
        """Tokens that it may come to have in the cache: the last new one is never put there."""
        return len(self.prompt) + self.options.max_new_tokens - 1

    def asks(self) -> list[Ask]:
        """How to choose behind the last token, and behind each drafted one."""
        new = self.new
        return [Ask(self.options, self.prompt, [*new, *self.drafted[:n]]) for n in range(len(self.drafted) + 1)]

    def take(self, chosen: Sequence[Chosen]) -> tuple[list[Chosen], str]:
        """Go on with these tokens, up to the one that ends the row: those, and the text that may now be shown."""
        text = ""
        taken: list[Chosen] = []
        for one in chosen:
            if one.token == NOT_FINITE:
                step = len(self.tokens) - len(self.prompt)
                self.fail(FmsError(f"the logits are NaN or infinite at new token {step}: check the weights."))
                break
            self.tokens.append(one.token)
            taken.append(one)
            text += "" if self.text is None or one.token in self.options.endings.eos else self.text.push(one.token)
            self.finish = self._ended()
            if self.finish:
                break
        if taken and self.first_token is None:
            self.first_token = time.monotonic()
        if self.options.logprobs is not None:
            self.logprobs += taken
        return taken, text

    def _ended(self) -> str | None:
        new = len(self.tokens) - len(self.prompt)
        longest = max([1, *map(len, self.options.endings.stop)])
        if self.options.endings.of(self.tokens[max(len(self.prompt), len(self.tokens) - longest) :]):
            return "stop"
        if self.text is not None and self.text.stopped:
            return "stop"
        return "length" if new >= self.options.max_new_tokens else None

    def fail(self, error: FmsError) -> None:
        """End it with what went wrong."""
        self.finish, self.error = "error", error

    def tell(self, taken: Sequence[Chosen], text: str = "") -> None:
        """Hand the owner what is new; an owner who cannot take it loses the request, nobody else does."""
        completion = None
        if self.finish is not None:
            text += "" if self.text is None else self.text.finish()
            completion = self._completion()
        told = tuple(taken) if self.options.logprobs is not None else ()
        event = Event(self.number, self.handle.row, tuple(one.token for one in taken), text, told, self.finish)
        try:
            self.handle.tell(event, completion)
        except Exception as error:
            if self.finish is None:
                self.fail(FmsError(f"stream raised {error!r}: its request was ended."))
                self.tell(())

    def _completion(self) -> Completion:
        assert self.finish is not None
        text = "" if self.text is None else self.text.text
        started = self.handle.started
        return Completion(
            self.prompt,
            tuple(self.new),
            text,
            self.finish,
            self.error,
            tuple(self.logprobs),
            self.shared,
            None if self.first_token is None else self.first_token - started,
            time.monotonic() - started,
        )
