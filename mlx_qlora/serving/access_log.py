"""One plain line for each response."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from mlx_qlora.serving.streaming import Reply

CLIENT_LEFT = 499
"""nginx's status for a client that left; it is only ever logged."""


class AccessLog:
    """One plain line for each response: when, who, what, how long; no prompt, no key, no query.

    It also counts the response, and adds what every response carries.

    Args:
        log: Takes a line.
        count: Takes a route's path and a status.
    """

    def __init__(self, app: ASGIApp, log: Callable[[str], None], count: Callable[[str, int], None]) -> None:
        self.app, self.log, self.count = app, log, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log its response when it has ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self._say(scope, status, time.perf_counter() - started)

    def _say(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope.get("state", {})
        reply: Reply | None = state.get("reply")
        if reply is not None and reply.is_gone:
            status = CLIENT_LEFT
        route = scope.get("route")
        self.count(getattr(route, "path", "other"), status)
        words = [
            datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            (scope.get("client") or ("-",))[0],
            scope["method"],
            quote(scope["path"], safe="/:@")[:200],
            str(status),
            f"{seconds:.3f}s",
        ]
        if served := state.get("served"):
            words.append(f"model={served}")
        if reply is not None:
            choices = reply.choices
            words.append(f"tokens={sum(c.prompt_tokens for c in choices)}+"
                         f"{sum(c.generated_tokens for c in choices)}")  # fmt: skip
        self.log(" ".join(words))
