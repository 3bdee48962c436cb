"""Hidden states of frozen layers on disk: computed once for each example, checked before they are believed.

The file holds the training examples' positions one after the other, short examples first, in parts of some
megabytes. The manifest has a digest of each part, written after the part itself. Whenever the cache is
opened every part is read and compared; one that is not there, or not as it was, is computed (again). So a
cache that a killed process left, a torn write and a flipped bit are one and the same case.

It is read with plain reads, not mapped: mapped pages would be charged to the process (and pass its memory
budget), and a disk that fails would end it without a word.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_qlora.dataset.batches import PADDED, Batch, collated
from mlx_qlora.dataset.records import Example
from mlx_qlora.errors import Interrupted, StorageError
from mlx_qlora.storage import read_json, said_clearly, sweep, write_json
from mlx_qlora.training.checkpoint import sealed, unsealed
from mlx_qlora.training.guard import StopRequest

HIDDEN, MANIFEST, LOCK = "hidden.bin", "manifest.json", "lock"

PART_BYTES = 16 * 1024**2
"""A part ends with the example that reaches this: what a kill can lose."""
POSITIONS_AT_ONCE = 1024
"""Padded positions in one forward pass, one example at least. Fixed: no setting of a run changes a bit."""

OnBytes = Callable[[int, int], None]

_NUMPY_TYPES = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32}


@dataclass(frozen=True)
class _Part:
    """Consecutive examples of the file."""

    numbers: list[int]
    begin: int
    """Its first byte."""
    num_bytes: int


class PrefixCache:
    """Hidden states of numbered examples, in one folder.

    Args:
        folder: Of this cache alone.
        key: All that the hidden states depend on; a cache with another key is not believed.
        lengths: Positions of each example.
        width: Hidden size D.
        dtype: The type they are kept in: bfloat16, float16 or float32.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], lengths: Sequence[int], width: int, dtype: mx.Dtype
    ) -> None:
        self.folder, self.key, self.width, self.dtype = folder, dict(key), width, dtype
        self._lengths = list(lengths)
        self._numpy_type = np.dtype(_NUMPY_TYPES[dtype])
        self._row_bytes = width * self._numpy_type.itemsize
        order = sorted(range(len(lengths)), key=lambda number: (lengths[number], number))
        begins = [0, *accumulate(lengths[number] * self._row_bytes for number in order)]
        self._begins = dict(zip(order, begins[:-1], strict=True))
        self.num_bytes = begins[-1]
        self._parts = self._cut(order)
        self._digests, self.num_damaged = self._verified()

    @property
    def missing_bytes(self) -> int:
        """What is still to be computed."""
        return sum(self._parts[index].num_bytes for index in self._missing())

    def check_room(self) -> None:
        """Raise StorageError when the disk has no room for what is missing."""
        existing = next(path for path in [self.folder, *self.folder.parents] if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self.missing_bytes:
            raise StorageError(
                f"The hidden states of the frozen layers take {size_text(self.missing_bytes)} more, "
                f"and the disk has {size_text(free)}.",
                where=str(self.folder),
                run="mlx-qlora train … --set training.cache_frozen_prefix=false   # or make room: df -h",
            )

    def fill(
        self,
        compute: Callable[[mx.array], mx.array],
        examples: Sequence[Example],
        *,
        on_bytes: OnBytes | None = None,
        stop: StopRequest | None = None,
        run: str | None = None,
    ) -> None:
        """Compute and write what is missing. What is done stays done, however this ends.

        Args:
            compute: Tokens (B, T) → hidden states (B, T, D).
            examples: The numbered examples.
            on_bytes: Called with (done, total).
            stop: Looked at between two parts.
            run: The command that goes on, named when stopped.

        Raises:
            StorageError: the disk is full, read-only or gone.
            Interrupted: it was asked to stop.
        """
        if not self._missing():
            return
        stop = StopRequest() if stop is None else stop  # one that is not asked is false
        with said_clearly(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder / LOCK, lambda: self._stop_if_asked(stop, run)) as has_waited:
                sweep(self.folder)
                if has_waited:
                    self._digests, _ = self._verified()
                path = self.folder / HIDDEN
                path.touch()
                with path.open("r+b") as file:
                    for index in self._missing():
                        self._stop_if_asked(stop, run)
                        self._write(file, index, b"".join(self._computed(index, compute, examples)))
                        if on_bytes:
                            on_bytes(self.num_bytes - self.missing_bytes, self.num_bytes)

    def gathered(self, batch: Batch) -> mx.array:
        """The hidden states of a batch, (B, T, D), each example's where it stands.

        Raises:
            StorageError: the file cannot be read any more.
        """
        rows = np.zeros((*batch.inputs_BT.shape, self.width), self._numpy_type)
        try:
            with (self.folder / HIDDEN).open("rb", buffering=0) as file:
                for row, numbers in zip(rows, batch.examples, strict=True):
                    at = 0
                    for number in numbers:
                        part = row[at : (at := at + self._lengths[number])]
                        self._read(file, number, part)
                    # Padding is seen by nobody; real numbers, so that no norm divides zero by zero.
                    row[at:] = row[0]
        except OSError as error:
            raise StorageError(
                f"The hidden states of the frozen layers cannot be read: {error.strerror or error}.",
                where=str(self.folder),
                run="mlx-qlora train --resume --adapter-path …   # computes again what is missing",
            ) from error
        return mx.array(rows).view(self.dtype)

    def _cut(self, order: Sequence[int]) -> list[_Part]:
        parts: list[_Part] = []
        numbers: list[int] = []
        begin = 0
        for number in order:
            numbers.append(number)
            end = self._begins[number] + self._lengths[number] * self._row_bytes
            if end - begin >= PART_BYTES or number == order[-1]:
                parts.append(_Part(numbers, begin, end - begin))
                numbers, begin = [], end
        return parts

    def _missing(self) -> list[int]:
        return [index for index, digest in enumerate(self._digests) if digest is None]

    def _verified(self) -> tuple[list[str | None], int]:
        """The digest of each part that is as it was written, else None; and how many are no longer."""
        try:
            manifest = unsealed(read_json(self.folder / MANIFEST))
            said = manifest["parts"]
            if manifest["key"] != self.key or len(said) != len(self._parts):
                raise ValueError("of another cache")
            with (self.folder / HIDDEN).open("rb") as file:
                found = [
                    digest if digest is not None and _digest(file, part) == digest else None
                    for part, digest in zip(self._parts, said, strict=True)
                ]
        except FileNotFoundError:
            return [None] * len(self._parts), 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [None] * len(self._parts), len(self._parts)
        return found, sum(old is not None and new is None for old, new in zip(said, found, strict=True))

    def _write(self, file: BinaryIO, index: int, content: bytes) -> None:
        file.seek(self._parts[index].begin)
        file.write(content)
        file.flush()
        self._digests[index] = hashlib.sha256(content).hexdigest()
        write_json(self.folder / MANIFEST, sealed({"key": self.key, "parts": self._digests}))

    def _computed(
        self, index: int, compute: Callable[[mx.array], mx.array], examples: Sequence[Example]
    ) -> Iterator[bytes]:
        for numbers in _groups(self._parts[index].numbers, self._lengths):
            batch = collated([[examples[number]] for number in numbers], PADDED)
            hidden = compute(mx.array(batch.inputs_BT)).astype(self.dtype)
            rows = np.array(hidden.view(mx.uint16) if self.dtype == mx.bfloat16 else hidden)
            for row, number in zip(rows, numbers, strict=True):
                yield row[: self._lengths[number]].tobytes()

    def _read(self, file: BinaryIO, number: int, part: np.ndarray) -> None:
        file.seek(self._begins[number])
        content = file.read(part.nbytes)
        if len(content) != part.nbytes:
            raise OSError("the file was cut short")
        part[:] = np.frombuffer(content, self._numpy_type).reshape(part.shape)

    def _stop_if_asked(self, stop: StopRequest, run: str | None) -> None:
        if stop.signal_number is None:
            return
        done = size_text(self.num_bytes - self.missing_bytes)
        raise Interrupted(
            f"Stopped while the frozen layers were run: {done} of {size_text(self.num_bytes)} are kept.",
            signal_number=stop.signal_number,
            run=run,
        )


def size_text(num_bytes: int) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    mib = num_bytes / 1024**2
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def _groups(numbers: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Examples of rising length, as many at once as fit a forward pass."""
    group: list[int] = []
    for number in numbers:
        if group and (len(group) + 1) * lengths[number] > POSITIONS_AT_ONCE:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _digest(file: BinaryIO, part: _Part) -> str:
    file.seek(part.begin)
    return hashlib.sha256(file.read(part.num_bytes)).hexdigest()


@contextmanager
def _alone(path: Path, while_waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock at `path`, which the system takes back from a process that dies.

    Yields:
        Whether another process had it first.
    """
    has_waited = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                has_waited = True
                while_waiting()
                time.sleep(0.2)
        yield has_waited
