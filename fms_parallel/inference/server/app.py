"""The paths of the server, as an ASGI application (starlette): who may ask, what is asked, and who answers.

    POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize
    GET  /v1/models, /v1/models/NAME, /health, /metrics

It knows HTTP and the rooms beside it; it knows the engine by its sizes only, and runs no model.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fms_parallel.errors import FmsError
from fms_parallel.inference.engine import InferenceEngine
from fms_parallel.inference.options import check_tokens
from fms_parallel.inference.request import Ids
from fms_parallel.inference.server import fields
from fms_parallel.inference.server.answers import ChatDialect, CompletionDialect, Dialect, TokenTexts
from fms_parallel.inference.server.chat import ChatTemplate
from fms_parallel.inference.server.driver import Driver, Ticket
from fms_parallel.inference.server.exchange import JSON, Exchange, answer
from fms_parallel.inference.server.failure import CLIENT_LEFT, Failure, bad
from fms_parallel.inference.server.fields import Wanted
from fms_parallel.inference.server.metrics import CONTENT_TYPE, Metrics
from fms_parallel.inference.server.options import ServerOptions

Dialects = dict[str, tuple[Callable[[Mapping[str, Any]], Wanted], type[Dialect], str]]
DIALECTS: Dialects = {
    "/v1/completions": (fields.completion, CompletionDialect, "prompt"),
    "/v1/chat/completions": (fields.chat, ChatDialect, "messages"),
}
"""Path -> how its bodies are read, how it answers, and the field that its prompts come from."""
NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""Options of the engine -> the fields that they come from, where those have another name."""
OPEN = ("/health", "/metrics")
"""Paths that ask for no key."""
READERS = 2
"""Threads that read bodies: texts become tokens there, so that a long one delays nobody's stream."""


