"""Requests to stop, and numbers that are no numbers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BAD_UPDATES_IN_A_ROW = 3
"""So many non-finite updates in a row send the run back to its last good checkpoint."""

MAX_ROLLBACKS = 5
"""After so many roll-backs the cause is not the learning rate."""


class StopRequest:
    """Set by Ctrl-C or SIGTERM; read by the trainer between two updates."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def ask(self, signal_number: int, _frame: FrameType | None = None) -> None:
        """Ask the run to save and stop; asked by Ctrl-C a second time, stop at once."""
        if self.signal_number is not None and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = signal_number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the context is open; the handlers before it come back after it.

    Outside of the main thread, where Python allows no handlers, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.ask) for number in caught}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
