"""`Failure`: a request that gets no answer, as a status and one sentence. It knows statuses; nothing of a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLIENT_LEFT = 499
"""Nobody is told it: the client has closed its connection. It is what such requests are counted as."""

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> the word that OpenAI's clients expect; 4xx are `invalid_request_error`, others `server_error`."""


class Failure(Exception):
    """Why there is no answer.

    Attributes:
        status: of HTTP. message: one sentence: the number, the rule, the way out. param: the field it is about.
        code: a word for programs. headers: more of them for the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """As OpenAI's servers say it."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(field: str, sentence: str) -> Failure:
    """A field that cannot be what it is."""
    return Failure(400, sentence, field)
