"""The process that measures one scheme, seen from the one that asks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_qlora import errors
from mlx_qlora.errors import MlxQloraError, ModelError, listed
from mlx_qlora.inference import comparison_worker
from mlx_qlora.inference.comparison_worker import Measured, Task

_PACKAGE = Path(__file__).parents[2]
_LINES_OF_A_CRASH = 3


def measured(task: Task, work: Path, on_phase: Callable[[str], None]) -> Measured:
    """What a worker of its own says of one scheme; it is gone when this returns, or raises.

    Args:
        work: Folder for what it complains of.

    Raises:
        MlxQloraError: it failed, or died.
    """
    log = work / "worker.log"
    path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        log.open("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            [sys.executable, "-m", comparison_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        ) as process,
    ):
        try:
            found = _answer(process, task, on_phase)
            if found is not None:
                return found
            code = process.wait()
        finally:
            process.kill()  # on Ctrl-C too; and should this process be killed, its end of the pipe closes
        raise ModelError(_death(code, log.read_text(encoding="utf-8", errors="replace")), where=task.folder)


def _answer(process: subprocess.Popen[str], task: Task, on_phase: Callable[[str], None]) -> Measured | None:
    """The result; None where the worker ended without one."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(json.dumps(asdict(task)) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for line in process.stdout:
        said: dict[str, Any] = json.loads(line)
        if "phase" in said:
            on_phase(said["phase"])
        elif "error" in said:
            error = said["error"]
            kind = getattr(errors, error["type"], MlxQloraError)
            raise kind(error["what"], where=error["where"], run=error["run"])
        elif "measured" in said:
            return Measured(**said["measured"])
    return None


def _death(code: int, log: str) -> str:
    """How a worker ended that said nothing."""
    if code == -signal.SIGKILL:
        return "The process was killed by the system, which most often means that memory ran out."
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = [line.strip() for line in log.splitlines() if line.strip()][-_LINES_OF_A_CRASH:]
    return f"The process ended with {how}:\n{listed(last)}"
