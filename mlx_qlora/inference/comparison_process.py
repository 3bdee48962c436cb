"""The process that measures one scheme, seen from the one that asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_qlora.inference import comparison_worker
from mlx_qlora.inference.comparison_worker import Measured, Task
from mlx_qlora.inference.worker import ask


def measured(task: Task, work: Path, on_phase: Callable[[str], None]) -> Measured:
    """What a worker of its own says of one scheme; it is gone when this returns, or raises.

    Args:
        work: Folder for what it complains of.

    Raises:
        MlxQloraError: it failed, or died.
    """

    def hear(kind: str, value: Any) -> None:
        if kind == "phase":
            on_phase(value)

    log = work / "worker.log"
    return Measured(**ask(comparison_worker.__name__, asdict(task), log, hear, where=task.folder))
