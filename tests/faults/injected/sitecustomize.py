"""Loaded by a Python process under test before anything else: makes its N-th file operation the fault.

Counted are the operations under ``FAULT_UNDER`` that change a disk: opening a file to write, writing out
what was buffered, fsync, rename, mkdir and delete. ``FAULT_AT`` says which one (counted from 1),
``FAULT_KIND`` what happens there: ``kill`` sends SIGKILL, a number is raised as that errno. Without them
nothing is changed but for the count, which is written to ``FAULT_COUNT`` when the process ends.
"""

from __future__ import annotations

import atexit
import builtins
import io
import os
import signal
from pathlib import Path
from typing import Any

UNDER = os.environ.get("FAULT_UNDER", "")
AT = int(os.environ.get("FAULT_AT", "0"))
KIND = os.environ.get("FAULT_KIND", "kill")

_count = 0
_names: dict[int, str] = {}


def _is_inside(path: Any) -> bool:
    try:
        return str(Path(os.fspath(path)).absolute()).startswith(UNDER)
    except TypeError:
        return False


def _operation() -> None:
    global _count
    _count += 1
    if _count != AT:
        return
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(int(KIND), os.strerror(int(KIND)))


def _counted(original: Any) -> Any:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_inside(path):
            _operation()
        return original(path, *args, **kwargs)

    return call


class _File(io.FileIO):
    """A raw file each of whose writes is an operation."""

    def write(self, data: Any) -> int:
        _operation()
        return super().write(data)


_io_open = io.open


def _open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if not any(c in mode for c in "wax+") or not isinstance(file, str | os.PathLike) or not _is_inside(file):
        return _io_open(file, mode, *args, **kwargs)
    _operation()
    raw = _File(file, mode.replace("b", "").replace("t", ""))
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    if "b" in mode:
        return buffered
    named = {key: value for key, value in kwargs.items() if key in ("encoding", "errors", "newline")}
    return io.TextIOWrapper(buffered, **named)


def _fsync(descriptor: Any) -> None:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    path = str(Path(f"/proc/self/fd/{number}").readlink()) if Path("/proc/self/fd").is_dir() else UNDER
    if _is_inside(path):
        _operation()
    _os_fsync(descriptor)


_os_fsync = os.fsync
if UNDER:
    io.open = builtins.open = _open  # type: ignore[assignment]
    os.fsync = _fsync
    for name in ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "truncate"):
        setattr(os, name, _counted(getattr(os, name)))
    if "FAULT_COUNT" in os.environ:
        atexit.register(lambda: Path(os.environ["FAULT_COUNT"]).write_text(str(_count)))
