"""GGUF files, written from the first byte to the last: header, then each tensor's blocks as they come.

Format: see `mlx_qlora.weights.gguf_file`, which reads it. Source: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ALIGNMENT = 32
_VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_KINDS = {"u": _UINT32, "i": _INT32, "f": _FLOAT32}
_DTYPES = {_UINT32: "<u4", _INT32: "<i4", _FLOAT32: "<f4"}


@dataclass(frozen=True)
class GgufEntry:
    """A tensor that will be written."""

    name: str
    type: Type
    shape: tuple[int, ...]
    """Row-major; GGUF itself names the fastest axis first."""

    @property
    def num_bytes(self) -> int:
        """Its size in the file, without padding."""
        return math.prod(self.shape[:-1]) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes


def encode_header(metadata: Mapping[str, Any], entries: Sequence[GgufEntry]) -> bytes:
    """Everything before the data, padded: texts, booleans, numbers, lists of texts, arrays of numbers.

    An integer becomes uint32, a float float32.
    """
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    parts += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for entry in entries:
        parts.append(_text(entry.name) + struct.pack("<I", len(entry.shape)))
        parts.append(struct.pack(f"<{len(entry.shape)}QIQ", *reversed(entry.shape), entry.type, offset))
        offset += padded(entry.num_bytes)
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


def write_data(file: BinaryIO, entry: GgufEntry, blocks: Iterator[bytes]) -> None:
    """One tensor, block by block, and its padding.

    Raises:
        ValueError: the blocks are not as many bytes as the header says.
    """
    written = 0
    for block in blocks:
        file.write(block)
        written += len(block)
    if written != entry.num_bytes:
        raise ValueError(f"{entry.name}: {written} bytes, and the header says {entry.num_bytes}")
    file.write(bytes(padded(written) - written))


def padded(num_bytes: int) -> int:
    """Up to the next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, np.ndarray):
        kind = _KINDS[value.dtype.kind]
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + value.astype(_DTYPES[kind]).tobytes()
    texts = b"".join(map(_text, value))
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + texts
