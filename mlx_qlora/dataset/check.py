"""Look through a data set before it is trained on: one pass, some forty bytes kept of each row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.encoding import encoder_of
from mlx_qlora.dataset.files import find_files
from mlx_qlora.dataset.language import LanguageCount
from mlx_qlora.dataset.records import COLUMN_NAMES, Record, RecordFile
from mlx_qlora.dataset.render import (
    Unlabelled,
    Unmaskable,
    ensure_prompt_template,
    example_of,
    has_chat_template,
    stop_tokens,
)
from mlx_qlora.dataset.row_table import RowTable, answers_of, contents_of
from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.dataset.text_signs import KNOWN_CONTROL, SIGNS
from mlx_qlora.errors import ConfigError, DataError

CHARACTERS_PER_TOKEN = {"en": 4.2}
"""Measured with Mistral's tokenizer on wwdc25 (English, 4.23)."""
CHARACTERS_PER_TOKEN_OTHERWISE = 3.2
"""The same on the contexts of FaQuAD (Portuguese, 3.24)."""
TINY_CHARACTERS = 3
"""Of an answer; some tasks are answered in one word, few in fewer letters."""
PERCENTILES = (50, 90, 95, 99)
_KINDS: dict[type, str] = {Unlabelled: "no_labels", Unmaskable: "unmaskable"}


@dataclass
class Seen:
    """Rows with something in common: how many, and where the first stand."""

    MAX_REASONS: ClassVar[int] = 50

    count: int = 0
    first: list[str] = field(default_factory=list)
    reasons: dict[str, list[Any]] = field(default_factory=dict)
    """Why, without its numbers → the first that was so, and how many."""

    def add(self, place: str) -> None:
        """Count one more: ``file:line``, or ``file:line: why``."""
        self.count += 1
        if len(self.first) < RowTable.SHOWN:
            self.first.append(place)
        reason = re.sub(r"\d+", "0", place.split(": ", 1)[-1])
        if reason in self.reasons:
            self.reasons[reason][1] += 1
        elif len(self.reasons) < self.MAX_REASONS:
            self.reasons[reason] = [place, 1]

    def shown(self) -> list[str]:
        """The first of each reason, and how many have it; the most frequent come first."""
        ordered = sorted(self.reasons.values(), key=lambda pair: -pair[1])
        return [
            f"{place}   ({count} so)" if count > 1 else place for place, count in ordered[: RowTable.SHOWN]
        ]


