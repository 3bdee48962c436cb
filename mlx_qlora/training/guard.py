"""Requests to stop, and numbers that are no numbers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mlx_qlora.errors import DivergenceError, MemoryBudgetError
from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.presets import GIB

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


def out_of_memory(sample: MemorySample, budget_bytes: int, step: int, folder: Path) -> MemoryBudgetError:
    """What is raised where nothing is left to make smaller, after the run was saved."""
    return MemoryBudgetError(
        f"The run needs {sample.needed_bytes / GIB:.2f} GiB and may use {budget_bytes / GIB:.2f}; "
        f"its micro-batches are as small as they get. It is saved after step {step}.",
        where=str(folder),
        run=f"mlx-qlora train --resume --adapter-path {folder} --set training.memory_budget_gib=…  "
        "# or begin again with training.gradient_checkpointing=true or a shorter data.max_seq_length",
    )


def diverged(step: int, rollbacks: int, folder: Path) -> DivergenceError:
    """What is raised when halving the rate did not help."""
    return DivergenceError(
        f"Loss or gradients were not finite again and again, at last around step {step}, "
        f"although the learning rate was halved {rollbacks} times.",
        where=str(folder / "metrics.jsonl"),
        run="mlx-qlora train … --set training.learning_rate=1e-5   # into a new --adapter-path",
    )


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
