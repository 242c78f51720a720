"""`Row`: one request on its way through the engine: its tokens, how many of them are computed, where they lie.

    tokens     p p p p p p | n n n        prompt, then new ones
    computed   ------------>              the next piece starts here; when it reaches the end, a token is chosen

A decode step is the case in which one token is left to compute; after a preemption all are. It knows tokens and texts;
it decides nothing.
"""

from __future__ import annotations

import math
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
        tokens: prompt and new ones. new: the new ones. computed: so many of them all have keys and values. table:
            where, while it is running.
        drafted: tokens proposed behind the last, for the step at hand. busy: its next token is under way.
        turn: number of the last step that it took part in.
        shared: prompt tokens found in the cache when it was begun. asked: behind so many prompt tokens the
            log-probability of the next has been asked for. draft_table, draft_computed: as table and computed, in the
            cache of a draft model.
    """

    def __init__(self, number: int, prompt: Ids, options: Options, tokenizer: Tokenizer | None, handle: Handle) -> None:
        self.number, self.prompt, self.options, self.handle = number, prompt, options, handle
        self.tokens: list[int] = list(prompt)
        self.new: list[int] = []
        self.computed, self.shared, self.busy, self.turn, self.asked = 0, 0, False, 0, 0
        self.drafted: Sequence[int] = ()
        self.draft_computed = 0
        self.table: Table | None = None
        self.draft_table: Table | None = None
        self.finish: str | None = None
        self.error: FmsError | None = None
        self.logprobs: list[Chosen] = []
        self.prompt_logprobs: list[Chosen] = []
        self._told = False
        self.first_token: float | None = None
        self.text = None if tokenizer is None else GrowingText(tokenizer, prompt, options.stop_text)

    @property
    def left(self) -> int:
        """Tokens still to compute; 1: the next step decodes."""
        return len(self.tokens) - self.computed

    @property
    def begun(self) -> bool:
        """Whether a token was chosen already."""
        return bool(self.new)

    @property
    def longest(self) -> int:
        """Tokens that it may come to have in the cache: the last new one is never put there."""
        return len(self.prompt) + max(0, self.options.max_new_tokens - 1)

    @property
    def shareable(self) -> int | None:
        """First tokens that may be found in the cache rather than computed; None: all."""
        done = self.options.prompt_logprobs is None or self.asked >= len(self.prompt) - 1
        return None if done else self.asked

    def asks(self, start: int, stop: int) -> list[Ask]:
        """What is wanted behind tokens `start .. stop`: of prompt tokens that are given, and behind the last one how to
        choose, and behind each drafted one.
        """
        asks: list[Ask] = []
        if self.options.prompt_logprobs is not None:
            wanted = range(max(start, self.asked), min(stop, len(self.prompt) - 1))
            asks += [Ask(self.options, self.prompt, (), self.prompt[place + 1]) for place in wanted]
        if stop == len(self.tokens):
            asks.append(Ask(self.options, self.prompt, self.new))
            drafts = range(1, len(self.drafted) + 1)
            asks += [Ask(self.options, self.prompt, [*self.new, *self.drafted[:n]]) for n in drafts]
        return asks

    def take_prompt(self, given: Sequence[Chosen]) -> None:
        """The next tokens of the prompt, with their log-probabilities."""
        if any(math.isnan(one.logprob or 0.0) for one in given):
            place = len(self.prompt_logprobs)
            self.fail(FmsError(f"the logits are NaN or infinite behind prompt token {place}: check the weights."))
        self.prompt_logprobs += given

    def take(self, chosen: Sequence[Chosen]) -> tuple[list[Chosen], str]:
        """Go on with these tokens, up to the one that ends the row: those, and the text that may now be shown."""
        text = ""
        taken: list[Chosen] = []
        if self.options.max_new_tokens == 0:  # the prompt was all that was asked about
            self.finish = "length"
            return taken, text
        for one in chosen:
            if one.token == NOT_FINITE:
                step = len(self.new)
                self.fail(FmsError(f"the logits are NaN or infinite at new token {step}: check the weights."))
                break
            self.tokens.append(one.token)
            self.new.append(one.token)
            taken.append(one)
            ends = len(self.new) >= self.options.min_new_tokens
            if self.text is not None and one.token not in self.options.endings.eos:
                text += self.text.push(one.token, ends=ends)
            self.finish = self._ended() if ends else None
            if self.finish:
                break
        if taken and self.first_token is None:
            self.first_token = time.monotonic()
        if self.options.logprobs is not None:
            self.logprobs += taken
        return taken, text

    def _ended(self) -> str | None:
        longest = max([1, *map(len, self.options.endings.stop)])
        if self.options.endings.of(self.new[-longest:]):
            return "stop"
        if self.text is not None and self.text.stopped:
            return "stop"
        return "length" if len(self.new) >= self.options.max_new_tokens else None

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
        prompt, self._told = () if self._told else tuple(self.prompt_logprobs), True
        event = Event(self.number, self.handle.row, tuple(one.token for one in taken), text, told, self.finish, prompt)
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
            tuple(self.prompt_logprobs),
        )
