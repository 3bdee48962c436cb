"""GGUF headers, read and checked against the file before anything is believed.

Format: ``GGUF``, version, number of tensors, number of metadata entries; the metadata; for each tensor its
name, dimensions (fastest first), type and offset; then the data, aligned. Source: the GGUF description,
ggml-org/ggml, docs/gguf.md. ``gguf.GGUFReader`` believes what a damaged header claims: it is not used.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mlx_qlora.errors import ModelError, listed

_MAX_HEADER_BYTES = 256 * 1024**2
_MAX_STRINGS = 4_000_000
"""Over ten times the tokens and merges of the largest vocabularies."""

_MAX_NAME_BYTES = 65_535
_MAX_DEPTH = 4
_MAX_DIMENSIONS = 4
_SAMPLE_BYTES = 4096
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes: what one entry takes at the very least bounds how many a file can hold."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor's blocks are."""

    file: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Row-major: the last axis is the one that lies contiguous."""
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int

    @property
    def rows(self) -> int:
        """All axes but the last; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.num_bytes // self.rows

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) as they are stored: uint8 of (rows, row_bytes).

        Raises:
            ModelError: the file has become shorter since its header was read.
        """
        count = (last - first) * self.row_bytes
        raw = np.fromfile(self.file, np.uint8, count, offset=self.start + first * self.row_bytes)
        if raw.size != count:
            raise ModelError(f"The file ends inside of {self.name}.", where=str(self.file))
        return raw.reshape(last - first, self.row_bytes)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header holds together; no tensor is in memory."""

    path: Path
    metadata: dict[str, Any]
    """Texts, numbers, booleans; lists of texts; NumPy arrays of numbers."""
    tensors: dict[str, GgufTensor]
    data_start: int

    def fingerprint(self) -> str:
        """Digest of the header and of the first and last 4 KiB of each tensor."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            digest.update(file.read(self.data_start))
            for tensor in self.tensors.values():
                for offset in (0, max(0, tensor.num_bytes - _SAMPLE_BYTES)):
                    file.seek(tensor.start + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, tensor.num_bytes)))
        return f"sha256:{digest.hexdigest()}"


def read_gguf(path: Path) -> GgufFile:
    """Read a header; every count, length, type and offset is checked against the file's size first.

    Raises:
        ModelError: not GGUF, of a version or byte order that cannot be read, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            return _Header(file, path).read()
    except OSError as error:
        raise ModelError(f"Cannot read the GGUF file: {error.strerror or error}.", where=str(path)) from None
    except _BrokenHeaderError as error:
        raise ModelError(
            f"The GGUF file is broken: {error}", where=str(path), run="remove the file and fetch it again"
        ) from None


class _BrokenHeaderError(ValueError):
    """What is wrong, at which byte."""


