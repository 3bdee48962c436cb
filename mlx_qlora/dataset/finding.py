"""One thing that was found in a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was found, where, and what can be done."""

    severity: Literal["problem", "warning", "note"]
    """A run refuses a problem; it starts in spite of a warning; a note is worth knowing."""
    code: str
    what: str
    split: str | None = None
    count: int | None = None
    """Rows it is about."""
    first: tuple[str, ...] = ()
    """Where the first few stand, ``file:line``, with what is wrong where that differs."""
    run: str | None = None
    """The command that mends it."""