@dataclass
class SplitCheck:
    """What one file holds."""

    file: str
    schema: str | None = None
    """chat, completion, question, instruction or text; None when no row shows one."""
    columns: tuple[str, ...] = ()
    rows: int = 0
    """That can be used."""
    tokens: int | None = None
    """Within max_seq_length; None without a tokenizer."""
    target_tokens: int | None = None
    characters: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles p50 … p99 and the maximum, before anything is cut: tokens, or characters. So much of the
    rows, or more, is that long at most."""
    dropped: int = 0
    """Left out because they are too long (data.truncation=drop)."""
    cut_rows: int = 0
    """Longer than max_seq_length."""
    lost_tokens: int = 0
    """Beyond max_seq_length, those of rows that are left out included."""
    lost_targets: int = 0
    """Of these, tokens to be learned."""


class SplitReader:
    """One pass over a file; what is found stands in its attributes afterwards."""

    def __init__(self, name: str, path: Path, config: DataConfig, tokenizer: Any) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.stops = stop_tokens(tokenizer) if tokenizer is not None else []
        self.records = RecordFile(path, config.columns)
        self.check = SplitCheck(file=path.name)
        self.table = RowTable()
        self.seen: dict[str, Seen] = {}
        self.languages = LanguageCount()
        self.num_system_turns = 0
        self.unreadable: DataError | None = None

    def read(self) -> Iterator[int]:
        """Go through the rows; after each, the number of bytes read so far."""
        try:
            for item in self.records:
                if isinstance(item, str):
                    self._see("bad_rows", item)
                else:
                    self._look_at(item)
                yield self.records.rows.bytes_read
        except DataError as error:
            self.unreadable = error
        check, schema = self.check, self.records.schema
        check.schema = schema.name if schema is not None else None
        check.columns = tuple(self.records.column_names)
        check.rows = len(self.table)
        if check.rows:
            found = np.percentile(self.table.lengths, PERCENTILES, method="inverted_cdf")
            check.lengths = {f"p{share}": int(n) for share, n in zip(PERCENTILES, found, strict=True)}
            check.lengths["max"] = int(self.table.lengths.max())

    def count_of(self, kind: str) -> int:
        """How many rows were seen of a kind."""
        return self.seen[kind].count if kind in self.seen else 0

    def _see(self, kind: str, place: str) -> None:
        self.seen.setdefault(kind, Seen()).add(place)

    def _look_at(self, record: Record) -> None:
        contents, answers = contents_of(record), answers_of(record)
        num_characters = sum(map(len, contents))
        length, longest_answer = num_characters, max(map(len, answers), default=0)
        if self.tokenizer is not None:
            try:
                rendered, example = example_of(self.tokenizer, record, self.config, self.stops)
            except BadRow as problem:
                self._see(_KINDS.get(type(problem), "bad_rows"), f"{record.source}: {problem}")
                return
            length = len(rendered.tokens)
            longest_answer = _longest_run(rendered.targets)
            self._count_tokens(rendered, example)
        self.check.characters += num_characters
        line = int(record.source.rpartition(":")[2])
        self.table.add(record, line=line, length=length, longest_answer=longest_answer)
        self._look_at_texts(record, contents, answers)

    def _count_tokens(self, rendered: Any, example: Any) -> None:
        check = self.check
        kept = 0 if example is None else len(example.tokens)
        learned = 0 if example is None else int(example.targets_mask.sum())
        check.tokens = (check.tokens or 0) + kept
        check.target_tokens = (check.target_tokens or 0) + learned
        if len(rendered.tokens) > self.config.max_seq_length:
            check.cut_rows += 1
            check.dropped += example is None
            check.lost_tokens += len(rendered.tokens) - kept
            check.lost_targets += max(0, sum(rendered.targets[1:]) - learned)

    def _look_at_texts(self, record: Record, contents: list[str], answers: list[str]) -> None:
        self.languages.add(" ".join(text[:500] for text in contents[-4:]))
        self.num_system_turns += any(turn["role"] == "system" for turn in record.messages)
        if any(len(answer.strip()) < TINY_CHARACTERS for answer in answers):
            self._see("tiny_answers", record.source)
        if any(self._spells_control(text) for text in contents):
            kind = "control_tokens_in_text" if record.text is not None else "control_tokens_in_turns"
            self._see(kind, record.source)
        for kind, (_, has_it) in SIGNS.items():
            if any(has_it(text) for text in contents):
                self._see(kind, record.source)

    def _spells_control(self, text: str) -> bool:
        if self.tokenizer is not None:
            return encoder_of(self.tokenizer).spells_control(text)
        return KNOWN_CONTROL.search(text) is not None


@dataclass
class CheckedData:
    """All that was read: one reader for each split, and what they were read with."""

    config: DataConfig
    splits: dict[str, SplitReader]
    tokenizer: Any
    had_template: bool
    unused_columns: set[str]


def read_splits(
    config: DataConfig, tokenizer: Any = None, on_progress: Callable[[int, int], None] | None = None
) -> CheckedData:
    """Go through the files of a data set once.

    Args:
        tokenizer: Counts real tokens and renders rows as training does; None counts characters.
        on_progress: Called with (done, total) bytes.

    Raises:
        ConfigError: no data is named, data.columns renames what there is not, or the template is broken.
        DataError: there is no such data.
    """
    unknown = sorted(set(config.columns) - set(COLUMN_NAMES))
    if unknown:
        raise ConfigError(
            f"data.columns renames {', '.join(unknown)}; there are {', '.join(COLUMN_NAMES)}.",
            where="data.columns",
        )
    had_template = tokenizer is not None and has_chat_template(tokenizer)
    if tokenizer is not None:
        ensure_prompt_template(tokenizer, config)
    files = find_files(config.path)
    total, done = sum(path.stat().st_size for path in files.values()), 0
    readers: dict[str, SplitReader] = {}
    for name, path in files.items():
        readers[name] = SplitReader(name, path, config, tokenizer)
        shown = -1
        for at in readers[name].read():
            if on_progress is not None and at != shown:
                on_progress(min(done + at, total), total)
            shown = at
        done += path.stat().st_size
    unused = set(config.columns).intersection(*(r.records.unused_columns() for r in readers.values()))
    return CheckedData(config, readers, tokenizer, had_template, unused)


def _longest_run(targets: list[bool]) -> int:
    return max(_runs(targets), default=0)


def _runs(targets: list[bool]) -> Iterator[int]:
    run = 0
    for is_target in targets:
        if is_target:
            run += 1
        elif run:
            yield run
            run = 0
    yield run
