"""A task in a process of its own: both ends of the pipe.

The worker reads its task as one line of JSON from standard input and writes lines of JSON to standard output:
what it has to say on its way, then a result or an error. When its standard input closes, its parent is gone,
and it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_qlora import errors
from mlx_qlora.errors import Interrupted, MlxQloraError, ModelError, listed
from mlx_qlora.storage import plain_json

_PACKAGE = Path(__file__).parents[2]
_LINES_OF_A_CRASH = 3

Said = Callable[[str, Any], None]
"""Called with what kind of thing is said, and the thing."""


def ask(
    module: str, task: dict[str, Any], log: Path, on_said: Said, *, where: str, waits_on_stop: bool = False
) -> dict[str, Any]:
    """The result of a worker, which is gone when this returns, or raises.

    Args:
        module: Its name; run as a program it calls `work`.
        task: Ready for JSON.
        log: File for what it writes to standard error.
        on_said: Told what it says before its result.
        where: The error's place when it dies without a word.
        waits_on_stop: On Ctrl-C let it save its work and end by itself; a second Ctrl-C ends it at once.

    Raises:
        MlxQloraError: what it raised, or how it died.
        KeyboardInterrupt: Ctrl-C.
    """
    path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        log.open("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        ) as process,
    ):
        try:
            found = _answer(process, task, on_said)
            if found is not None:
                return found
            code = process.wait()
        except KeyboardInterrupt:
            if waits_on_stop:
                # Not SIGINT: from a terminal it has had that already, and a second one stops it at once.
                process.send_signal(signal.SIGTERM)
                process.stdout.read() if process.stdout else None
            raise
        finally:
            process.kill()  # on Ctrl-C too; and should this process be killed, its end of the pipe closes
        raise ModelError(death(code, log.read_text(encoding="utf-8", errors="replace")), where=where)


def work(do: Callable[[dict[str, Any], Said], dict[str, Any]]) -> None:
    """Do the task on standard input, as the worker: `do` gets it, may say things, and returns the result."""
    # What libraries print must not stand between our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(kind: str, value: Any) -> None:
        out.write(json.dumps(plain_json({kind: value})) + "\n")
        out.flush()

    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tell("result", do(task, tell))
    except MlxQloraError as error:
        said = {"type": type(error).__name__, "what": error.what, "where": error.where, "run": error.run}
        tell("error", {**said, "exit_code": error.exit_code})


def death(code: int, log: str) -> str:
    """How a worker ended that said nothing."""
    if code == -signal.SIGKILL:
        return "The process was killed by the system, which most often means that memory ran out."
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = [line.strip() for line in log.splitlines() if line.strip()][-_LINES_OF_A_CRASH:]
    return f"The process ended with {how}:\n{listed(last)}"


def _answer(process: subprocess.Popen[str], task: dict[str, Any], on_said: Said) -> dict[str, Any] | None:
    """The result; None where the worker ended without one."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for line in process.stdout:
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise _error(said["error"])
        if "result" in said:
            result: dict[str, Any] = said["result"]
            return result
        for kind, value in said.items():
            on_said(kind, value)
    return None


def _error(said: dict[str, Any]) -> MlxQloraError:
    if said["type"] == Interrupted.__name__:
        return Interrupted(said["what"], signal_number=said["exit_code"] - 128, run=said["run"])
    kind = getattr(errors, said["type"], MlxQloraError)
    error: MlxQloraError = kind(said["what"], where=said["where"], run=said["run"])
    return error


def _end_with_parent() -> None:
    sys.stdin.read()  # until the parent closes it, or is killed
    os._exit(1)