class Application:
    """One engine behind HTTP.

    Args:
        engine: with a tokenizer, and driven by nobody. name: what clients call the model.
        ends: tokens that end a row (None: the tokenizer's eos).
    Attributes:
        asgi: the application. driver: of the engine; it starts and stops with the application.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        name: str,
        template: ChatTemplate,
        options: ServerOptions,
        ends: frozenset[int] | None = None,
    ) -> None:
        assert engine.tokenizer is not None
        self.engine, self.name, self.template, self.options = engine, name, template, options
        own = engine.tokenizer.eos_id
        self.ends = ends if ends is not None else frozenset() if own is None else frozenset({own})
        self.tokenizer, self.texts = engine.tokenizer, TokenTexts(engine.tokenizer)
        self.metrics, self.created = Metrics(), int(time.time())
        self.driver = Driver(engine, engine.setup.rows + options.max_queue, self.metrics.ended)
        self._readers = ThreadPoolExecutor(READERS, "requests")
        routes = [Route(path, self._generate, methods=["POST"]) for path in DIALECTS]
        routes += [
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._page),
        ]
        self._paths = (*DIALECTS, "/v1/models", "/tokenize", "/detokenize", *OPEN)
        handlers: dict[Any, Any] = {Failure: _tell, HTTPException: self._tell_http, Exception: _tell_bug}
        app = self._gate(Starlette(routes=routes, lifespan=self._life, exception_handlers=handlers))
        self.asgi: ASGIApp = self._for_pages(app)

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self.driver.start()
        try:
            yield
        finally:
            await self.driver.stop()
            self._readers.shutdown(wait=False)

    # ---- around every request ----------------------------------------------------------------------------------

    def _gate(self, app: ASGIApp) -> ASGIApp:
        """Counts requests, and turns away those without the key."""

        async def gate(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            seen = scope.setdefault("state", {})

            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    seen["status"] = message["status"]
                await send(message)

            try:
                refused = self._refused(scope)
                await (app if refused is None else refused)(scope, receive, sent)
            finally:
                path = scope["path"] if scope["path"] in self._paths else "other"
                self.metrics.answered(path, seen.get("final", seen.get("status", CLIENT_LEFT)))

        return gate

    def _refused(self, scope: Scope) -> Response | None:
        if self.options.api_key is None or scope["path"] in OPEN:
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, b"Bearer " + self.options.api_key.encode()):
            return None
        said = "wrong or missing API key: send the header 'Authorization: Bearer KEY'."
        return answer(Failure(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"}))

    def _for_pages(self, app: ASGIApp) -> ASGIApp:
        """Lets browsers' scripts from some places ask; outermost, for browsers ask whether they may without the key."""
        if self.options.allowed_origins is None:
            return app
        origins = [one.strip().rstrip("/") for one in self.options.allowed_origins.split(",")]
        return CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=["*"])

    async def _tell_http(self, request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return answer(Failure(404, f"no path {path}. Known: {', '.join(self._paths)}."))
        said = f"{request.method} {path}: {error.detail}."
        return answer(Failure(error.status_code, said, headers=error.headers))

    # ---- small pages (async all of them: starlette hands others to threads, which may be busy) -----------------

    async def _health(self, _: Request) -> Response:
        stalled, most = self.driver.stalled(), self.options.stall_timeout
        trouble = self.driver.trouble
        if trouble is None and stalled > most:
            trouble = f"a step of the engine takes {stalled:.0f} s by now, more than stall_timeout={most:g}"
        return JSON({"status": trouble or "ok"}, 200 if trouble is None else 503)

    async def _page(self, _: Request) -> Response:
        text = self.metrics.page(self.driver.snapshot, self.driver.in_flight, self.driver.trouble is None)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def _models(self, _: Request) -> Response:
        return JSON({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSON(self._described())

    def _described(self) -> dict[str, Any]:
        longest = self.engine.setup.longest
        known = {"id": self.name, "object": "model", "created": self.created, "owned_by": "fms_parallel"}
        return {**known, "max_model_len": longest}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            said = f"no model {fields.shown(name)}: this server has {self.name!r}."
            raise Failure(404, said, "model", "model_not_found")

    # ---- tokens ------------------------------------------------------------------------------------------------

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSON(await asyncio.get_running_loop().run_in_executor(self._readers, self._read_tokens, body))

    def _read_tokens(self, body: bytes) -> dict[str, Any]:
        wanted = fields.tokenize(fields.parse(body))
        self._check_model(wanted.model)
        tokens = self._tokens(wanted, "messages" if wanted.messages else "prompt")[0]
        return {"count": len(tokens), "max_model_len": self.engine.setup.longest, "tokens": tokens}

    async def _detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSON(await asyncio.get_running_loop().run_in_executor(self._readers, self._read_text, body))

    def _read_text(self, body: bytes) -> dict[str, Any]:
        name, tokens = fields.detokenize(fields.parse(body))
        self._check_model(name)
        self._check_tokens("tokens", tokens)
        return {"prompt": self.tokenizer.decode(tokens)}

    def _check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        try:
            check_tokens(name, tokens, self.engine.vocab)
        except FmsError as error:
            raise bad(name, str(error)) from None

    # ---- generating --------------------------------------------------------------------------------------------

    async def _generate(self, request: Request) -> Response:
        path = request.url.path
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        wanted, prompts, words = await loop.run_in_executor(self._readers, self._read, path, body)
        ticket = self.driver.open(len(words))
        try:
            rows = [prompt for prompt in prompts for _ in range(wanted.rows)]
            await loop.run_in_executor(self._readers, self._submit, ticket, rows, words)
        except BaseException:
            self.driver.close(ticket)
            raise
        ends = self._ends(wanted)
        dialect = DIALECTS[path][1](wanted, self.name, prompts, ends, self.texts, self.tokenizer)
        seen = request.scope["state"]
        return Exchange(
            self.driver,
            ticket,
            dialect,
            self.options.request_timeout,
            lambda status: seen.update(final=status),
        )

    async def _body(self, request: Request) -> bytes:
        """The whole body, in its time and of its size."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Failure(415, f"content-type is {kind or 'missing'!r}: send application/json.")
        most = self.options.max_body_bytes
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(int(length), most)
        try:
            return await asyncio.wait_for(_gather(request, most), self.options.body_timeout)
        except asyncio.TimeoutError:
            said = f"the body has not come within {self.options.body_timeout:g} s (body_timeout)."
            raise Failure(408, said, headers={"connection": "close"}) from None
        except ClientDisconnect:
            raise Failure(CLIENT_LEFT, "the client has left") from None

    def _read(self, path: str, body: bytes) -> tuple[Wanted, list[Ids], list[dict[str, Any]]]:
        """What is wanted, behind which tokens, with which options for the engine. In a thread of its own."""
        reader, _, name = DIALECTS[path]
        wanted = reader(fields.parse(body))
        self._check_model(wanted.model)
        prompts = self._tokens(wanted, name)
        return wanted, prompts, self._words(wanted, name, prompts)

    def _tokens(self, wanted: Wanted, name: str) -> list[Ids]:
        try:
            if wanted.messages:
                return [self.engine.intake.ids(self.template.ids(wanted.messages, wanted.template), name)]
            several = len(wanted.prompts) > 1
            return [
                self.engine.intake.ids(prompt, f"{name}[{place}]" if several else name)
                for place, prompt in enumerate(wanted.prompts)
            ]
        except FmsError as error:
            raise bad(name, str(error)) from None

    def _words(self, wanted: Wanted, name: str, prompts: list[Ids]) -> list[dict[str, Any]]:
        """Options of each row, in the engine's words."""
        words = dict(wanted.options)
        words.setdefault("seed", secrets.randbits(63))
        words.pop("ignore_eos", None)
        self._check_tokens("stop_token_ids", wanted.ends)
        words["eos_id"] = sorted(self._ends(wanted)) or None
        # Which rows are the likeliest is found from their log-probabilities.
        words["logprobs"] = 0 if wanted.logprobs is None and wanted.rows > wanted.n else wanted.logprobs
        words["prompt_logprobs"] = wanted.prompt_logprobs
        limits = [self._limit(wanted, name, prompt) for prompt in prompts for _ in range(wanted.rows)]
        return [{**words, "row": row, "max_new_tokens": limit} for row, limit in enumerate(limits)]

    def _ends(self, wanted: Wanted) -> frozenset[int]:
        """Tokens that end its rows."""
        return frozenset(wanted.ends) | (frozenset() if wanted.options.get("ignore_eos") else self.ends)

    def _limit(self, wanted: Wanted, name: str, prompt: Ids) -> int:
        """New tokens that a prompt may get."""
        longest, most = self.engine.setup.longest, self.options.max_tokens
        room = longest - len(prompt)
        if room < (0 if wanted.max_tokens == 0 else 1):
            raise bad(
                name,
                f"{name} has {len(prompt):,} tokens, and max_seq_len={longest:,} must hold at least one more: "
                f"send at most {longest - 1:,} tokens.",
            )
        if wanted.max_tokens is None:
            return min(room, most or room)
        if most is not None and wanted.max_tokens > most:
            raise bad("max_tokens", f"max_tokens={wanted.max_tokens}: this server gives at most {most} (max_tokens).")
        if wanted.max_tokens > room:
            raise bad(
                "max_tokens",
                f"{name} has {len(prompt):,} tokens; with max_tokens={wanted.max_tokens:,} that makes "
                f"{len(prompt) + wanted.max_tokens:,}, beyond max_seq_len={longest:,}: shorten it, or ask for at most "
                f"{room:,} new tokens.",
            )
        return wanted.max_tokens

    def _submit(self, ticket: Ticket, rows: list[Ids], words: list[dict[str, Any]]) -> None:
        """In a thread of its own: the engine checks every row."""
        try:
            self.driver.submit(ticket, rows, words)
        except FmsError as error:
            # The engine's sentences begin with the option that they are about.
            option = re.split(r"\W", str(error), maxsplit=1)[0]
            option = NAMES.get(option, option)
            raise Failure(400, str(error), option if option in fields.SHARED else None) from None


async def _gather(request: Request, most: int) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise _too_large(len(found), most)
    return bytes(found)


def _too_large(size: int, most: int) -> Failure:
    said = f"the body has {size:,} bytes or more, max_body_bytes={most:,}: send less at a time."
    return Failure(413, said, headers={"connection": "close"})


async def _tell(_: Request, failure: Exception) -> Response:
    assert isinstance(failure, Failure)
    return answer(failure)


async def _tell_bug(_: Request, error: Exception) -> Response:
    return answer(Failure(500, f"a bug in the server, whose log tells more: {type(error).__name__}."))
