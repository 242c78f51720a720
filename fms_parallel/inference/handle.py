"""`Handle`: one request as its owner sees it, and `Completion`: what came of it.

A handle may be used from any thread; the engine's driver is the only one that writes to it. It knows tokens, texts and
waiting; it knows no models and no caches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference.request import Ids
from fms_parallel.inference.sampler import Chosen

FINISHES = ("stop", "length", "cancelled", "error")
"""A token or text ended it; max_new_tokens did; somebody cancelled it; something went wrong."""


@dataclass(frozen=True)
class Event:
    """What one step added to a request; printing it prints its text.

    Attributes:
        request: number of the request. row: of the batch it came in. tokens: new ones. text: that may be shown now.
        logprobs: of the tokens, where asked for. finish: why the request ended, in its last event.
        prompt_logprobs: in the first event, where asked for: see `Completion`.
    """

    request: int
    row: int
    tokens: Ids
    text: str = ""
    logprobs: tuple[Chosen, ...] = ()
    finish: str | None = None
    prompt_logprobs: tuple[Chosen, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Completion:
    """A request that has ended.

    Attributes:
        prompt: its token ids. tokens: the new ones, with the eos or stop sequence that ended them. text: of the new
            ones, without what ended them; "" without a tokenizer. finish: one of `FINISHES`. error: what went wrong.
        logprobs: of the new tokens, where asked for. shared: prompt tokens that another row had computed.
        first_token_s, total_s: seconds from the request to its first token, and to its end.
        prompt_logprobs: of the prompt's tokens from the second on, where asked for.
    """

    prompt: Ids
    tokens: Ids
    text: str
    finish: str
    error: FmsError | None = None
    logprobs: tuple[Chosen, ...] = ()
    shared: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    prompt_logprobs: tuple[Chosen, ...] = ()

    def __str__(self) -> str:
        return self.text


class Handle:
    """One request.

    Iterating yields its `Event`s until it has ended; `result` waits for its end. Somebody must drive the engine: a
    thread of its own (`engine.start()`), or `engine.step()` between the looks.

    Args:
        number: of the request. stream: called with each event, by the driver. drive: makes the engine go on when
            nobody else does; returns whether there is anything to do. cancel: tells the engine.
    """

    def __init__(
        self,
        number: int,
        row: int,
        stream: Callable[[Event], object] | None,
        drive: Callable[[], bool],
        cancel: Callable[[int], object],
    ) -> None:
        if not (stream is None or callable(stream)):
            raise ConfigError(f"stream={stream!r}: must be a function of one Event, as print is.")
        self.number, self.row = number, row
        self.started = time.monotonic()
        self._stream, self._drive, self._cancel = stream, drive, cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._completion: Completion | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """End it at the next step, which gives its cache back. Nothing happens when it has ended."""
        if not self.done:
            self._cancel(self.number)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for its end.

        Raises:
            TimeoutError: `timeout` seconds have passed; the request goes on.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        while not self._ended.is_set():
            left = None if limit is None else limit - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"request {self.number} has not ended within {timeout} s; it goes on.")
            if not self._drive():
                self._ended.wait(0.05 if left is None else min(left, 0.05))
        assert self._completion is not None
        return self._completion

    def __iter__(self) -> Iterator[Event]:
        """Its events, as they come."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                if not self._drive():
                    self._ended.wait(0.005)
                continue
            yield event
            if event.finish is not None:
                return

    # ---- the engine's side -------------------------------------------------------------------------------------

    def tell(self, event: Event, completion: Completion | None = None) -> None:
        """An event, and with the last one what came of the request."""
        try:
            if self._stream is not None and (event.tokens or event.text or event.prompt_logprobs):
                self._stream(event)
        finally:
            self._completion = completion or self._completion
            self._events.put(event)
            if completion is not None:
                self._ended.set()
