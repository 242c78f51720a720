"""`Exchange`: from a ticket to an answer: whole, or in events as they come.

Everything that can happen to a request comes through its ticket's one queue: what steps gave its rows, the client that
leaves, the time that is over, the engine that dies. It knows ASGI's `receive` and `send`, tickets and dialects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fms_parallel.inference.handle import Completion, Event
from fms_parallel.inference.server.answers import Dialect, Json, encode
from fms_parallel.inference.server.driver import Driver, News, Ticket
from fms_parallel.inference.server.failure import CLIENT_LEFT, Failure

KEEP_ALIVE = 10.0
"""Seconds of silence after which a stream gets a comment, so that nobody between takes the connection for dead."""
GRACE = 5.0
"""Seconds behind the time limit for a client that does not read; then its connection is cut."""
LEAVING = "the server is shutting down: ask again, it may have come back."
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class JSON(JSONResponse):
    """JSON that may quote broken text."""

    def render(self, content: object) -> bytes:
        return encode(content)


def answer(failure: Failure) -> Response:
    """What a client is told."""
    return JSON(failure.body(), failure.status, headers=failure.headers)


class Exchange(Response):
    """Answers one request and closes its ticket.

    Args:
        limit: seconds that it may take. note: told the final status, where that is another than the one sent.
    """

    def __init__(
        self,
        driver: Driver,
        ticket: Ticket,
        dialect: Dialect,
        limit: float,
        note: Callable[[int], None],
    ) -> None:
        self.driver, self.ticket, self.dialect = driver, ticket, dialect
        self._limit, self._note = limit, note
        self._rows: list[Completion | None] = [None] * ticket.rows
        self._begun, self._cut = False, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        late = Failure(504, f"not answered within {self._limit:g} s (request_timeout): ask for fewer tokens.")
        timers = [loop.call_later(self._limit, self.ticket.fail, late)]
        timers.append(loop.call_later(self._limit + GRACE, self._cut_off, task))
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await (self._stream(send) if self.dialect.wanted.stream else self._whole(scope, receive, send))
        except asyncio.CancelledError:
            if self._cut:
                self._note(late.status)  # nothing can be sent to one who does not read
            else:
                await self._failed(Failure(503, LEAVING), scope, receive, send)
        except Failure as failure:
            await self._failed(failure, scope, receive, send)
        finally:
            for timer in timers:
                timer.cancel()
            watcher.cancel()
            self.driver.close(self.ticket)

    def _cut_off(self, task: asyncio.Task[object]) -> None:
        self._cut = True
        task.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.ticket.fail(Failure(CLIENT_LEFT, "the client has left"))

    async def _failed(self, failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
        self._note(failure.status)
        if failure.status == CLIENT_LEFT:
            return
        if not self._begun:
            return await answer(failure)(scope, receive, send)
        body = b"data: " + encode(failure.body()) + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _next(self, seconds: float | None = None) -> list[News]:
        """What has come since; [] when nothing has for so many seconds."""
        queue = self.ticket.news
        if queue.empty():
            try:
                found = [await (queue.get() if seconds is None else asyncio.wait_for(queue.get(), seconds))]
            except asyncio.TimeoutError:
                return []
        else:
            found = []
        while not queue.empty():
            found.append(queue.get_nowait())
        return [self._checked(one) for one in found]

    def _checked(self, news: News | Failure) -> News:
        if isinstance(news, Failure):
            raise news
        if (one := news.completion) is not None:
            self._rows[news.row] = one
            if one.finish == "error":
                raise Failure(500, str(one.error))
            if one.finish == "cancelled":
                raise Failure(503, self.driver.trouble or LEAVING)
        return news

    def _ended(self) -> list[Completion]:
        """All rows; [] while one of them has not ended."""
        rows = [row for row in self._rows if row is not None]
        return rows if len(rows) == len(self._rows) else []

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not (rows := self._ended()):
            await self._next()
        await JSON(self.dialect.whole(rows))(scope, receive, send)

    # ---- a stream ----------------------------------------------------------------------------------------------

    async def _stream(self, send: Send) -> None:
        rows = [Telling(row, self.dialect) for row in range(self.ticket.rows)]
        while not (ended := self._ended()):
            news = await self._next(KEEP_ALIVE)
            # A comment keeps the connection; the status is only known once something has come.
            chunks = [self.dialect.chunk([c]) for one in news for c in rows[one.row].tell(one)] if news else [b": \n\n"]
            if chunks:
                await self._begin(send)
                await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})
        last = self.dialect.chunk([], self.dialect.usage(ended)) if self.dialect.wanted.usage else b""
        await send({"type": "http.response.body", "body": last + b"data: [DONE]\n\n", "more_body": False})

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            headers = [(name.encode(), value.encode()) for name, value in EVENTS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})


class Telling:
    """What a stream has told of one row."""

    def __init__(self, row: int, dialect: Dialect) -> None:
        self.row, self.dialect = row, dialect
        self.begun, self.text, self.offset = False, "", 0

    def tell(self, news: News) -> list[Json]:
        """Parts of chunks for what is new."""
        parts: list[Json] = []
        if not self.begun:
            self.begun, first = True, self.dialect.first(self.row)
            if first is not None:
                ids, told = self.dialect.echoed(self.row, news.event or news.completion)
                self.offset = sum(len(self.dialect.texts[token]) for token in ids)
                logprobs = self.dialect.logprobs((), 0, (ids, told)) if ids else None
                parts.append(self.dialect.choice(self.row, first, logprobs))
        if news.event is not None:
            parts += self._more(news.event)
        if (one := news.completion) is not None:
            rest = one.text[len(self.text) :]
            parts.append(self.dialect.choice(self.row, self.dialect.more(rest), None, one.finish))
        return parts

    def _more(self, event: Event) -> list[Json]:
        chosen = self.dialect.seen(event.logprobs, event.finish)
        logprobs = self.dialect.logprobs(chosen, self.offset) if chosen else None
        if not event.text and logprobs is None:
            return []
        self.text += event.text
        self.offset += sum(len(self.dialect.texts[one.token]) for one in chosen)
        return [self.dialect.choice(self.row, self.dialect.more(event.text), logprobs)]
