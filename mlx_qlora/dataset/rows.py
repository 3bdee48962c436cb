"""From a file to its rows, line by line; a line that cannot be read is a row that says why."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_qlora.errors import DataError

MAX_LINE_BYTES = 10_000_000
SUFFIXES = (".jsonl", ".csv", ".json")
_BOM = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """Why one row cannot be used."""


class RowFile:
    """The rows of a .jsonl, .csv, .tsv or .json file: (line, row), where a bad row is a BadRow.

    Lines are counted from 1, blank ones too. A row of several lines is named by its first.
    A .json file holds one array of objects, or one object a line.

    Raises:
        DataError: while it is read: the file cannot be opened, or its header or array is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        try:
            if self.path.suffix.lower() in (".csv", ".tsv"):
                yield from self._csv_rows()
            elif self.path.suffix.lower() == ".json" and first_byte(self.path) == b"[":
                yield from self._array_rows()
            else:
                yield from self._json_rows()
        except OSError as error:
            raise DataError(f"Cannot read the data: {error.strerror}.", where=str(self.path)) from None

    def _json_rows(self) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        with self.path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                is_too_long = len(raw) > MAX_LINE_BYTES
                while is_too_long and raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                self.bytes_read = file.tell()
                if is_too_long:
                    yield number, BadRow(f"it is longer than {MAX_LINE_BYTES // 10**6} MB")
                    continue
                raw = raw.removeprefix(_BOM) if number == 1 else raw
                if raw.strip(b" \t\r\n"):
                    yield number, _parsed(raw)

    def _array_rows(self) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"The file is not UTF-8 (byte {error.start + 1}).", where=str(self.path)
            ) from None
        lenient, line, counted = json.JSONDecoder(), 1, 0
        position = _after_space(text, text.index("[") + 1)
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            try:
                _, end = lenient.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                yield line, BadRow(f"it is not JSON, and what follows cannot be told from it: {error}")
                return
            yield line, _checked(text[position:end])
            position = _after_space(text, end)
            if text[position : position + 1] == ",":
                position = _after_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise DataError(
                    "The JSON array is broken: a row is followed by no comma and no bracket.",
                    where=f"{self.path}:{line + text.count(chr(10), counted, position)}",
                )
        self.bytes_read = self.path.stat().st_size

    def _csv_rows(self) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        with (
            self.path.open("rb") as raw,
            # What is not UTF-8 comes out as half surrogates, which no UTF-8 text has: told apart by row.
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            first = file.readline(MAX_LINE_BYTES)
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if header is None:
                        raise DataError(f"The header is not CSV: {error}.", where=str(self.path)) from None
                    yield line, BadRow(f"it is not CSV: {error}")
                    continue
                self.bytes_read = raw.tell()
                if not cells:
                    continue
                if header is None:
                    header = self._checked_header(cells)
                else:
                    yield line, _csv_row(header, cells)

    def _checked_header(self, cells: list[str]) -> list[str]:
        header = [cell.strip() for cell in cells]
        if any(_is_not_utf8(cell) for cell in header):
            raise DataError(
                "The header is not UTF-8.",
                where=f"{self.path}:1",
                run=f"mlx-qlora data convert {self.path.name} OUT.jsonl --encoding cp1252",
            )
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"The header has {', '.join(map(repr, twice))} twice.", where=f"{self.path}:1")
        return header


def first_byte(path: Path) -> bytes:
    """The first byte of a file that is no space, its byte order mark aside."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()[:1]


def _after_space(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in " \t\r\n":
        position += 1
    return position


def _parsed(raw: bytes) -> Mapping[str, Any] | BadRow:
    try:
        return _checked(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"it is not UTF-8 (byte {error.start + 1})")


def _checked(text: str) -> Mapping[str, Any] | BadRow:
    try:
        row = json.loads(text, object_pairs_hook=_without_repeats)
    except BadRow as problem:
        return problem
    except RecursionError:
        return BadRow("it is nested too deeply")
    except ValueError as error:
        return BadRow(f"it is not JSON: {error}")
    return row if isinstance(row, dict) else BadRow(f"it is a JSON {type(row).__name__}, not an object")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRow(f"it has the key {repeated[:40]!r} twice")
    return row


def _csv_row(header: list[str], cells: list[str]) -> Mapping[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"it has {len(cells)} columns; the header has {len(header)}")
    if any(_is_not_utf8(cell) for cell in cells):
        return BadRow("it is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _is_not_utf8(cell: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in cell)
