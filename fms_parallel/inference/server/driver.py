"""`Driver`: the one thread that runs the engine, and how requests hear of what it does.

    asyncio: open --> ticket ----- news <---- queue of the ticket <---- one call per step --+
                        | (a thread that reads requests)                                    |
                        +--- submit ---> engine's inbox ---> step, step, step (this thread)-+

asyncio never waits for the engine, and the engine never waits for a client. It knows an engine, rows and tickets; it
knows nothing of HTTP, but which failure a client is to be told.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fms_parallel.errors import FmsError
from fms_parallel.inference.engine import InferenceEngine
from fms_parallel.inference.handle import Completion, Event, Handle
from fms_parallel.inference.report import Counts, MemoryReport
from fms_parallel.inference.request import Ids
from fms_parallel.inference.server.failure import Failure
from fms_parallel.log import get_logger

log = get_logger(__name__)

BEAT = 1.0
"""Seconds between steps without work: ranks that follow wait in a collective, and must not be given up."""
SNAPSHOT = 0.25
"""Seconds between two looks at what the engine holds, while it is busy."""
STOPPING = 10.0
"""Seconds that the engine gets to end its last step."""


class News(NamedTuple):
    """What a step gave one row of a ticket; with its end, what came of it."""

    row: int
    event: Event | None = None
    completion: Completion | None = None


class Snapshot(NamedTuple):
    """What the engine did and held between two steps."""

    counts: Counts
    memory: MemoryReport


class Ticket:
    """The rows of one request.

    Attributes:
        rows: how many. news: of them, in order; a `Failure` ends it.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.news: asyncio.Queue[News | Failure] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._dropped = False
        self._lock = threading.Lock()

    def fail(self, failure: Failure) -> None:
        """Tell whoever waits that there will be nothing more. On asyncio's thread."""
        self.news.put_nowait(failure)

    def add(self, handle: Handle) -> None:
        """One of its rows was submitted; if nobody wants it any more, it is cancelled. From any thread."""
        with self._lock:
            self._handles.append(handle)
            dropped = self._dropped
        if dropped:
            handle.cancel()

    def drop(self) -> None:
        """Cancel what has not ended, also what is still to be submitted."""
        with self._lock:
            self._dropped, handles = True, list(self._handles)
        for handle in handles:
            handle.cancel()


