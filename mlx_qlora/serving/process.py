"""The server as a process: its socket, its patience with slow clients, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_qlora.errors import ConfigError
from mlx_qlora.serving.answers import encoded
from mlx_qlora.serving.app import Service
from mlx_qlora.serving.limits import Limits, over_limit

SEND_BUFFER_BYTES = 128 * 1024
"""The kernel's, of each connection: what it holds for a slow reader is memory too."""
GRACE_SECONDS = 5
"""For the last bytes of answers that are done, and for threads to end."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket on that address, not yet listening, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: there is no such address, or it is in use.
    """
    again = f"mlx-qlora serve … --host 127.0.0.1 --port {port + 1 if 0 < port < 65535 else 0}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # children inherit it
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"Cannot serve on {host} port {port}: {error}.", run=again) from None
    return made


def url_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with an end to patience: slow headers, readers that stall, too many connections."""

    def __init__(self, *arguments: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            body = encoded(over_limit(503, self._limits, "connections", "Too many connections").body())
            head = (
                "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                f"Retry-After: 1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            transport.write(head.encode("ascii") + body)
            transport.close()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget its deadlines."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on, and see whether a request is whole."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """After an answer the client may send a next request, or the rest of a body nobody reads."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not read: from now on it has so many seconds."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _watch(self) -> None:
        theirs, ours = self.conn.their_state, self.conn.our_state
        is_late = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours in (h11.DONE, h11.MUST_CLOSE))
        if is_late and self._deadline is None:
            self._deadline = self.loop.call_later(self._limits.header_seconds, self.transport.abort)
        elif not is_late and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    """uvicorn without its own signals, which says when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """`ServerProcess` does."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._on_ready()


class ServerProcess:
    """Runs an application until a signal or the generation thread's death ends it.

    Args:
        say: Prints a line for a person.
        end_process: Ends at once with an exit code; tests pass their own.
    """

    def __init__(self, say: Callable[[str], None], end_process: Callable[[int], None] = os._exit) -> None:
        self._say, self._end_process = say, end_process
        self._exit_code = 0
        self._service: Service | None = None
        self._server: _Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._death: BaseException | None = None

    def on_death(self, error: BaseException) -> None:
        """The engine's thread died of this; called on it. The process ends with exit code 1."""
        self._death = error
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # already closed
                self._loop.call_soon_threadsafe(self._die)
        self._end_later(1)

    def run(self, app: FastAPI, service: Service, bound: socket.socket, on_ready: Callable[[], None]) -> int:
        """Serve on `bound`; the exit code.

        0: told to stop, and every running answer came to its end. 128 + n: signal n cut some off. 1: the
        generation thread died.
        """
        self._service = service
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(PatientProtocol, limits=service.limits)),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self._server = _Server(config, on_ready)
        asyncio.run(self._serve(bound))
        self._end_later(self._exit_code)
        service.engine.stop()
        return self._exit_code

    async def _serve(self, bound: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal, number)
        if self._death is not None:
            self._die()
        if self._server is not None:
            await self._server.serve(sockets=[bound])

    def _on_signal(self, number: int) -> None:
        if self._draining is not None:
            self._say("Stopped at once.")
            self._end_process(128 + number)
        self._draining = asyncio.create_task(self._drain(number))

    async def _drain(self, number: int) -> None:
        if self._service is None or self._server is None:
            return
        self._service.is_draining = True
        num_left, seconds = len(self._service.open_replies), self._service.limits.drain_seconds
        self._say(
            f"Stopping: {num_left} answers may end within {seconds:g} s; a second signal stops at once."
        )
        if not await asyncio.to_thread(self._service.engine.drain, seconds):
            num_cut = len(self._service.open_replies)
            self._exit_code = self._exit_code or 128 + number
            self._service.fail_all("The server is stopping.")
            self._say(f"{num_cut} answers were cut off.")
        self._server.should_exit = True

    def _die(self) -> None:
        name = type(self._death).__name__
        self._say(f"error: the generation thread died ({name}: {self._death}); the server ends.")
        self._exit_code = 1
        if self._service is not None:
            self._service.fail_all("The generation thread died; the server ends.")
        if self._server is not None:
            self._server.should_exit = True

    def _end_later(self, exit_code: int) -> None:
        """A thread that hangs must not keep the process."""

        def end() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            self._end_process(exit_code)

        timer = threading.Timer(2 * GRACE_SECONDS, end)
        timer.daemon = True
        timer.start()
