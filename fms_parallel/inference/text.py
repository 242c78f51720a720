"""Text of a continuation as it grows: what may be shown already, and where a stop text ends it.

It knows a tokenizer's `decode` and texts; it knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from fms_parallel.tokenizers import UNREADABLE, Tokenizer

CONTEXT = 8
"""Tokens before the unshown ones that are decoded with them: some tokenizers drop a leading space otherwise."""


class GrowingText:
    """The text behind a prompt, token by token.

    Held back are bytes that are no whole character yet, and what may turn out to begin a stop text.

    Attributes:
        text: shown so far, and after `finish` all of it. stopped: whether a stop text occurred, which ends it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens = list(prompt[-CONTEXT:])
        self._read = len(self._tokens)  # tokens whose text is in `_known`
        self._known = ""
        self.text, self.stopped = "", False

    def push(self, token: int, *, ends: bool = True) -> str:
        """What one more token adds to what may be shown; ends=False: no stop text is looked for yet."""
        self._tokens.append(token)
        return self._show(self._decoded(last=False), last=False, ends=ends)

    def finish(self) -> str:
        """What was held back and is text after all."""
        return "" if self.stopped else self._show(self._decoded(last=True), last=True)

    def _decoded(self, last: bool) -> str:
        """Text of the tokens not read yet, "" while its end is no whole character."""
        start = max(0, self._read - CONTEXT)
        before = self._tokenizer.decode(self._tokens[start : self._read])
        whole = self._tokenizer.decode(self._tokens[start:])
        new = whole[_common(before, whole) :]
        waiting = len(self._tokens) - self._read
        if not last and new.endswith(UNREADABLE) and waiting < CONTEXT:
            return ""
        self._read = len(self._tokens)
        return new

    def _show(self, new: str, last: bool, ends: bool = True) -> str:
        """Add `new` to what is known, and show what can no longer begin a stop text."""
        self._known += new
        stops = self._stops if ends else ()
        found = [at for at in (self._known.find(stop, len(self.text)) for stop in stops) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._known) - (0 if last or not ends else self._may_begin_stop())
        shown = self._known[len(self.text) : end]
        self.text += shown
        return shown

    def _may_begin_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._known)), longest, -1):
                if self._known.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _common(one: str, other: str) -> int:
    """Length of the beginning that both have; all of the first, unless a character was whole only with what follows."""
    if other.startswith(one):
        return len(one)
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
