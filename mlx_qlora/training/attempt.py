"""One attempt at a run of several ranks: started, watched, stopped together, judged.

What happened is read from what each rank says over its connection and from the adapter on disk. Exit codes
are not believed: that of ``mlx.launch`` is 0 when a rank died.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_qlora.config import RunConfig
from mlx_qlora.errors import Interrupted, MlxQloraError
from mlx_qlora.lora.adapter import WEIGHTS
from mlx_qlora.storage import sha256_of
from mlx_qlora.training.distributed_events import event_of
from mlx_qlora.training.distributed_messages import Connection, Message
from mlx_qlora.training.events import Observer, RunFinished
from mlx_qlora.training.guard import StopRequest
from mlx_qlora.training.launcher import Launcher, Started

LOST_PEER = "RuntimeError: [ring]"
"""How a rank fails that did nothing wrong (mlx 0.32.4)."""

SETTLING_SECONDS = 1.0
"""What a process may take to end after its connection did."""


@dataclass(frozen=True)
class Patience:
    """How long a rank may be silent before the run is started again; seconds."""

    hello: float = 15.0
    """From its start until it connects."""
    joining: float = 15.0
    """From the first rank that joins the ring until all have."""
    heartbeat: float = 10.0
    """Between two signs of life; a stopped process gives none."""
    exchange: float = 15.0
    """All ranks waiting for each other, and no exchange done: the link is gone."""
    last_words: float = 1.0
    """For the other ranks to say how they ended, when one has."""


@dataclass
class Peer:
    """What is known of one rank."""

    connection: Connection | None = None
    seen_at: float = 0.0
    phase: str = "starting"
    exchanges: int = 0
    is_waiting: bool = False
    moved_at: float = 0.0
    """When it last began an exchange, left one, or ended."""
    ending: Message | None = None
    gone_at: float | None = None
    """When its connection was lost."""


@dataclass(frozen=True)
class Job:
    """What is trained, and who is told."""

    config: RunConfig
    adapter_path: Path
    force: bool = False
    observers: Sequence[Observer] = ()
    on_bytes: Callable[[int, int], None] | None = None
    on_note: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        """Tell a person."""
        if self.on_note is not None:
            self.on_note(text)


class Attempt:
    """All ranks, from their start to their common end."""

    def __init__(
        self, launcher: Launcher, job: Job, stop: StopRequest, patience: Patience, *, resume: bool
    ) -> None:
        self.launcher, self.job, self.stop, self.patience = launcher, job, stop, patience
        self.resume = resume
        self.peers = [Peer() for _ in range(launcher.size)]
        self._token = secrets.token_hex(16)
        self._finished: RunFinished | None = None
        self._selector = selectors.DefaultSelector()
        self._strangers: list[Connection] = []
        self._to_tell: list[Callable[[], None]] = []
        self._was_told_to_stop = False
        self._started_at = self._joining_since = self._looked_at = 0.0

    def run(self) -> RunFinished | str:
        """Start the ranks and stay until they are gone; text is why the attempt was given up.

        Raises:
            MlxQloraError: what a rank raised.
        """
        with (
            tempfile.TemporaryDirectory(prefix="mlx-qlora-") as folder,
            socket.create_server((self.launcher.control_address, 0)) as server,
        ):
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            control = f"{self.launcher.control_address}:{server.getsockname()[1]}"
            self._started_at = self._looked_at = time.monotonic()
            started = self.launcher.start(Path(folder), control, self._token)
            try:
                fault = self._watch(started, server)
                return self._judged(fault, started)
            finally:
                started.kill()
                for connection in [p.connection for p in self.peers if p.connection] + self._strangers:
                    connection.close()
                self._selector.close()

    def _watch(self, started: Started, server: socket.socket) -> str | None:
        """Until all have ended well (None), or something is wrong."""
        while True:
            self._read(server, seconds=0.2)
            self._pass_on_stop()
            wrong = self._wrong(started)
            if wrong is not None:
                self._hear_last_words(server)
                return self._cause(started) or wrong
            if all(peer.ending is not None for peer in self.peers):
                return None

    def _read(self, server: socket.socket, *, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is server:
                self._accept(server)
            else:
                self._receive(key.data)
        to_tell, self._to_tell = self._to_tell, []
        for tell in to_tell:  # here, where what an observer raises is not taken for a broken connection
            tell()
        now = time.monotonic()
        if now - self._looked_at > self.patience.heartbeat / 4:
            # This process was stopped itself: what the ranks said meanwhile is still to be read.
            for peer in self.peers:
                peer.seen_at = peer.moved_at = now
            self._started_at = now
            self._joining_since = now if self._joining_since else 0.0
        self._looked_at = now

    def _accept(self, server: socket.socket) -> None:
        try:
            stream, _ = server.accept()
        except OSError:
            return  # it went away again
        stream.settimeout(10)
        connection = Connection(stream)
        self._strangers.append(connection)
        self._selector.register(stream, selectors.EVENT_READ, connection)

    def _receive(self, connection: Connection) -> None:
        peer = next((p for p in self.peers if p.connection is connection), None)
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
        peer = self.peers[rank]
        if rank < 0 or peer.connection is not None:
            raise ValueError("a rank that is there already")
        local_rank, num_local, most_local = self.launcher.on_machine(rank)
        connection.send(
            {
                "config": self.job.config.model_dump(mode="json"),
                "adapter_path": str(self.job.adapter_path),
                "resume": self.resume,
                "force": self.job.force,
                "backend": self.launcher.backend,
                "local_rank": local_rank,
                "num_local": num_local,
                "most_local": most_local,
            }
        )
        self._strangers.remove(connection)
        peer.connection, peer.seen_at, peer.moved_at = connection, time.monotonic(), time.monotonic()
        return peer

    def _take(self, peer: Peer, message: Message) -> None:
        now = time.monotonic()
        peer.seen_at = now
        if "phase" in message:
            state = (message["phase"], message["exchanges"], message["is_waiting"])
            if state != (peer.phase, peer.exchanges, peer.is_waiting):
                peer.phase, peer.exchanges, peer.is_waiting = state
                peer.moved_at = now
            if peer.phase == "joining" and not self._joining_since:
                self._joining_since = now
        elif "event" in message:
            event = event_of(message)
            if isinstance(event, RunFinished):
                self._finished = event
            self._to_tell += [partial(observer, event) for observer in self.job.observers]
        elif "bytes" in message and self.job.on_bytes is not None:
            self._to_tell.append(partial(self.job.on_bytes, *message["bytes"]))
        elif "ending" in message:
            peer.ending, peer.moved_at = message, now

    def _pass_on_stop(self) -> None:
        if not self.stop or self._was_told_to_stop:
            return
        self._was_told_to_stop = True
        for peer in self.peers:
            if peer.connection is not None and not peer.gone_at:
                try:
                    peer.connection.send({"stop": self.stop.signal_number})
                except OSError:
                    peer.gone_at = time.monotonic()

    def _wrong(self, started: Started) -> str | None:
        """What is wrong with any rank now; an ending other than well is for `_judged`."""
        now, patience = time.monotonic(), self.patience
        if self.stop and not any(peer.phase == "training" for peer in self.peers):
            return "stopped before training began"
        codes = [None] * len(self.peers) if started.is_one_for_all else started.codes()
        for rank, (peer, code) in enumerate(zip(self.peers, codes, strict=True)):
            if peer.ending is not None:
                if peer.ending["ending"] in ("error", "fault"):
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
        absent = [rank for rank, peer in enumerate(self.peers) if peer.connection is None]
        if absent and now - self._started_at > patience.hello:
            return f"rank {_listed(absent)} did not start within {patience.hello:.0f} s"
        starting = [r for r, peer in enumerate(self.peers) if peer.phase == "starting"]
        late = starting or [r for r, peer in enumerate(self.peers) if peer.phase == "joining"]
        if late and self._joining_since and now - self._joining_since > patience.joining:
            return f"rank {_listed(late)} did not join the ring within {patience.joining:.0f} s"
        return None

    def _stuck(self, now: float) -> str | None:
        at_work = [peer for peer in self.peers if peer.ending is None]
        moved_at = max(peer.moved_at for peer in self.peers)
        if not all(peer.is_waiting for peer in at_work) or now - moved_at <= self.patience.exchange:
            return None
        return f"all ranks waited for each other for {self.patience.exchange:.0f} s: the link failed"

    def _hear_last_words(self, server: socket.socket) -> None:
        until = time.monotonic() + self.patience.last_words
        while time.monotonic() < until and not all(peer.ending or peer.gone_at for peer in self.peers):
            self._read(server, seconds=0.05)

    def _settled_codes(self, started: Started) -> list[int | None]:
        """Exit codes; a rank whose connection is gone gets a moment to have one."""
        if started.is_one_for_all:
            return [None] * len(self.peers)
        until = time.monotonic() + SETTLING_SECONDS
        while True:
            codes = list(started.codes())
            is_open = any(p.gone_at and code is None for p, code in zip(self.peers, codes, strict=True))
            if not is_open or time.monotonic() > until:
                return codes
            time.sleep(0.02)

    def _cause(self, started: Started) -> str | None:
        """The rank that failed by itself: those that lost it fail too, perhaps sooner."""
        codes = self._settled_codes(started)
        for rank, peer in enumerate(self.peers):
            ending = peer.ending or {}
            if ending.get("ending") == "fault" and not ending["what"].startswith(LOST_PEER):
                return f"rank {rank} failed: {ending['what']}"
        for rank, (peer, code) in enumerate(zip(self.peers, codes, strict=True)):
            if peer.ending is None and (peer.gone_at or code is not None):
                return f"rank {rank} ended without a word{_said(code)}"
        return None

    def _judged(self, wrong: str | None, started: Started) -> RunFinished | str:
        endings = [peer.ending for peer in self.peers]
        for rank, ending in enumerate(endings):
            if ending is not None and ending["ending"] == "error":
                raise _error(rank, ending)
        for ending in endings:
            if ending is not None and ending["ending"] == "interrupted":
                raise _interrupted(ending, self.job)
        if self.stop.signal_number is not None:
            raise _interrupted({"what": "Stopped.", "signal": self.stop.signal_number}, self.job)
        if wrong is None and all(ending is not None and ending["ending"] == "finished" for ending in endings):
            wrong = self._missing(endings[0] or {})
            if wrong is None and self._finished is not None:
                return self._finished
        return self._fault(wrong or "the ranks did not end together", started)

    def _missing(self, ending: Message) -> str | None:
        """What is not as rank 0 said; it runs on this machine."""
        path = self.job.adapter_path / WEIGHTS
        try:
            digest = sha256_of(path)
        except OSError:
            return f"rank 0 said that it finished, and there is no {path}"
        if self._finished is None or digest != ending.get("adapter_sha256"):
            return f"rank 0 said that it finished, and {path} is not the adapter it saved"
        return None

    def _fault(self, what: str, started: Started) -> str:
        rank = next((r for r, peer in enumerate(self.peers) if f"rank {r} " in what), 0)
        ending = self.peers[rank].ending or {}
        told = ending.get("trace") or started.last_lines(rank)
        quoted = "".join(f"\n    {line}" for line in told.splitlines())
        return what + quoted


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


def _error(rank: int, ending: Message) -> MlxQloraError:
    told = [f"rank {rank}"] if rank else []
    where = ", ".join([*told, *([ending["where"]] if ending["where"] else [])])
    error = MlxQloraError(str(ending["what"]), where=where or None, run=ending["run"])
    error.exit_code = int(ending["exit_code"])
    return error


def _interrupted(ending: Message, job: Job) -> Interrupted:
    run = f"mlx-qlora train --resume --adapter-path {job.adapter_path}"
    return Interrupted(str(ending["what"]), signal_number=int(ending["signal"]), run=ending.get("run") or run)
