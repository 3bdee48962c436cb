"""A hard memory limit on a command: a Linux control group stands in for a small Mac. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
KILLED = -9
"""Exit code of a process that the kernel ended for want of memory."""


@contextmanager
def control_group(name: str, limit_bytes: int) -> Iterator[Path]:
    """A new group with this limit, gone again afterwards; yields the file that takes process numbers.

    Raises:
        SystemExit: this system has no control groups, or they cannot be made without root.
    """
    is_version_1 = (ROOT / "memory").is_dir()
    folder = (ROOT / "memory" if is_version_1 else ROOT) / f"{name}-{os.getpid()}"
    try:
        folder.mkdir()
        limit = folder / ("memory.limit_in_bytes" if is_version_1 else "memory.max")
        limit.write_text(str(limit_bytes), encoding="ascii")
    except OSError as error:
        raise SystemExit(f"No hard memory limit can be set here: {error}") from None
    try:
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def run_limited(
    command: Sequence[str], limit_bytes: int, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that may not take more memory, file cache included; `KILLED` is its code if it tries."""
    with control_group("mlx_qlora", limit_bytes) as processes:

        def enter() -> None:
            processes.write_text(str(os.getpid()), encoding="ascii")

        return subprocess.run(
            command, env=environment, preexec_fn=enter, capture_output=True, text=True, check=False
        )
