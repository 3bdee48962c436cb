"""From files to conversations: one schema a file, every bad line reported at once."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.errors import DataError, listed

Message = dict[str, str]
MAX_LINE_BYTES = 10_000_000
_ROLES = ("system", "user", "assistant", "tool")


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


class BadRow(ValueError):
    """Why one row cannot be used."""


def read_records(path: Path, columns: Mapping[str, str]) -> tuple[list[Record], list[str]]:
    """The rows of a .jsonl, .json or .csv file, and for each that cannot be used ``file:line: why``.

    Args:
        columns: Canonical name → the file's own.

    Raises:
        DataError: the file cannot be read, or no row shows a known schema.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    schema: Schema | None = None
    records, bad = [], []
    try:
        for line, row in rows:
            where = f"{path.name}:{line}"
            try:
                if isinstance(row, BadRow):
                    raise row
                schema = schema or detect_schema(row, columns)
                records.append(schema.build(_canonical(row, schema, columns), where))
            except BadRow as problem:
                bad.append(f"{where}: {problem}")
    except OSError as error:
        raise DataError(f"Cannot read the data: {error.strerror}.", where=str(path)) from None
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
    """The first schema whose columns a row has.

    Raises:
        BadRow: it has those of none.
    """
    for schema in SCHEMAS:
        if all(columns.get(name, name) in row for name in schema.required):
            return schema
    wanted = "; ".join("/".join(schema.required) for schema in SCHEMAS)
    raise BadRow(f"it has the columns {', '.join(map(repr, list(row)[:8])) or 'none'}; a row needs {wanted}")


def _canonical(row: Mapping[str, Any], schema: Schema, columns: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name in schema.required:
        column = columns.get(name, name)
        if column not in row:
            raise BadRow(f"it has no {column!r}, as the rows before it have")
        values[name] = row[column]
    return values | {name: row.get(columns.get(name, name)) for name in schema.optional}


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                yield number, BadRow(f"it is longer than {MAX_LINE_BYTES // 10**6} MB")
            elif raw.strip(b" \t\r\n\xef\xbb\xbf"):
                yield number, _parsed(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)


def _parsed(raw: bytes) -> Any:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        return BadRow(f"it is not UTF-8 (byte {error.start + 1})")
    except BadRow as problem:
        return problem
    except ValueError as error:
        return BadRow(f"it is not JSON: {error}")
    except RecursionError:
        return BadRow("it is nested too deeply")
    return row if isinstance(row, dict) else BadRow(f"it is a JSON {type(row).__name__}, not an object")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(key for key, _ in pairs if sum(k == key for k, _ in pairs) > 1)
        raise BadRow(f"it has {repeated!r} twice")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The file is not UTF-8 (byte {error.start + 1}).", where=str(path)) from None
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            begun, line = line + 1, reader.line_num
            if None in row:
                yield begun, BadRow(f"it has more than {len(reader.fieldnames or [])} columns")
            else:
                yield begun, {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:
        yield reader.line_num, BadRow(f"it is not CSV: {error}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name!r} is empty")
    if "\x00" in value:
        raise BadRow(f"{name!r} has a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"{name!r} has half of a surrogate pair")
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
    while turns[-1][0] != "assistant":
        turns.pop()  # what follows the last answer is never predicted
    return Record(source, _conversation(*turns))


def _turn(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"turn {number} is no object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise BadRow(f"turn {number} has the role {role!r}; there are {', '.join(_ROLES)}")
    return role, _text(message.get("content"), f"content of turn {number}")


def _from_pair(question: str, answer: str) -> Callable[[Mapping[str, Any], str], Record]:
    def build(row: Mapping[str, Any], source: str) -> Record:
        turns = ("user", _text(row[question], question)), ("assistant", _text(row[answer], answer))
        return Record(source, _conversation(*turns))

    return build


def _from_instruction(row: Mapping[str, Any], source: str) -> Record:
    asked = _text(row["instruction"], "instruction")
    if row.get("input"):
        asked += "\n\n" + _text(row["input"], "input")
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
COLUMN_NAMES = tuple(dict.fromkeys(name for s in SCHEMAS for name in (*s.required, *s.optional)))


def _ends_with_answer(record: Record) -> bool:
    return len(record.messages) > 1 and record.messages[-1]["role"] == "assistant"
