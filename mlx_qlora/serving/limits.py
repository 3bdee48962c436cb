"""What one request may cost, and how a refusal is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what a client may ask of the server. A refusal names the field and its value."""

    body_bytes: int = 2 * MIB
    """Of a request's body; a larger one is 413."""
    body_seconds: float = 30.0
    """For a request's body to arrive; a slower one is 408."""
    header_seconds: float = 10.0
    """For a request's headers to arrive; a slower connection is closed."""
    stalled_seconds: float = 30.0
    """For a client to go on reading its answer; then its connection is cut and its slot is free."""
    buffered_pieces: int = 1024
    """Of one stream, made and not yet taken by a slow reader; then the answer is cut off."""
    connections: int = 512
    """Open at once; one more is 503."""
    max_tokens: int = 4096
    """Of one answer; asking for more is 422."""
    prompts: int = 16
    """In one /v1/completions request."""
    request_seconds: float = 600.0
    """From the request to its last token, waiting included; an answer that takes longer is 503."""
    drain_seconds: float = 30.0
    """For running answers to end after SIGTERM."""


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not answered, in OpenAI's error form.

    Args:
        status: HTTP status.
        message: What is wrong, and what would be right.
        param: The field it is about.
        code: A word for programs.
        limit: Name and value of the limit that was passed.
        retry_after_seconds: When to try again.
        headers: Sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        limit: tuple[str, float] | None = None,
        retry_after_seconds: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.limit = status, message, param, code, limit
        self.headers = dict(headers or {})
        if retry_after_seconds is not None:
            self.headers["Retry-After"] = str(retry_after_seconds)

    def body(self) -> dict[str, Any]:
        """The JSON object a client gets."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        if self.limit is not None:
            error["limit"] = {"name": self.limit[0], "value": self.limit[1]}
        return {"error": error}


def over_limit(status: int, limits: Limits, name: str, message: str, **more: Any) -> Refusal:
    """A refusal because of the field `name` of `limits`."""
    value = getattr(limits, name)
    return Refusal(status, f"{message} ({name} = {value:g})", code=name, limit=(name, value), **more)
