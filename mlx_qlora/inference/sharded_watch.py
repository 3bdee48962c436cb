"""Ranks that answer together: started, watched, ended together; what rank 0 says is the answer.

What happened is read from what each rank says over its connection. Exit codes are not believed: that of
``mlx.launch`` is 0 when a rank died. A failure is not tried again: a person has waited, and sees it.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mlx_qlora.errors import Interrupted, MlxQloraError
from mlx_qlora.inference.generate import Answer
from mlx_qlora.inference.sharded_links import Connection, Launcher, Message, Started
from mlx_qlora.inference.sharded_question import Question, RankReport

LOST_PEER = "RuntimeError: [ring]"
"""How a rank fails that did nothing wrong (mlx 0.32.4)."""

SLOWEST_GAP = 10
"""A token may take so many times as long as the slowest one before it."""


class RankError(MlxQloraError):
    """Ranks that did not stay alive until the answer was whole."""


@dataclass(frozen=True)
class Patience:
    """How long ranks may be silent; seconds."""

    hello: float = 15.0
    """From a rank's start until it connects."""
    joining: float = 15.0
    """From the first rank that joins until all have."""
    heartbeat: float = 10.0
    """Between two signs of life; a stopped process gives none."""
    token: float = 12.0
    """From one token to the next, after the first; longer where tokens have taken long before."""
    last_words: float = 1.0
    """For the other ranks to say how they ended, when one has."""


@dataclass
class Peer:
    """What is known of one rank."""

    connection: Connection | None = None
    seen_at: float = 0.0
    phase: str = "starting"
    num_tokens: int = 0
    ending: Message | None = None
    gone_at: float | None = None
    """When its connection was lost."""


