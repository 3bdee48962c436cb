"""A data set for a run: its rows as tokens, split by seed, checked, and reported on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.files import SPLITS, find_files
from mlx_qlora.dataset.records import COLUMN_NAMES, Example, Record, RecordFile
from mlx_qlora.dataset.render import (
    Unmaskable,
    ensure_prompt_template,
    example_of,
    has_chat_template,
    has_system_role,
    stop_tokens,
)
from mlx_qlora.dataset.report import DataReport, SplitReport
from mlx_qlora.dataset.row_table import prompt_of
from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.errors import ConfigError, DataError, listed

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Dataset:
    """A data set as tokens."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    report: DataReport


@dataclass(frozen=True)
class _Row:
    """One usable row, and what its split and its leaks are decided by."""

    example: Example
    prompt: bytes
    """Digest of all that is said before the first answer; of plain text, of everything."""
    is_truncated: bool


def load_dataset(
    config: DataConfig, tokenizer: Any, seed: int, on_progress: OnProgress | None = None
) -> Dataset:
    """Read, check, render and split the data of a run.

    Args:
        seed: Decides the split when the data has no validation file.
        on_progress: Called with (done, total) bytes while the files are read.

    Raises:
        ConfigError: no data is named, or data.columns renames what there is not.
        DataError: rows cannot be used (all are reported), a renamed column does not exist, or there is
            nothing to train on.
    """
    unknown = sorted(set(config.columns) - set(COLUMN_NAMES))
    if unknown:
        raise ConfigError(
            f"data.columns renames {', '.join(unknown)}; there are {', '.join(COLUMN_NAMES)}.",
            where="data.columns",
        )
    had_template = has_chat_template(tokenizer)
    ensure_prompt_template(tokenizer, config)
    reading = _Reading(config, tokenizer, on_progress, find_files(config.path))
    rows = reading.rows()
    notes = reading.notes(had_template=had_template)
    if "valid" not in rows and config.valid_fraction > 0:
        held = held_out([row.prompt for row in rows["train"]], config.valid_fraction, seed)
        rows["valid"] = [row for index, row in enumerate(rows["train"]) if index in held]
        rows["train"] = [row for index, row in enumerate(rows["train"]) if index not in held]
        notes.append(f"no validation file: {len(held)} rows were held out by seed {seed}")
    if not rows["train"]:
        raise DataError("There is no row to train on.", where=str(config.path))
    for name, split in rows.items():
        reading.reports[name].truncated = sum(row.is_truncated for row in split)
        reading.reports[name].count([row.example for row in split])
    examples = {name: [row.example for row in rows.get(name, [])] for name in SPLITS}
    return Dataset(**examples, report=DataReport(reading.reports, _leaks(rows), notes))


def held_out(prompts: Sequence[bytes], fraction: float, seed: int) -> set[int]:
    """Which rows to validate on: a share of them, where equal prompts stay on one side.

    At least one, and never all. It depends on the seed and on the prompts, not on their order.
    """
    groups: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    if len(groups) < 2 or fraction <= 0:
        return set()
    wanted = min(max(1, round(len(prompts) * fraction)), len(prompts) - 1)
    ranked = sorted(groups, key=lambda prompt: hashlib.sha256(prompt + f"/{seed}".encode()).digest())
    held: set[int] = set()
    for prompt in ranked:
        if len(held) + len(groups[prompt]) <= wanted:
            held.update(groups[prompt])
    return held or set(groups[min(ranked, key=lambda prompt: len(groups[prompt]))])


