"""From rows to conversations: one schema a file, every bad row told by file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import numpy as np

from mlx_qlora.dataset.rows import BadRow, RowFile
from mlx_qlora.errors import DataError, listed

Message = dict[str, str]
_ROLES = ("system", "user", "assistant", "tool")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Record:
    """One row: a conversation, or plain text."""

    source: str
    """Where it stands: file:line."""
    messages: tuple[Message, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Example:
    """One row as tokens; T tokens."""

    tokens: np.ndarray
    """int32 [T]."""
    targets_mask: np.ndarray
    """bool [T]: whether token t is predicted, from those before it. The first never is."""
    source: str
    """Where the row stands: file:line."""


@dataclass(frozen=True)
class Schema:
    """One way to write a row."""

    name: str
    required: tuple[str, ...]
    build: Callable[[Mapping[str, Any], str], Record]
    optional: tuple[str, ...] = ()


class RecordFile:
    """The records of a .jsonl, .csv or .json file, read as they are asked for.

    Args:
        columns: Canonical name → the file's own.
    """

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, self.columns = path, columns
        self.rows = RowFile(path)
        self.schema: Schema | None = None
        """Of the first row that shows one; all others must have it."""
        self.column_names: dict[str, None] = {}
        """Every column that was seen, in order."""
        self.row: Mapping[str, Any] = {}
        """As it stands in the file, of the record that was given last."""

    def __iter__(self) -> Iterator[Record | str]:
        """Each row's record, or ``file:line: why`` it cannot be used.

        Raises:
            DataError: the file cannot be read, or no row of it shows a known schema.
        """
        for line, row in self.rows:
            where = f"{self.path.name}:{line}"
            try:
                if isinstance(row, BadRow):
                    raise row
                self.column_names.update(dict.fromkeys(row))
                self.schema = self.schema or detect_schema(row, self.columns)
                self.row = row
                yield self.schema.build(_canonical(row, self.schema, self.columns), where)
            except BadRow as problem:
                yield f"{where}: {problem}"
        if self.schema is None and self.column_names:
            raise DataError(
                f"No row has columns to learn from. There are: {_names(self.column_names)}. "
                f"A row needs {_WANTED}.{_renamed(self.columns)}",
                where=str(self.path),
                run="mlx-qlora train … --set 'data.columns={question: THEIR NAME, answer: THEIR NAME}'",
            )

    def unused_columns(self) -> set[str]:
        """The canonical names whose column in `columns` no row had, or whose schema is another."""
        known = (*self.schema.required, *self.schema.optional) if self.schema else ()
        used = {name for name in known if self.columns.get(name) in self.column_names}
        return set(self.columns) - used


def read_records(path: Path, columns: Mapping[str, str]) -> tuple[list[Record], list[str]]:
    """The records of a file, and for each row that cannot be used ``file:line: why``.

    Raises:
        DataError: the file cannot be read, or no row of it shows a known schema.
    """
    records: list[Record] = []
    bad: list[str] = []
    for item in RecordFile(path, columns):
        if isinstance(item, Record):
            records.append(item)
        else:
            bad.append(item)
    return records, bad


def read_conversations(path: Path) -> list[list[Message]]:
    """The conversations in a file, for questions with known answers.

    Raises:
        DataError: a row cannot be used, or is no conversation that ends with an answer.
    """
    records, bad = read_records(path, {})
    bad += [f"{r.source}: no answer at its end" for r in records if not _ends_with_answer(r)]
    if bad or not records:
        raise DataError(f"{len(bad)} row(s) cannot be used:\n{listed(bad)}", where=str(path))
    return [list(record.messages) for record in records]


def detect_schema(row: Mapping[str, Any], columns: Mapping[str, str]) -> Schema:
    """The first schema whose columns a row has; those with a renamed column come first.

    Raises:
        BadRow: it has those of none.
    """
    for schema in sorted(SCHEMAS, key=lambda schema: not any(name in columns for name in schema.required)):
        if all(columns.get(name, name) in row for name in schema.required):
            return schema
    raise BadRow(f"it has the columns {_names(row)}; a row needs {_WANTED}")


def _canonical(row: Mapping[str, Any], schema: Schema, columns: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name in schema.required:
        column = columns.get(name, name)
        if column not in row:
            raise BadRow(f"it has no {_SHORT.repr(column)}, as the rows before it have")
        values[name] = row[column]
    return values | {name: row.get(columns.get(name, name)) for name in schema.optional}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name!r} is empty")
    if "\x00" in value:
        raise BadRow(f"{name!r} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name!r} has half of a surrogate pair") from None
    return value


def _conversation(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def _from_messages(row: Mapping[str, Any], source: str) -> Record:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRow("'messages' is no list of turns")
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    if not any(role == "assistant" for role, _ in turns):
        raise BadRow("it has no assistant turn to learn from")
    if turns[-1][0] != "assistant":
        raise BadRow(f"it ends with a turn of {turns[-1][0]!r}; the last must be the assistant's")
    return Record(source, _conversation(*turns))


def _turn(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"turn {number} is no object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise BadRow(f"turn {number} has the role {_SHORT.repr(role)}; there are {', '.join(_ROLES)}")
    return role, _text(message.get("content"), f"content of turn {number}")


def _from_pair(question: str, answer: str) -> Callable[[Mapping[str, Any], str], Record]:
    def build(row: Mapping[str, Any], source: str) -> Record:
        turns = ("user", _text(row[question], question)), ("assistant", _text(row[answer], answer))
        return Record(source, _conversation(*turns))

    return build


def _from_instruction(row: Mapping[str, Any], source: str) -> Record:
    asked = _text(row["instruction"], "instruction")
    given = row.get("input")
    if not (given is None or (isinstance(given, str) and not given.strip())):
        asked += "\n\n" + _text(given, "input")
    return Record(source, _conversation(("user", asked), ("assistant", _text(row["output"], "output"))))


def _from_text(row: Mapping[str, Any], source: str) -> Record:
    return Record(source, text=_text(row["text"], "text"))


SCHEMAS: Sequence[Schema] = (
    Schema("chat", ("messages",), _from_messages),
    Schema("completion", ("prompt", "completion"), _from_pair("prompt", "completion")),
    Schema("question", ("question", "answer"), _from_pair("question", "answer")),
    Schema("instruction", ("instruction", "output"), _from_instruction, optional=("input",)),
    Schema("text", ("text",), _from_text),
)
_WANTED = "; ".join("/".join(schema.required) for schema in SCHEMAS)
COLUMN_NAMES = tuple(dict.fromkeys(name for s in SCHEMAS for name in (*s.required, *s.optional)))


def _names(columns: Mapping[str, Any]) -> str:
    shown = ", ".join(_SHORT.repr(name) for name in list(columns)[:8])
    return shown + (", …" if len(columns) > 8 else "") or "none"


def _renamed(columns: Mapping[str, str]) -> str:
    renamed = ", ".join(f"{name} is {own!r}" for name, own in columns.items())
    return f" data.columns says that {renamed}." if renamed else ""


def _ends_with_answer(record: Record) -> bool:
    return len(record.messages) > 1 and record.messages[-1]["role"] == "assistant"
