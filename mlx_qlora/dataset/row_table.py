"""What is remembered of each row of a large data set: numbers only, some forty bytes a row."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from dataclasses import dataclass

import numpy as np

from mlx_qlora.dataset.records import Record

_MARKS = re.compile("[\u0300-\u036f]")
_BETWEEN_WORDS = re.compile(r"(?:[^\w+\-*/=<>%$€£#]|_)+")


def normalised(text: str) -> str:
    """Text without case, accents, punctuation and spacing; signs that change a sum or a price stay.

    A text that is nothing else is left as it is.
    """
    plain = _MARKS.sub("", unicodedata.normalize("NFKD", text).casefold())
    return _BETWEEN_WORDS.sub(" ", plain).strip() or text.strip()


def prompt_of(record: Record) -> list[str]:
    """All that is said before the first answer, system turns apart; of plain text, everything."""
    said: list[str] = [record.text] if record.text is not None else []
    for message in record.messages:
        if message["role"] == "assistant":
            break
        if message["role"] != "system":
            said.append(message["content"].strip())
    return said


def contents_of(record: Record) -> list[str]:
    """What each turn says; of plain text, the text."""
    return [record.text] if record.text is not None else [turn["content"] for turn in record.messages]


def answers_of(record: Record) -> list[str]:
    """What each assistant turn says; of plain text, nothing."""
    return [turn["content"] for turn in record.messages if turn["role"] == "assistant"]


def digest(parts: list[str]) -> int:
    """64 bits of a list of texts: of ten million, two that differ look equal once in 370,000 times."""
    told = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Repeats:
    """Rows that say again what a row before them said."""

    count: int = 0
    first: tuple[tuple[int, int], ...] = ()
    """(line, line it repeats) of the first few."""


class RowTable:
    """Digests, lengths and lines of one split's rows, in arrays."""

    SHOWN = 5

    def __init__(self) -> None:
        self._lines = array("Q")
        self._rows, self._near, self._prompts = array("Q"), array("Q"), array("Q")
        self._lengths, self._longest_answers = array("I"), array("I")

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_bytes(self) -> int:
        """What the table holds."""
        columns = (
            self._lines, self._rows, self._near, self._prompts, self._lengths, self._longest_answers,
        )  # fmt: skip
        return sum(column.itemsize * len(column) for column in columns)

    def add(self, record: Record, *, line: int, length: int, longest_answer: int) -> None:
        """Remember a row.

        Args:
            length: Tokens, or characters, of all of it.
            longest_answer: The same, of its longest answer.
        """
        said = [f"{turn['role']}:{turn['content'].strip()}" for turn in record.messages] or contents_of(
            record
        )
        self._lines.append(line)
        self._rows.append(digest(said))
        self._near.append(digest([normalised(text) for text in said]))
        self._prompts.append(digest(prompt_of(record)))
        self._lengths.append(min(length, 2**32 - 1))
        self._longest_answers.append(min(longest_answer, 2**32 - 1))

    @property
    def lengths(self) -> np.ndarray:
        """uint32 [rows]."""
        return np.frombuffer(self._lengths, np.uint32)

    @property
    def longest_answers(self) -> np.ndarray:
        """uint32 [rows]."""
        return np.frombuffer(self._longest_answers, np.uint32)

    def duplicates(self) -> Repeats:
        """Rows that are equal to one before them."""
        return self._repeats(_first_of_each(self._rows), np.zeros(len(self), bool))

    def near_duplicates(self) -> Repeats:
        """Rows equal to one before them but for case, accents, punctuation and spacing."""
        exact = _is_repeat(_first_of_each(self._rows))
        return self._repeats(_first_of_each(self._near), exact)

    def other_answers(self) -> Repeats:
        """Rows that ask what one before them asks, and are answered in another way."""
        near = _is_repeat(_first_of_each(self._near))
        return self._repeats(_first_of_each(self._prompts), near)

    def rows_in(self, other: RowTable) -> tuple[int, ...]:
        """Lines of the rows that stand in `other` too, case, accents and punctuation apart."""
        return self._lines_where(_values(self._near), _values(other._near))

    def prompts_in(self, other: RowTable) -> tuple[int, ...]:
        """Lines of the rows whose prompt stands in `other`."""
        return self._lines_where(_values(self._prompts), _values(other._prompts))

    def lines_longer_than(self, length: int) -> tuple[int, ...]:
        """Lines of the rows with an answer longer than that."""
        return tuple(int(line) for line in _values(self._lines)[self.longest_answers > length])

    def _lines_where(self, own: np.ndarray, others: np.ndarray) -> tuple[int, ...]:
        return tuple(int(line) for line in _values(self._lines)[np.isin(own, others)])

    def _repeats(self, first: np.ndarray, known: np.ndarray) -> Repeats:
        found = np.flatnonzero(_is_repeat(first) & ~known)
        lines = _values(self._lines)
        pairs = tuple((int(lines[at]), int(lines[first[at]])) for at in found[: self.SHOWN])
        return Repeats(len(found), pairs)


def _values(column: array[int]) -> np.ndarray:
    return np.frombuffer(column, np.uint64)


def _first_of_each(column: array[int]) -> np.ndarray:
    """For each row, the first row with the same value."""
    if not len(column):
        return np.zeros(0, np.int64)
    _, first, group = np.unique(_values(column), return_index=True, return_inverse=True)
    return np.asarray(first[group])


def _is_repeat(first: np.ndarray) -> np.ndarray:
    return np.asarray(first != np.arange(len(first)))
