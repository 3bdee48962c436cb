"""metrics.jsonl: every event of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora.storage import plain_json, said_clearly, write_file

if TYPE_CHECKING:  # events bring MLX; `watch` reads this file without it
    from mlx_qlora.training.events import Event

METRICS = "metrics.jsonl"

Entry = dict[str, Any]

# Where an event stands in the run; for all others it is their "step".
_POSITION = {"RunStarted": "first_step", "RolledBack": "to_step"}


class MetricsLog:
    """An observer that appends each event to a file, one JSON object a line.

    A line is the event's fields with its name under ``event`` and an ISO 8601 ``time``; numbers that
    JSON does not know are null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, event: Event) -> None:
        """Append one line.

        Raises:
            StorageError: it could not be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"event": type(event).__name__, "time": now, **plain_json(asdict(event))}
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        # Opened for each line: the run may delete or replace the file, and a kill loses nothing.
        with said_clearly(self.path), self.path.open("ab") as file:
            file.write(line.encode())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later updates, the end of the run and torn lines, by one rename."""
        if not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_bytes().splitlines()
            if (entry := _entry(line)) and entry["event"] != "RunFinished" and _position(entry) <= step
        ]
        write_file(self.path, lambda file: file.write(b"".join(line + b"\n" for line in kept)))


def read_metrics(path: str | Path) -> list[Entry]:
    """The lines of a metrics.jsonl that count, oldest first, each update once.

    What a roll-back or a resumption undid is left out, and so are torn lines. No file is an empty list.
    """
    path, standing = Path(path), list[Entry]()
    for line in path.read_bytes().splitlines() if path.exists() else []:
        entry = _entry(line)
        if entry is None:
            continue
        if entry["event"] in _POSITION:
            standing = [e for e in standing if e["event"] in _POSITION or _position(e) <= _position(entry)]
        standing.append(entry)
    return standing


def _entry(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def _position(entry: Entry) -> int:
    return entry.get(_POSITION.get(entry["event"], "step"), 0)


def mean_loss(losses: Iterable[tuple[float | None, int]]) -> float:
    """Mean of (nats per target token, target tokens), weighted by tokens; NaN and None do not count."""
    finite = [(loss, tokens) for loss, tokens in losses if loss is not None and math.isfinite(loss)]
    total = sum(tokens for _, tokens in finite)
    return sum(loss * tokens for loss, tokens in finite) / total if total else math.nan


def events_named(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The entries of one kind of event, in order."""
    return [entry for entry in entries if entry["event"] == name]


def best_validation(entries: Sequence[Entry]) -> Entry | None:
    """The validation with the lowest loss, the earliest of equals; None when there is none with a number."""
    finite = [v for v in events_named(entries, "Validated") if v["loss_nats"] is not None]
    return min(finite, key=lambda v: v["loss_nats"], default=None)
