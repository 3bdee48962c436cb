"""From the files people have to chat rows, one JSON object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from mlx_qlora.dataset.convert_forms import (
    COLUMN_NAMES,
    FORMS,
    Columns,
    Converter,
    form_of,
    rows_of_squad,
)
from mlx_qlora.dataset.convert_text import (
    chunks,
    is_questions_and_answers,
    questions_and_answers,
    text_before_questions,
)
from mlx_qlora.dataset.rows import BadRow, RowFile, first_byte
from mlx_qlora.errors import ConfigError, DataError, StorageError, listed
from mlx_qlora.storage import make_folder, said_clearly, write_file

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".md")
FORM_NAMES = (*FORMS, "qa-text")
_TEXT = (".txt", ".md", ".markdown")
_BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_NUMBERED = tuple[int, Mapping[str, Any] | BadRow]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How to convert."""

    form: str | None = None
    """One of FORM_NAMES; None finds out."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name → the data's own, of question, answer, context, …"""
    with_context: bool = False
    """Put the context before the question; without it, it is left out."""
    encoding: str = "utf-8"
    chunk_characters: int = 2000
    """Of plain text, at most in one row."""
    skip_bad_rows: bool = False


@dataclass
class Converted:
    """What became of a file."""

    source: str
    output: str
    form: str = ""
    found: str = ""
    """The form in words, and what the columns are."""
    rows: int = 0
    bad: list[str] = field(default_factory=list)
    """``file:line: why`` of each row that was left out."""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def convert_file(
    source: Path,
    output: Path,
    conversion: Conversion | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write the rows of a file as chat rows.

    Args:
        output: A .jsonl file that is not there yet; it appears when it is whole.
        on_progress: Called with (done, total) bytes.

    Raises:
        ConfigError: an option names what there is not.
        DataError: the file cannot be read or shows no form, or rows cannot be converted; all are told.
        StorageError: there is something at `output` already, or it cannot be written.
    """
    conversion = conversion or Conversion()
    _check_paths(source, output, conversion)
    result = Converted(str(source), str(output))

    def write(file: BinaryIO) -> None:
        with _as_utf8(source, conversion.encoding, result) as path:
            for row in _converted(path, conversion, result, on_progress):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                result.rows += 1
        _refuse_bad_rows(result, conversion)

    with said_clearly(output):
        make_folder(output.parent)
    write_file(output, write)
    return result


def _check_paths(source: Path, output: Path, conversion: Conversion) -> None:
    if conversion.form is not None and conversion.form not in FORM_NAMES:
        raise ConfigError(f"--from {conversion.form} is unknown; there are {', '.join(FORM_NAMES)}.")
    unknown = sorted(set(conversion.columns) - set(COLUMN_NAMES))
    if unknown:
        names = ", ".join(COLUMN_NAMES)
        raise ConfigError(f"--columns renames {', '.join(unknown)}; there are {names}.")
    try:
        codecs.lookup(conversion.encoding)
    except LookupError:
        raise ConfigError(
            f"There is no encoding {conversion.encoding!r}.", run="… --encoding cp1252"
        ) from None
    if not source.is_file():
        raise DataError("There is no such file.", where=str(source))
    if source.suffix.lower() not in SUFFIXES:
        raise DataError(f"A file to convert ends in {', '.join(SUFFIXES)}.", where=str(source))
    if output.suffix.lower() != ".jsonl":
        raise DataError("The new file must end in .jsonl.", where=str(output))
    if output.exists():
        raise StorageError(
            "There is something here already; nothing was touched.",
            where=str(output),
            run=f"mlx-qlora data convert {source} OTHER.jsonl",
        )


@contextmanager
def _as_utf8(source: Path, encoding: str, result: Converted) -> Iterator[Path]:
    """The file, or a copy of it in UTF-8 while the context lasts."""
    with source.open("rb") as file:
        begin = file.read(2)
    if begin in _BOMS and codecs.lookup(encoding).name == "utf-8":
        encoding = _BOMS[begin]
        result.notes.append(f"the file is in {encoding.upper()}")
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        yield source
        return
    with TemporaryDirectory(prefix="mlx-qlora-") as folder:
        copy = Path(folder) / source.name
        try:
            with (
                source.open(encoding=encoding, newline="") as old,
                copy.open("w", encoding="utf-8", newline="") as new,
            ):
                while text := old.read(2**20):
                    new.write(text)
        except UnicodeError as error:
            raise DataError(f"The file is not in {encoding}: {error}.", where=str(source)) from None
        yield copy


def _converted(
    path: Path, conversion: Conversion, result: Converted, on_progress: Callable[[int, int], None] | None
) -> Iterator[dict[str, Any]]:
    columns = Columns(conversion.columns)
    converter = Converter(columns, conversion.with_context)
    total, shown = max(1, path.stat().st_size), -1
    for line, row, at in _rows(path, conversion, columns, result):
        try:
            if isinstance(row, BadRow):
                raise row
            yield from FORMS[_builder(result.form)][1](converter, row)
        except BadRow as problem:
            result.bad.append(f"{path.name}:{line}: {problem}")
        if on_progress is not None and at != shown:
            on_progress(min(at, total), total)
        shown = at
    renamed = ", ".join(f"{name} is {own!r}" for name, own in columns.used.items() if name != own)
    result.found = f"{_named(result.form)}" + (f"; {renamed}" if renamed else "")
    if converter.left_off:
        result.notes.append(
            f"{converter.left_off} conversation(s) went on after the last answer; that was left off"
        )
    if converter.contexts_left_out:
        result.notes.append(
            f"the context of {converter.contexts_left_out} row(s) was left out; --context puts it before the "
            "question"
        )


def _builder(form: str) -> str:
    return "table" if form == "qa-text" else form


def _named(form: str) -> str:
    names = {"qa-text": "questions and answers in text", "": "nothing"}
    return names.get(form) or FORMS[form][0]


def _rows(
    path: Path, conversion: Conversion, columns: Columns, result: Converted
) -> Iterator[tuple[int, Mapping[str, Any] | BadRow, int]]:
    """(line, row, bytes read); the form is known once the first is asked for."""
    is_text = path.suffix.lower() in _TEXT or conversion.form == "qa-text"
    if is_text:
        yield from _rows_of_text(path, conversion, result)
        return
    nested = _nested_squad(path) if path.suffix.lower() == ".json" else None
    if nested is not None:
        result.form = conversion.form or "squad"
        size = path.stat().st_size
        yield from ((number, row, size) for number, row in enumerate(rows_of_squad(nested), start=1))
        return
    waiting: list[_NUMBERED] = []
    file = RowFile(path)
    result.form = conversion.form or ""
    for line, row in file:
        if not result.form and not isinstance(row, BadRow):
            result.form = form_of(row, columns) or ""
        if result.form:
            yield from ((*early, file.bytes_read) for early in waiting)
            waiting = []
            yield line, row, file.bytes_read
        else:
            waiting.append((line, row))
    if waiting:
        raise _unknown_form(path, waiting)


def _rows_of_text(
    path: Path, conversion: Conversion, result: Converted
) -> Iterator[tuple[int, Mapping[str, Any] | BadRow, int]]:
    size = path.stat().st_size
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The file is not UTF-8 (byte {error.start + 1}).",
            where=str(path),
            run="the same command with --encoding cp1252   # as Windows writes it",
        ) from None
    result.form = conversion.form or ("qa-text" if is_questions_and_answers(text) else "text")
    if result.form == "qa-text":
        if left_out := text_before_questions(text):
            result.notes.append(f"{left_out} line(s) before the first question were left out")
        yield from ((line, row, size) for line, row in questions_and_answers(text))
    elif result.form == "text":
        for line, piece in chunks(text, conversion.chunk_characters):
            yield line, {"text": piece}, size
    else:
        raise ConfigError(f"A text file is qa-text or text, not {result.form}.", where=str(path))


def _nested_squad(path: Path) -> Any:
    """The whole of a .json file that is one SQuAD object; None when it is something else."""
    if first_byte(path) != b"{":
        return None
    try:
        tree = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("data"), list) else None


def _unknown_form(path: Path, rows: list[_NUMBERED]) -> DataError:
    shown = next((row for _, row in rows if not isinstance(row, BadRow)), None)
    if shown is None:
        told = [f"{path.name}:{line}: {row}" for line, row in rows]
        return DataError(
            f"No line of it can be read:\n{listed(told)}",
            where=str(path),
            run=f"mlx-qlora data convert {path.name} OUT.jsonl --encoding cp1252   # if from Windows",
        )
    there = ", ".join(repr(str(name)[:60]) for name in list(shown)[:12])
    return DataError(
        f"Its rows show no form that is known here. The columns are {there}.",
        where=str(path),
        run=f"mlx-qlora data convert {path.name} OUT.jsonl --columns question=THEIRS,answer=THEIRS",
    )


def _refuse_bad_rows(result: Converted, conversion: Conversion) -> None:
    where = result.source
    if result.bad and not conversion.skip_bad_rows:
        is_encoding = any("not UTF-8" in line for line in result.bad[:20])
        advice = "; if it comes from Windows, with --encoding cp1252" if is_encoding else ""
        raise DataError(
            f"{len(result.bad)} row(s) cannot be converted, and nothing was written. Found: {result.found}.\n"
            f"{listed(result.bad)}",
            where=where,
            run="mend them, or run the same command with --skip-bad-rows" + advice,
        )
    if not result.rows:
        raise DataError("There is no row to convert, and nothing was written.", where=where)
