"""`ServerOptions`: where a server listens and what it lets its clients ask for. It knows numbers; nothing of HTTP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fms_parallel.errors import ConfigError

LAST_PORT = 65535


def _option(default: Any, about: str, kind: type | None = None) -> Any:
    return field(default=default, metadata={"help": about} | ({} if kind is None else {"type": kind}))


@dataclass(frozen=True)
class ServerOptions:
    """Each field is a flag of the command; its help says what it means.

    Raises:
        ConfigError: a limit below what can be.
    """

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 is every one")
    port: int = _option(8000, "0 takes a free one")
    served_model_name: str | None = _option(None, "what clients call the model (default: its folder or variant)", str)
    max_queue: int = _option(256, "rows that may wait beside max_batch_size running ones; beyond: 429")
    max_tokens: int | None = _option(None, "most new tokens that one request may ask for (default: what fits)", int)
    max_body_bytes: int = _option(4 * 2**20, "largest body of a request; beyond: 413")
    max_connections: int = _option(1024, "open at a time; beyond: 503")
    body_timeout: float = _option(30.0, "seconds until a request's body must have come: 408")
    request_timeout: float = _option(600.0, "seconds until a request must have been answered: 504")
    drain_timeout: float = _option(20.0, "seconds that requests get to end after SIGTERM")
    stall_timeout: float = _option(120.0, "seconds of one step of the engine after which /health says 503")
    linger_timeout: float = _option(10.0, "seconds that a server whose engine has died stays to say so, then it ends")
    api_key: str | None = _option(None, "clients of /v1 must send it as a bearer token", str)
    allowed_origins: str | None = _option(
        None, "web pages whose scripts may ask, as https://a.example,http://localhost:3000; * is every one", str
    )
    chat_template: str | None = _option(None, "Jinja file for chats (default: the tokenizer's, or a plain one)", str)

    def __post_init__(self) -> None:
        least = {"port": 0, "max_queue": 0, "max_tokens": 1, "max_body_bytes": 1, "max_connections": 1}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in least and value is not None and value < least[one.name]:
                raise ConfigError(f"{one.name}={value}: must be >= {least[one.name]}.")
            if one.name.endswith("_timeout") and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{one.name}={value}: must be a number of seconds >= 0.")
        if self.port > LAST_PORT:
            raise ConfigError(f"port={self.port}: must be <= {LAST_PORT}.")
        if self.api_key == "":
            raise ConfigError("api_key is empty: leave it out to serve everybody.")
