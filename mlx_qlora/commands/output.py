"""How commands speak: one JSON object on stdout, or text; everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from tqdm import tqdm

from mlx_qlora.storage import plain_json

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]


def print_json(value: dict[str, Any]) -> None:
    """One object; numbers that JSON does not know become null."""
    print(json.dumps(plain_json(value), ensure_ascii=False))


def say(text: str = "") -> None:
    """A line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def gigabytes(num_bytes: float) -> str:
    """Bytes as a person reads them, in powers of 1024: 812 MiB, 4.1 GiB."""
    mib = num_bytes / 1024**2
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


class ByteProgress:
    """Shows (done, total) bytes: a bar on a terminal; off it a plain line each few seconds, and the last."""

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, label: str) -> None:
        self.label = label
        self._bar: Any = None
        self._said_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            self._on_terminal(done, total)
        elif done >= total or time.monotonic() - self._said_at >= self.SECONDS_BETWEEN_LINES:
            self._said_at = time.monotonic()
            say(f"{self.label}: {gigabytes(done)} of {gigabytes(total)}")

    def _on_terminal(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=self.label)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()


def on_bytes(label: str) -> Callable[[int, int], None]:
    """A progress callback for long reads."""
    return ByteProgress(label)
