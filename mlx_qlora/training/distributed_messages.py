"""What ranks and their supervisor tell each other: JSON objects, one a line, over a TCP connection."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

CONTROL, TOKEN = "MLX_QLORA_CONTROL", "MLX_QLORA_TOKEN"
"""Environment of a rank: the supervisor's address as host:port, and what proves that it was sent by it."""

PARENT = "MLX_QLORA_PARENT"
"""Environment of a rank that a supervisor started itself: that process's id."""

MOST_BYTES = 1024**2
"""A line that is longer is not one of ours."""

Message = dict[str, Any]


class Connection:
    """Messages over a socket; several threads may send."""

    def __init__(self, stream: socket.socket) -> None:
        self.socket = stream
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send one message whole; OSError when the other side is gone."""
        line = json.dumps(message, default=str).encode() + b"\n"
        with self._lock:
            self.socket.sendall(line)

    def received(self) -> list[Message]:
        """What one read brings: none or several; waits as the socket does.

        Raises:
            EOFError: the other side closed the connection.
            ValueError: what came is not a message.
            OSError: the connection is lost.
        """
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MOST_BYTES:
            raise ValueError("a message without an end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a message that is no object")
        return messages

    def close(self) -> None:
        """Close it; the other side reads the end."""
        self.socket.close()
