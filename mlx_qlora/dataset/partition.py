"""Split rows into train, valid and test: each row's place is a function of its question and the seed."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mlx_qlora.dataset.files import find_files
from mlx_qlora.dataset.records import COLUMN_NAMES, Record, RecordFile
from mlx_qlora.dataset.row_table import contents_of, digest, normalised, prompt_of
from mlx_qlora.errors import ConfigError, DataError, StorageError, listed
from mlx_qlora.storage import make_folder, new_folder, said_clearly

SEEDS_TRIED = 500


@dataclass(frozen=True)
class Shares:
    """How much goes where; the rest is train."""

    valid: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.valid < 1 and 0 <= self.test < 1 and self.valid + self.test < 1):
            raise ConfigError(
                f"--valid {self.valid:g} and --test {self.test:g} leave nothing to train on.",
                run="mlx-qlora data split DATA OUT --valid 0.1 --test 0.1",
            )

    def place(self, group: int) -> str:
        """train, valid or test: the same for the same group, whatever else the data holds."""
        drawn = hashlib.blake2b(f"{self.seed}:{group}".encode(), digest_size=8).digest()
        share = int.from_bytes(drawn, "big") / 2**64
        return "valid" if share < self.valid else "test" if share < self.valid + self.test else "train"

    @property
    def names(self) -> list[str]:
        """The files that are wanted."""
        return ["train", *(["valid"] if self.valid else []), *(["test"] if self.test else [])]


@dataclass
class Partition:
    """What went where."""

    output: str
    seed: int
    rows: dict[str, int] = field(default_factory=dict)
    """Split → rows."""
    dropped_duplicates: int = 0
    bad: list[str] = field(default_factory=list)
    """``file:line: why`` of each row that was left out."""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def split_data(
    source: str,
    output: Path,
    shares: Shares,
    *,
    columns: Mapping[str, str] | None = None,
    drop_duplicates: bool = False,
    skip_bad_rows: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Partition:
    """Write train.jsonl, valid.jsonl and test.jsonl into a new folder, in one pass.

    Rows whose questions are the same but for case, accents and punctuation stay together. A row's place does
    not depend on the other rows, so the shares are met on average only.

    Args:
        source: Folder, file or hub data set; several files are taken together.
        output: A folder that is not there yet; it appears when all of it is written.
        columns: Our name → the data's own; columns are written under our names.
        drop_duplicates: Keep the first of rows that are the same but for case, accents and punctuation.
        on_progress: Called with (done, total) bytes.

    Raises:
        ConfigError: the shares leave nothing, or `columns` renames what there is not.
        DataError: rows cannot be used, or a split would be empty; nothing is written.
        StorageError: there is something at `output` already, or it cannot be written.
    """
    columns = dict(columns or {})
    unknown = sorted(set(columns) - set(COLUMN_NAMES))
    if unknown:
        raise ConfigError(f"--columns renames {', '.join(unknown)}; there are {', '.join(COLUMN_NAMES)}.")
    if output.exists():
        raise StorageError("There is something here already; nothing was touched.", where=str(output))
    files = find_files(source)
    result = Partition(str(output), shares.seed, dict.fromkeys(shares.names, 0))
    reading = _Reading(files, columns, result, drop_duplicates=drop_duplicates, on_progress=on_progress)
    with said_clearly(output):
        make_folder(output.absolute().parent)
    with new_folder(output) as partial:
        with ExitStack() as stack:
            opened = {name: stack.enter_context(_synced(partial / f"{name}.jsonl")) for name in shares.names}
            for group, row in reading:
                place = shares.place(group)
                opened[place].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                result.rows[place] += 1
        _refuse(result, reading.groups, shares, source, skip_bad_rows=skip_bad_rows)
    return result


class _Reading:
    """(group, row) of each usable row of all files."""

    def __init__(
        self,
        files: Mapping[str, Path],
        columns: dict[str, str],
        result: Partition,
        *,
        drop_duplicates: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.files, self.columns, self.result = files, columns, result
        self.drop_duplicates, self.on_progress = drop_duplicates, on_progress
        self.groups = array("Q")
        self._said: set[int] = set()
        if len(files) > 1:
            result.notes.append(f"{', '.join(path.name for path in files.values())} were taken together")

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        total, done, shown = sum(path.stat().st_size for path in self.files.values()), 0, -1
        for path in self.files.values():
            records = RecordFile(path, self.columns)
            for item in records:
                if isinstance(item, str):
                    self.result.bad.append(item)
                elif not self._is_duplicate(item):
                    group = digest([normalised(text) for text in prompt_of(item)])
                    self.groups.append(group)
                    yield group, self._renamed(records.row)
                at = min(done + records.rows.bytes_read, total)
                if self.on_progress is not None and at != shown:
                    self.on_progress(at, total)
                shown = at
            done += path.stat().st_size
        if self.result.dropped_duplicates:
            self.result.notes.append(f"{self.result.dropped_duplicates} duplicate row(s) were left out")

    def _is_duplicate(self, record: Record) -> bool:
        if not self.drop_duplicates:
            return False
        roles = [message["role"] for message in record.messages]
        said = digest([*roles, *(normalised(text) for text in contents_of(record))])
        if said in self._said:
            self.result.dropped_duplicates += 1
            return True
        self._said.add(said)
        return False

    def _renamed(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        ours = {own: name for name, own in self.columns.items()}
        return {ours.get(name, name): value for name, value in row.items()} if ours else row


class _synced:  # noqa: N801
    """A file opened for writing, on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, *_: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def _refuse(
    result: Partition, groups: array[int], shares: Shares, source: str, *, skip_bad_rows: bool
) -> None:
    if result.bad and not skip_bad_rows:
        raise DataError(
            f"{len(result.bad)} row(s) cannot be used, and nothing was written:\n{listed(result.bad)}",
            where=source,
            run="mend them, or run the same command with --skip-bad-rows",
        )
    if not groups:
        raise DataError("There is no row to split, and nothing was written.", where=source)
    empty = [name for name, count in result.rows.items() if not count]
    if empty:
        seed = _better_seed(groups, shares)
        told = f"{len(groups)} rows ask {len(set(groups))} different questions"
        asked = f"--valid {shares.valid:g} --test {shares.test:g} --seed {seed}"
        fewer = "--valid 0.3 --test 0   # or bring more rows"
        raise DataError(
            f"{' and '.join(empty)} would be empty ({told}), and nothing was written.",
            where=source,
            run=f"mlx-qlora data split {source} {result.output} {asked if seed is not None else fewer}",
        )


def _better_seed(groups: array[int], shares: Shares) -> int | None:
    """Of the first seeds, the one that comes nearest to the shares and leaves no split empty."""
    wanted = {"valid": shares.valid * len(groups), "test": shares.test * len(groups)}
    best: tuple[float, int] | None = None
    for seed in range(SEEDS_TRIED if len(groups) < 1000 else 10):
        tried = Shares(shares.valid, shares.test, seed)
        counts = Counter(tried.place(group) for group in groups)
        if all(counts[name] for name in shares.names):
            off = sum(abs(counts[name] - number) for name, number in wanted.items())
            best = min(best, (off, seed)) if best is not None else (off, seed)
    return best[1] if best is not None else None