class _Reading:
    """One pass over the files of a data set: line by line, no raw text is kept."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, on_progress: OnProgress | None, files: dict[str, Path]
    ) -> None:
        self.config, self.tokenizer, self.on_progress, self.files = config, tokenizer, on_progress, files
        self.reports = {name: SplitReport() for name in SPLITS}
        self.stops = stop_tokens(tokenizer)
        self.has_system_role = has_system_role(tokenizer)
        self.has_system_turns = config.system_prompt is not None
        self.num_unmaskable = self.num_unstopped = 0
        self.unused = set(config.columns)
        self.column_names: dict[str, None] = {}

    def rows(self) -> dict[str, list[_Row]]:
        """The usable rows of each file.

        Raises:
            DataError: a row cannot be used and is not to be skipped; all such rows are told.
        """
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        rows, done = {}, 0
        for name, path in self.files.items():
            rows[name] = self._rows_of(name, path, done, sum(sizes.values()))
            done += sizes[name]
        if self.unused:
            own = ", ".join(f"{name}: {self.config.columns[name]}" for name in sorted(self.unused))
            there = ", ".join(map(repr, list(self.column_names)[:12])) or "none"
            raise DataError(
                f"data.columns names what no row has or needs ({own}). The columns are {there}.",
                where="data.columns",
            )
        self._refuse_bad_rows(any(rows.values()))
        return rows

    def notes(self, *, had_template: bool) -> list[str]:
        """What a person should know about how the rows were rendered."""
        notes = []
        if self.config.prompt_template is not None:
            instead = "in place of the model's own chat template" if had_template else "kept in the adapter"
            notes.append(f"prompts are written by data.prompt_template, {instead}")
        elif not had_template:
            notes.append("the model has no chat template: the default one is used, and kept in the adapter")
        if self.has_system_turns and not self.has_system_role:
            notes.append("the chat template has no system turn: it was put before the first user turn")
        if self.num_unstopped:
            notes.append(
                f"warning: {self.num_unstopped} answers do not end in a token at which generation stops; "
                "the chat template does not write one"
            )
        return notes

    def _rows_of(self, name: str, path: Path, done: int, total: int) -> list[_Row]:
        records, rows = RecordFile(path, self.config.columns), []
        for item in records:
            if isinstance(item, str):
                self.reports[name].bad.append(item)
            else:
                row = self._row(item, self.reports[name])
                rows += [row] if row is not None else []
            if self.on_progress is not None:
                self.on_progress(min(done + records.rows.bytes_read, total), total)
        self.unused &= records.unused_columns()
        self.column_names |= records.column_names
        return rows

    def _row(self, record: Record, report: SplitReport) -> _Row | None:
        config = self.config
        self.has_system_turns |= any(message["role"] == "system" for message in record.messages)
        try:
            rendered, example = example_of(self.tokenizer, record, config, self.stops)
        except BadRow as problem:
            self.num_unmaskable += isinstance(problem, Unmaskable)
            report.bad.append(f"{record.source}: {problem}")
            return None
        if example is None:
            report.dropped += 1
            return None
        if config.loss_on == "assistant" and self.stops:
            last = len(example.targets_mask) - 1 - int(example.targets_mask[::-1].argmax())
            self.num_unstopped += int(example.tokens[last]) not in self.stops
        return _Row(example, _prompt_key(record), len(rendered.tokens) > config.max_seq_length)

    def _refuse_bad_rows(self, has_rows: bool) -> None:
        bad = [line for report in self.reports.values() for line in report.bad]
        if self.num_unmaskable and not has_rows:
            raise DataError(
                f"The chat template cannot be masked, so answers cannot be told from questions "
                f"({self.num_unmaskable} rows):\n{listed(bad)}",
                where=str(self.config.path),
                run="the same command with --set data.loss_on=all   # trains on questions too",
            )
        if bad and not self.config.skip_bad_rows:
            raise DataError(
                f"{len(bad)} row(s) cannot be used:\n{listed(bad)}",
                where=str(self.config.path),
                run="mend them, or run the same command with --skip-bad-rows",
            )


def _prompt_key(record: Record) -> bytes:
    return hashlib.sha256(json.dumps(prompt_of(record)).encode()).digest()


def _leaks(rows: dict[str, list[_Row]]) -> list[str]:
    tokens = {row.example.tokens.tobytes() for row in rows["train"]}
    prompts = {row.prompt for row in rows["train"]}
    return [
        row.example.source
        for name in ("valid", "test")
        for row in rows.get(name, [])
        if row.prompt in prompts or row.example.tokens.tobytes() in tokens
    ]
