"""`Server`: an engine behind HTTP, in this thread until a signal ends it, or in a thread of its own.

It knows sockets, signals and uvicorn; what is served is the application's.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fms_parallel.errors import ConfigError, FmsError
from fms_parallel.inference.engine import InferenceEngine
from fms_parallel.inference.server.chat import ChatTemplate
from fms_parallel.inference.server.options import ServerOptions

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STARTING = 60.0
"""Seconds that a server in a thread gets to begin."""


def bind(options: ServerOptions) -> socket.socket:
    """The socket to listen on, so that a taken port is known before a model is read.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        said = f"cannot listen on {options.host} port {options.port}: {error.strerror or error}"
        raise ConfigError(f"{said}. Choose another --host or --port (0 takes a free one).") from None
    return found


class Server:
    """Serves an engine that has a tokenizer and that nobody else drives; it closes the engine at its end.

        with Server(engine, "my-model", ServerOptions(port=0)) as server:  # in a thread
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="-")

    Args:
        engine: on the first rank; the others call `engine.follow()`. name: what clients call the model.
        folder: of the tokenizer, which may have a chat template. ends: tokens that end a row (None: its eos).
        listener: what `bind` gave.
    Attributes:
        application: what is served. name: of the model. url: where.
    Raises:
        ConfigError: no tokenizer, not the first rank, an address that cannot be had, or a missing extra.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        name: str,
        options: ServerOptions | None = None,
        *,
        folder: str | Path | None = None,
        ends: frozenset[int] | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        options = options or ServerOptions()
        uvicorn = require()
        from fms_parallel.inference.server.app import Application

        if engine.tokenizer is None:
            raise ConfigError("this engine has no tokenizer: a server needs one.")
        if not engine.ranks.is_first:
            raise ConfigError("a server is for the first rank; the others call engine.follow().")
        template = ChatTemplate.find(engine.tokenizer, None if folder is None else Path(folder), options.chat_template)
        self.name = options.served_model_name or name
        self.application = Application(engine, self.name, template, options, ends)
        self._listener = bind(options) if listener is None else listener
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        settings = uvicorn.Config(
            self.application.asgi,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=options.max_connections,
            timeout_graceful_shutdown=math.ceil(options.drain_timeout),
            callback_notify=self._notify,
        )
        self._server = uvicorn.Server(settings)
        self.application.driver.died = lambda: self._end_in(options.linger_timeout)
        self._thread: threading.Thread | None = None
        self._tell: Callable[[], object] | None = None

    @property
    def ready(self) -> bool:
        """Whether it listens."""
        return bool(self._server.started)

    def run(self, ready: Callable[[], object] | None = None) -> None:
        """Serve until SIGTERM or SIGINT; then requests get drain_timeout to end, and the rest is cancelled.

        When the engine dies, it serves for linger_timeout more, to say so.

        Args:
            ready: called once, when it listens.
        Raises:
            FmsError: the engine had died.
        """
        # uvicorn gives signals that it has obeyed back to whoever had them before, to end the process.
        self._tell = ready
        before = {one: signal.signal(one, lambda *_: None) for one in SIGNALS}
        try:
            self._server.run([self._listener])
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        if self.application.driver.trouble is not None:
            raise FmsError(f"{self.application.driver.trouble}.")

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="http", daemon=True)
        self._thread.start()
        limit = time.monotonic() + STARTING
        while not self.ready:
            if not self._thread.is_alive() or time.monotonic() > limit:
                raise FmsError(f"the server has not begun to listen on {self.url}; its log tells why.")
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End a server that runs in a thread, as SIGTERM ends one that does not."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def _end_in(self, seconds: float) -> None:
        """Stay to say that the engine has died, then end: whoever started the server may start it anew."""
        asyncio.get_running_loop().call_later(seconds, lambda: setattr(self._server, "should_exit", True))

    async def _notify(self) -> None:
        """uvicorn calls it when it has begun to listen, and now and then after."""
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()


def require() -> Any:
    """uvicorn. Raises ConfigError when the extra is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ConfigError(f"the server needs `{error.name}`: pip install 'fms_parallel[serve]'.") from None
    return uvicorn
