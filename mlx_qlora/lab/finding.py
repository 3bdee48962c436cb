"""What a topic of the lab finds: tables of measured values, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns."""

    title: str
    columns: tuple[str, ...]
    """With units."""
    rows: list[tuple[Any, ...]]
    formats: tuple[str, ...] = ()
    """How the columns' numbers are written, as in ``format``; where there is none, with four digits."""

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text."""
        formats = (*self.formats, *("",) * (len(self.columns) - len(self.formats)))
        return [tuple(map(_cell, row, formats)) for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """The rows by column, for JSON."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def column(self, name: str) -> list[Any]:
        """The values under one name."""
        return [row[self.columns.index(name)] for row in self.rows]


@dataclass(frozen=True)
class Finding:
    """One topic's outcome."""

    topic: str
    title: str
    tables: Sequence[Table]
    notes: Sequence[str]
    """Sentences whose figures come from the tables."""
    curves: dict[str, Any] = field(default_factory=dict)
    """What the figure draws and the tables leave out."""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; curves are left to the figure."""
        tables = [{"title": table.title, "rows": table.records()} for table in self.tables]
        return {"topic": self.topic, "title": self.title, "tables": tables, "notes": list(self.notes)}


def _cell(value: Any, template: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format(value, template or (",d" if isinstance(value, int) else ".4g"))
    return "–" if value is None else str(value)