class _Header:
    """A cursor over the header that never asks for more than the file can hold."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.end = min(self.size, _MAX_HEADER_BYTES)
        self.position = 0
        self.num_strings = 0

    def read(self) -> GgufFile:
        """The whole header."""
        magic = self.take(min(4, self.size), "the magic number")
        if magic != b"GGUF":
            raise _BrokenHeaderError(f"it begins with {magic!r}, not with b'GGUF'; this is no GGUF file")
        self._check_version(self.number("<u4", "the version"))
        num_tensors = self.count(8, _SMALLEST_TENSOR, "tensors")
        num_entries = self.count(8, _SMALLEST_ENTRY, "metadata entries")
        metadata = self._metadata(num_entries)
        infos = [self._tensor_info(index) for index in range(num_tensors)]
        alignment = self._alignment(metadata)
        data_start = -(-self.position // alignment) * alignment
        return GgufFile(self.path, metadata, self._tensors(infos, data_start, alignment), data_start)

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes, asked for only when they are there."""
        if count > self.end - self.position:
            over = "the file has" if self.end == self.size else "a header may have"
            raise _BrokenHeaderError(
                f"{what} at byte {self.position} takes {count} bytes, and {over} {self.end} in all; "
                "it is truncated or corrupt"
            )
        data = self.file.read(count)
        if len(data) != count:
            raise _BrokenHeaderError(f"{what} at byte {self.position} cannot be read; it is truncated")
        self.position += count
        return data

    def number(self, dtype: str, what: str) -> Any:
        """The next number of this NumPy type."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def count(self, width: int, smallest: int, what: str) -> int:
        """A number of things, each of which takes at least `smallest` bytes."""
        at, claimed = self.position, self.number(f"<u{width}", f"the number of {what}")
        if claimed * smallest > self.end - self.position:
            raise _BrokenHeaderError(
                f"it claims {claimed} {what} at byte {at}, more than its {self.size} bytes can hold"
            )
        return claimed

    def text(self, what: str, max_bytes: int | None = None, errors: str = "replace") -> str:
        """The next length and so many bytes, as UTF-8."""
        length = self.count(8, 1, f"bytes of {what}")
        if max_bytes is not None and length > max_bytes:
            raise _BrokenHeaderError(f"{what} at byte {self.position} has {length} bytes")
        self.num_strings += 1
        if self.num_strings > _MAX_STRINGS:
            raise _BrokenHeaderError(f"it has more than {_MAX_STRINGS} texts")
        at = self.position
        try:
            return self.take(length, what).decode(errors=errors)
        except UnicodeDecodeError:
            raise _BrokenHeaderError(f"{what} at byte {at} is no UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """The next metadata value of this type."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _BOOL:
            return self.take(1, what) != b"\0"
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(what, depth)
        raise _BrokenHeaderError(f"{what} at byte {self.position} is of the unknown type {kind}")

    def _array(self, what: str, depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            raise _BrokenHeaderError(f"{what} nests lists more than {_MAX_DEPTH} deep")
        kind = self.number("<u4", what)
        if kind in _SCALARS or kind == _BOOL:
            dtype = np.dtype(_SCALARS.get(kind, "?"))
            length = self.count(8, dtype.itemsize, f"elements of {what}")
            raw = self.take(length * dtype.itemsize, what)
            return np.frombuffer(raw, np.uint8) != 0 if kind == _BOOL else np.frombuffer(raw, dtype)
        length = self.count(8, 12 if kind == _ARRAY else 8, f"elements of {what}")
        return [self.value(kind, what, depth + 1) for _ in range(length)]

    def _check_version(self, version: int) -> None:
        if version & 0xFFFF == 0 and version:
            raise _BrokenHeaderError(
                "it is big-endian; make it anew on the machine that made it, little-endian"
            )
        if version not in (2, 3):
            raise _BrokenHeaderError(f"it is of version {version}; versions 2 and 3 can be read")

    def _metadata(self, num_entries: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.text("a metadata key", _MAX_NAME_BYTES, "strict")
            if key in metadata:
                raise _BrokenHeaderError(f"the key {_short(key)} occurs twice")
            metadata[key] = self.value(self.number("<u4", _short(key)), _short(key))
        return metadata

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        is_power = isinstance(alignment, int) and 0 < alignment <= 2**20 and alignment & (alignment - 1) == 0
        if not is_power or isinstance(alignment, bool):
            raise _BrokenHeaderError(f"general.alignment is {_short(str(alignment))}, not a power of two")
        return int(alignment)

    def _tensor_info(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        what = f"tensor {index}"
        name = self.text(f"the name of {what}", _MAX_NAME_BYTES, "strict")
        num_dimensions = self.number("<u4", f"the dimensions of {what}")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise _BrokenHeaderError(f"{_short(name)} has {num_dimensions} dimensions")
        raw = self.take(8 * num_dimensions + 12, _short(name))
        *shape, kind, offset = struct.unpack(f"<{num_dimensions}QIQ", raw)
        return name, tuple(reversed(shape)), kind, offset

    def _tensors(
        self, infos: Iterable[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        problems = []
        for name, shape, kind, offset in infos:
            try:
                tensor = self._tensor(name, shape, kind, data_start + offset)
                if offset % alignment:
                    raise ValueError(f"begins at {offset}, no multiple of {alignment}")
                if name in tensors:
                    raise ValueError("occurs twice")
                tensors[name] = tensor
            except ValueError as error:
                problems.append(f"{_short(name)}: {error}")
        problems += _overlaps(tensors.values())
        if problems:
            raise _BrokenHeaderError(f"{len(problems)} tensors do not fit the file\n{listed(problems)}")
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"of the unknown type {kind}; pip install -U gguf, if it is a new one") from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(
                f"a row of {shape[-1]} of shape {list(shape)} is no whole number of {type_.name}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        if start + num_bytes > self.size:
            raise ValueError(f"ends at byte {start + num_bytes} of a file of {self.size}; it is truncated")
        return GgufTensor(self.path, name, type_, shape, start, num_bytes)


def _overlaps(tensors: Iterable[GgufTensor]) -> list[str]:
    problems, end, before = [], 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end:
            problems.append(f"{_short(tensor.name)}: overlaps {_short(before)}")
        end, before = tensor.start + tensor.num_bytes, tensor.name
    return problems


def _short(text: str) -> str:
    """A name from an untrusted file, fit for a message."""
    printable = repr(text)[1:-1]
    return printable if len(printable) <= 80 else f"{printable[:77]}…"
