"""From the generation thread to a client: pieces handed over without waiting, bounded, told as they come."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_qlora.serving.answers import ChatForm, Choice, encoded
from mlx_qlora.serving.jobs import JobFailed, Piece
from mlx_qlora.serving.limits import Limits, Refusal, over_limit
from mlx_qlora.serving.security import refusal_response

if TYPE_CHECKING:
    from mlx_qlora.serving.engine import Ticket

KEEP_ALIVE_SECONDS = 15.0
"""Without news for so long, a stream sends a comment: proxies close what seems dead."""
Item = tuple[int, Piece | JobFailed]


class Mailbox:
    """Hands items to the event loop: one wake-up for all that have come, so a batch's step costs one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Reply, Item]] = deque()
        self._lock = threading.Lock()
        self._is_awaited = False

    def post(self, reply: Reply, index: int, item: Piece | JobFailed) -> None:
        """Called on the generation thread; never waits, never raises."""
        self._items.append((reply, (index, item)))
        with self._lock:
            if self._is_awaited:
                return
            self._is_awaited = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._items.clear()

    def _deliver(self) -> None:
        with self._lock:
            self._is_awaited = False
        while self._items:
            reply, item = self._items.popleft()
            reply.put(item)


class Reply:
    """The running jobs of one request, and what they gave that is not yet taken.

    Args:
        max_pieces: More than so many not yet taken, and the jobs are cancelled.
    """

    def __init__(self, mailbox: Mailbox, num_jobs: int, *, limits: Limits) -> None:
        self.choices = [Choice() for _ in range(num_jobs)]
        self.is_gone = False
        """The client left."""
        self._limits, self._mailbox = limits, mailbox
        self._items: deque[Item] = deque()
        self._news = asyncio.Event()
        self._tickets: list[Ticket] = []
        self._num_running = num_jobs
        self._failure: Refusal | None = None

    def listener(self, index: int) -> Callable[[Piece | JobFailed], None]:
        """What the engine calls with job `index`'s pieces."""
        return partial(self._mailbox.post, self, index)

    def hold(self, ticket: Ticket) -> None:
        """Keep a submitted job's ticket, to cancel it by."""
        self._tickets.append(ticket)

    def put(self, item: Item) -> None:
        """Take in an item, in the event loop."""
        if self._failure is not None or self.is_gone:
            return
        self._items.append(item)
        self._news.set()
        if len(self._items) > self._limits.buffered_pieces * len(self.choices):
            self.fail(over_limit(503, self._limits, "buffered_pieces", "The answer was read too slowly"))

    def fail(self, refusal: Refusal) -> None:
        """End with an error, after what has already come."""
        self._failure = self._failure or refusal
        self.cancel()
        self._news.set()

    def leave(self) -> None:
        """The client is gone: free the slots."""
        self.is_gone = True
        self.cancel()
        self._news.set()

    def cancel(self) -> None:
        """Stop all jobs; harmless when they have ended."""
        for ticket in self._tickets:
            ticket.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.is_gone or (self._num_running == 0 and not self._items)

    async def take(self, timeout_seconds: float | None = None) -> list[Item]:
        """What has come since the last time, waited for; empty when it took too long, or the client left.

        Raises:
            Refusal: a job failed or timed out, or the reader was too slow.
        """
        if not self._items and not self.is_gone and self._failure is None:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._news.wait()
            except TimeoutError:
                return []
        self._news.clear()
        if not self._items and self._failure is not None and not self.is_gone:
            raise self._failure
        taken = list(self._items)
        self._items.clear()
        for _, item in taken:
            self._raise_if_failed(item)
            self._num_running -= isinstance(item, Piece) and item.finish_reason is not None
        return taken

    def _raise_if_failed(self, item: Piece | JobFailed) -> None:
        if isinstance(item, JobFailed):
            self.cancel()
            raise Refusal(500, f"This answer failed: {item.what}", code="generation_failed")
        if item.finish_reason == "timeout":
            self.cancel()
            raise over_limit(503, self._limits, "request_seconds", "The answer took too long")
        if item.finish_reason == "cancelled":
            raise Refusal(503, "The server is stopping.", code="stopping", retry_after_seconds=1)


@asynccontextmanager
async def watched(reply: Reply, receive: Receive) -> AsyncIterator[None]:
    """A client that leaves frees its slots; on the way out, whatever still runs is cancelled."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        reply.leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        reply.cancel()


async def collect(reply: Reply) -> Sequence[Choice]:
    """Wait for the whole answer.

    Raises:
        Refusal: as `Reply.take`.
    """
    while not reply.has_ended:
        for index, piece in await reply.take():
            if isinstance(piece, Piece):
                reply.choices[index].add(piece)
    return reply.choices


class EventStream(Response):
    """An answer as server-sent events. The status waits for the first piece: early failures have theirs."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, form: ChatForm, on_end: Callable[[], None]) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        # X-Accel-Buffering: nginx passes events on as they come
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._reply, self._form, self._on_end = reply, form, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the answer ends or the client leaves."""
        try:
            async with watched(self._reply, receive):
                await self._respond(scope, receive, send)
        finally:
            self._on_end()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            items = await self._reply.take(KEEP_ALIVE_SECONDS)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        openings = [self._form.opening(index) for index in range(len(self._reply.choices))]
        await _send(send, b"".join(filter(None, openings)) + self._told(items))
        try:
            while not self._reply.has_ended:
                items = await self._reply.take(KEEP_ALIVE_SECONDS)
                await _send(send, self._told(items) if items else b": waiting\n\n")
            ending = self._form.ending(self._reply.choices)
        except Refusal as refusal:
            # without [DONE]: the answer is not whole
            ending = b"data: " + encoded(refusal.body()) + b"\n\n"
        await send({"type": "http.response.body", "body": ending, "more_body": False})

    def _told(self, items: Sequence[Item]) -> bytes:
        """Chunks of what came at once: one for each choice, however many pieces a slow reader left lying."""
        texts: dict[int, list[Piece]] = {}
        for index, piece in items:
            if isinstance(piece, Piece):
                texts.setdefault(index, []).append(piece)
        chunks = []
        for index, pieces in texts.items():
            choice = self._reply.choices[index]
            choice.count(pieces[-1])
            text = "".join(piece.text for piece in pieces)
            logprobs = [each for piece in pieces for each in piece.logprobs]
            chunks.append(self._form.chunk(index, choice, text, logprobs))
        return b"".join(filter(None, chunks))


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