class Driver:
    """Runs an engine that nobody else drives.

    Args:
        engine: on the first rank; the others follow it. capacity: rows that it may be given at a time.
        ended: told of every row that has ended, also of those whose client has left; on asyncio's thread.
    Attributes:
        in_flight: rows that the engine has been given, or will be. error: what ended the thread, if anything did.
        snapshot: the latest one. died: called on asyncio's thread when the engine has died.
    """

    def __init__(self, engine: InferenceEngine, capacity: int, ended: Callable[[Completion], object]) -> None:
        self.engine, self.capacity, self._ended = engine, capacity, ended
        self.in_flight = 0
        self.error: BaseException | None = None
        self.died: Callable[[], object] = lambda: None
        self.snapshot = Snapshot(engine.counts(), engine.memory_report())
        self._tickets: set[Ticket] = set()
        self._submitted: queue.SimpleQueue[tuple[Ticket, int, Handle]] = queue.SimpleQueue()
        self._running: list[tuple[Ticket, int, Handle]] = []
        self._batch: list[tuple[Ticket, News]] = []
        self._work, self._stopping = threading.Event(), False
        self._step_began: float | None = None
        self._looked = 0.0
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    # ---- asyncio's side ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to drive; what happens is told to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def trouble(self) -> str | None:
        """Why the engine has ended; None: it lives."""
        if self.error is None:
            return None
        first = str(self.error).partition(". ")[0].rstrip(".")  # gloo's go on
        return f"the engine has died: {first or repr(self.error)}"

    def stalled(self) -> float:
        """Seconds that the step at hand has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def open(self, rows: int) -> Ticket:
        """Room for the rows of a request; `close` it whatever happens.

        Raises:
            Failure: 429 when there is none at the moment, 400 when there never will be, 503 when the engine has died.
        """
        if self.trouble is not None:
            raise Failure(503, f"{self.trouble}; restart the server.")
        if rows > self.capacity:
            sentence = (
                f"the request asks for {rows} rows (prompts x n), but this server takes {self.capacity} at a time"
            )
            raise Failure(400, f"{sentence} (max_batch_size + max_queue): ask in several requests.", "n")
        if self.in_flight + rows > self.capacity:
            sentence = f"{self.in_flight} of {self.capacity} rows are running or waiting, no room for {rows} more"
            raise Failure(429, f"{sentence}: try again later.", code="queue_full", headers={"retry-after": "1"})
        self.in_flight += rows
        ticket = Ticket(rows)
        self._tickets.add(ticket)
        return ticket

    def close(self, ticket: Ticket) -> None:
        """The request is over; rows that have not ended are cancelled, which frees their cache at the next step."""
        self._tickets.discard(ticket)
        ticket.drop()
        self._work.set()

    async def stop(self) -> bool:
        """Close the engine; False: it has died, or does not end its step."""
        self._stopping = True
        self._work.set()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, STOPPING)
        if self._thread.is_alive() and self.error is None:
            self.error = FmsError(f"a step of the engine has not ended for {self.stalled():.0f} s.")
        return self.error is None

    def _deliver(self, batch: list[tuple[Ticket, News]]) -> None:
        for ticket, news in batch:
            if news.completion is not None:
                self.in_flight -= 1
                self._ended(news.completion)
            ticket.news.put_nowait(news)

    def _release(self, rows: int) -> None:
        self.in_flight -= rows

    def _over(self) -> None:
        """Nobody is left waiting for an engine that has ended."""
        for ticket in self._tickets:
            ticket.fail(Failure(500, f"{self.trouble or 'the engine was closed'}."))
        if self.trouble is not None:
            self.died()

    # ---- any thread --------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket, prompts: Sequence[Ids], options: Sequence[dict[str, Any]]) -> None:
        """Give the engine the rows of a ticket: all, or none.

        Raises:
            ConfigError: one of them is impossible.
        """
        given = 0
        try:
            for row, (prompt, words) in enumerate(zip(prompts, options, strict=True)):
                handle = self.engine.submit(prompt, stream=self._listener(ticket, row), **words)
                given += 1
                ticket.add(handle)
                self._submitted.put((ticket, row, handle))
        except BaseException:
            ticket.drop()
            raise
        finally:
            self._work.set()
            self._post(self._release, ticket.rows - given)

    def _listener(self, ticket: Ticket, row: int) -> Callable[[Event], object]:
        return lambda event: self._batch.append((ticket, News(row, event)))

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody is there to be told
            log.debug("the event loop has ended")

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step_began = time.monotonic()
                more = self.engine.step()
                self._step_began = None
                self._tell()
                self._look(busy=more)
                if not more:
                    self._work.wait(BEAT)
                    self._work.clear()
            self._step_began = time.monotonic()
            self.engine.close()
        except BaseException as error:
            log.error("the engine has died", exc_info=error)
            self.error = error
        finally:
            self._step_began = None
            self._tell()
            self._post(self._over)

    def _tell(self) -> None:
        """What the step gave, in one call."""
        while not self._submitted.empty():
            self._running.append(self._submitted.get())
        ended = [one for one in self._running if one[2].done]
        if ended:
            self._running = [one for one in self._running if not one[2].done]
        self._batch += [(ticket, News(row, completion=handle.result(0))) for ticket, row, handle in ended]
        if self._batch:
            self._post(self._deliver, self._batch)
            self._batch = []

    def _look(self, busy: bool) -> None:
        now = time.monotonic()
        if not busy or now - self._looked >= SNAPSHOT:
            self._looked = now
            self.snapshot = Snapshot(self.engine.counts(), self.engine.memory_report())