class SharedAnswer:
    """One answer of several ranks.

    Args:
        question: What is asked.
        launcher: How the ranks are started.
        connect: Makes a connection of a socket.
        on_note: Told what a person should know of how the model was loaded.
        on_bytes: Called with (done, total) while rank 0 quantizes the base.

    Attributes:
        reports: Of each rank, once the answer is whole.
    """

    def __init__(
        self,
        question: Question,
        launcher: Launcher,
        connect: Callable[[socket.socket], Connection],
        *,
        on_note: Callable[[str], None] | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.launcher, self.connect, self.patience = launcher, connect, patience or Patience()
        self.on_note, self.on_bytes = on_note, on_bytes
        self.reports: list[RankReport] = []
        self._job = question.message()
        self._token = secrets.token_hex(16)
        self._peers = [Peer() for _ in range(launcher.size)]
        self._selector = selectors.DefaultSelector()
        self._strangers: list[Connection] = []
        self._heard: list[Message] = []
        self._answer: Answer | None = None
        self._started_at = self._joining_since = self._looked_at = 0.0
        self._moved_at = self._first_gap = self._slowest = 0.0

    def stream(self) -> Generator[tuple[str, Answer], None, None]:
        """The answer, piece by piece; with each piece, the whole so far. To be used once, and closed.

        Raises:
            RankError: a rank died, hung or never joined; all are ended, and the message says how.
            MlxQloraError: what any rank raised.
            Interrupted: Ctrl-C or SIGTERM.
        """
        with (
            _interruptible(),
            tempfile.TemporaryDirectory(prefix="mlx-qlora-") as folder,
            socket.create_server((self.launcher.control_address, 0)) as server,
        ):
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            control = f"{self.launcher.control_address}:{server.getsockname()[1]}"
            self._started_at = self._looked_at = time.monotonic()
            started = self.launcher.start(Path(folder), control, self._token)
            try:
                yield from self._watched(started, server)
            finally:
                started.kill()
                for connection in [p.connection for p in self._peers if p.connection] + self._strangers:
                    connection.close()
                self._selector.close()

    def _watched(self, started: Started, server: socket.socket) -> Iterator[tuple[str, Answer]]:
        """Until all have ended well."""
        while not all(peer.ending is not None for peer in self._peers):
            self._read(server, seconds=0.2)
            yield from self._pieces()
            wrong = self._wrong(started)
            if wrong is not None:
                until = time.monotonic() + self.patience.last_words
                while time.monotonic() < until and not all(p.ending or p.gone_at for p in self._peers):
                    self._read(server, seconds=0.05)
                raise self._failure(wrong, started)
        self._check_endings(started)

    def _pieces(self) -> Iterator[tuple[str, Answer]]:
        """Hand on what rank 0 has said, here, where what the caller raises is not taken for a broken link."""
        heard, self._heard = self._heard, []
        for message in heard:
            if "piece" in message:
                self._answer = Answer(**message["answer"])
                yield message["piece"], self._answer
            elif "note" in message and self.on_note is not None:
                self.on_note(message["note"])
            elif "bytes" in message and self.on_bytes is not None:
                self.on_bytes(*message["bytes"])

    def _read(self, server: socket.socket, *, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is server:
                self._accept(server)
            else:
                self._receive(key.data)
        now = time.monotonic()
        if now - self._looked_at > self.patience.heartbeat / 4:
            # This process was stopped itself, or its reader was: what ranks said is still to be read.
            for peer in self._peers:
                peer.seen_at = now
            self._started_at = self._moved_at = now
            self._joining_since = now if self._joining_since else 0.0
        self._looked_at = now

    def _accept(self, server: socket.socket) -> None:
        try:
            stream, _ = server.accept()
        except OSError:
            return  # it went away again
        stream.settimeout(10)
        connection = self.connect(stream)
        self._strangers.append(connection)
        self._selector.register(stream, selectors.EVENT_READ, connection)

    def _receive(self, connection: Connection) -> None:
        peer = next((p for p in self._peers if p.connection is connection), None)
        try:
            for message in connection.received():
                if peer is None:
                    peer = self._introduced(connection, message)
                else:
                    self._take(peer, message)
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError):
            self._selector.unregister(connection.socket)
            if peer is not None:
                peer.gone_at = time.monotonic()
            else:
                connection.close()

    def _introduced(self, connection: Connection, message: Message) -> Peer:
        if not hmac.compare_digest(str(message["token"]), self._token):
            raise ValueError("a stranger")
        rank = int(message["rank"])
        peer = self._peers[rank]
        if rank < 0 or peer.connection is not None:
            raise ValueError("a rank that is there already")
        connection.send({**self._job, "rank": rank, "backend": self.launcher.backend})
        self._strangers.remove(connection)
        peer.connection, peer.seen_at = connection, time.monotonic()
        return peer

    def _take(self, peer: Peer, message: Message) -> None:
        now = time.monotonic()
        peer.seen_at = now
        if "phase" in message:
            state = (str(message["phase"]), int(message["tokens"]))
            if state != (peer.phase, peer.num_tokens):
                peer.phase, peer.num_tokens = state
                self._moved(now)
            if peer.phase == "joining" and not self._joining_since:
                self._joining_since = now
        elif "ending" in message:
            peer.ending = message
            self._moved(now)
        elif peer is self._peers[0]:
            self._heard.append(message)
            if "piece" in message:
                peer.num_tokens = int(message["answer"]["generation_tokens"])
            self._moved(now)

    def _moved(self, now: float) -> None:
        """Remember how long tokens take; the first waits for the prompt, and says little of the others."""
        if not any(peer.phase == "answering" for peer in self._peers):
            return
        gap = now - self._moved_at if self._moved_at else 0.0
        if max(peer.num_tokens for peer in self._peers) > 1:
            self._slowest = max(self._slowest, gap)
        else:
            self._first_gap = max(self._first_gap, gap)
        self._moved_at = now

    def _wrong(self, started: Started) -> str | None:
        """What is wrong with any rank now."""
        now, patience = time.monotonic(), self.patience
        codes = [None] * len(self._peers) if started.is_one_for_all else started.codes()
        for rank, (peer, code) in enumerate(zip(self._peers, codes, strict=True)):
            if peer.ending is not None:
                if peer.ending["ending"] != "finished":
                    return f"rank {rank} failed: {peer.ending['what']}"
            elif _is_dead(peer, code, now - patience.last_words):
                return f"rank {rank} ended without a word{_said(code)}"
            # While it joins, MLX holds the interpreter: there are no heartbeats.
            elif peer.connection and peer.phase != "joining" and now - peer.seen_at > patience.heartbeat:
                return f"rank {rank} gave no sign of life for {patience.heartbeat:.0f} s"
        if started.is_one_for_all and started.codes()[0] is not None:
            return "mlx.launch ended before its ranks"
        return self._absent(now) or self._stuck(now)

    def _absent(self, now: float) -> str | None:
        patience = self.patience
        absent = [rank for rank, peer in enumerate(self._peers) if peer.connection is None]
        if absent and now - self._started_at > patience.hello:
            return f"rank {_listed(absent)} did not start within {patience.hello:.0f} s"
        starting = [rank for rank, peer in enumerate(self._peers) if peer.phase == "starting"]
        late = starting or [rank for rank, peer in enumerate(self._peers) if peer.phase == "joining"]
        if late and self._joining_since and now - self._joining_since > patience.joining:
            return f"rank {_listed(late)} did not join within {patience.joining:.0f} s"
        return None

    def _stuck(self, now: float) -> str | None:
        """Alive, and no token comes: a link that failed, or a rank that waits for something else."""
        if not any(peer.num_tokens for peer in self._peers):
            return None  # a long prompt takes its time
        limit = max(self.patience.token, self._first_gap, SLOWEST_GAP * self._slowest)
        if now - self._moved_at <= limit:
            return None
        counts = ", ".join(str(peer.num_tokens) for peer in self._peers)
        return f"no token came for {limit:.0f} s, and all ranks are alive (they have {counts} tokens)"

    def _failure(self, wrong: str, started: Started) -> MlxQloraError:
        for rank, peer in enumerate(self._peers):
            ending = peer.ending or {}
            if ending.get("ending") == "error":
                where = ", ".join(filter(None, [f"rank {rank}" if rank else None, ending["where"]]))
                error = MlxQloraError(str(ending["what"]), where=where or None, run=ending["run"])
                error.exit_code = int(ending["exit_code"])
                return error
        what = self._cause(started) or wrong
        rank = next((r for r in range(len(self._peers)) if f"rank {r} " in what), 0)
        told = (self._peers[rank].ending or {}).get("trace") or started.last_lines(rank)
        quoted = "".join(f"\n    {line}" for line in str(told).splitlines())
        return RankError(
            f"The answer was given up, and all ranks are ended: {what}{quoted}",
            run="mlx-qlora infer …   # again; --offload answers on one machine",
        )

    def _cause(self, started: Started) -> str | None:
        """The rank that failed by itself: those that lost it fail too, perhaps sooner."""
        codes = [None] * len(self._peers) if started.is_one_for_all else started.codes()
        for rank, peer in enumerate(self._peers):
            ending = peer.ending or {}
            if ending.get("ending") == "fault" and not ending["what"].startswith(LOST_PEER):
                return f"rank {rank} failed: {ending['what']}"
        for rank, (peer, code) in enumerate(zip(self._peers, codes, strict=True)):
            if peer.ending is None and (peer.gone_at or code is not None):
                return f"rank {rank} ended without a word{_said(code)}"
        return None

    def _check_endings(self, started: Started) -> None:
        """All say that they finished; what they say must be one answer, the one that was handed on."""
        endings = [peer.ending or {} for peer in self._peers]
        if any(ending.get("ending") != "finished" for ending in endings):
            raise self._failure("the ranks did not end together", started)
        texts = {(ending["tokens"], ending["text_sha256"]) for ending in endings}
        if len(texts) != 1 or self._answer is None or self._answer.generation_tokens != endings[0]["tokens"]:
            raise RankError("The ranks came to different answers, so none can be trusted.")
        names = ("sharding", "weights_bytes", "peak_memory_bytes")
        self.reports = [
            RankReport(rank=rank, **{name: ending[name] for name in names})
            for rank, ending in enumerate(endings)
        ]


def _is_dead(peer: Peer, code: int | None, long_ago: float) -> bool:
    """Whether a rank that told no ending is gone, and all that it sent was read."""
    if peer.connection is None:
        return code is not None
    return peer.gone_at is not None and (code is not None or peer.gone_at < long_ago)


def _said(code: int | None) -> str:
    if code is None:
        return ""
    return f" (signal {-code})" if code < 0 else f" (exit code {code})"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `Interrupted`, once: what ends the ranks is not interrupted itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted("Stopped; all ranks are ended.", signal_number=number)

    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
