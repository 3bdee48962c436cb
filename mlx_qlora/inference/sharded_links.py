"""What answering on several ranks asks of a launcher and of a connection; `training` has both."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Protocol

Message = dict[str, Any]
"""What ranks and who watches them tell each other: one JSON object."""


class Link(Protocol):
    """A connection as its user sees it; see `training.distributed_messages.Connection`."""

    def send(self, message: Message) -> None:
        """Send one message whole; OSError when the other side is gone."""

    def received(self) -> list[Message]:
        """What one read brings: none or several."""


class Connection(Link, Protocol):
    """A `Link` over a socket."""

    socket: socket.socket

    def close(self) -> None:
        """Close it; the other side reads the end."""


class Started(Protocol):
    """Processes under way; see `training.launcher.Started`."""

    @property
    def is_one_for_all(self) -> bool:
        """Whether one process stands for all ranks."""

    def codes(self) -> list[int | None]:
        """The exit code of each process, None while it runs."""

    def kill(self) -> None:
        """End them all, and wait until they are gone."""

    def last_lines(self, rank: int) -> str:
        """The end of what a rank wrote to its terminal."""


class Launcher(Protocol):
    """How ranks are started; see `training.launcher.Launcher`."""

    backend: str

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def control_address(self) -> str:
        """Where every rank reaches this machine."""

    def start(self, folder: Path, control: str, token: str) -> Started:
        """Start every rank."""
