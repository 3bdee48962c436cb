"""Safetensors headers, read and checked before anything else touches the file.

Format: 8 bytes of little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the
data. Source: the safetensors format description, huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import WeightsError, listed

# Of safetensors' types, those that MLX reads: not F64, F8_E5M2 and the newer ones.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
}
DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "BOOL": mx.bool_,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes are."""

    file: Path
    name: str
    dtype: str
    """As safetensors spells it: BF16, F32, …"""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in one safetensors file, checked against the file itself.

    Raises:
        WeightsError: the file is truncated or corrupt; every problem found is listed.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _raw_header(file, size)
    except OSError as error:
        raise WeightsError(f"Cannot read the weights: {error.strerror}.", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, [str(error)]) from None
    infos, problems = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            infos[name] = _tensor_info(path, name, entry, data_start, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: {error}")
    problems += _gaps_and_overlaps(infos.values(), data_start, size) if not problems else []
    if problems:
        raise _broken(path, problems)
    return infos


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder, single-file or sharded.

    Raises:
        WeightsError: shards are missing, broken, or do not agree with the index.
    """
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / INDEX
    listed_files = _index_files(index, folder) if index.is_file() else {}
    there = {file.name for file in files}
    missing = sorted({name for name in listed_files.values() if name not in there})
    if missing:
        raise WeightsError(
            f"The index names {len(missing)} file(s) that are not there:\n{listed(missing)}",
            where=str(index),
            run="mlx-qlora quantize MODEL …   # again, to go on with the download",
        )
    if not files:
        raise WeightsError("There are no safetensors weights here.", where=str(folder))
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                problems.append(f"{name}: in {tensors[name].file.name} and again in {file.name}")
            tensors[name] = info
    problems += [
        f"{name}: the index puts it in {file}, where it is not"
        for name, file in listed_files.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if problems:
        raise WeightsError(f"The weights are inconsistent:\n{listed(problems)}", where=str(folder))
    return tensors


def read_rows(info: TensorInfo, first: int, last: int) -> mx.array:
    """Rows [first, last) of a tensor, read from its file without keeping them in the page cache."""
    row_bytes = info.num_bytes // max(info.shape[0], 1)
    with info.file.open("rb", buffering=0) as file:
        offset, count = info.start + first * row_bytes, (last - first) * row_bytes
        data = os.pread(file.fileno(), count, offset)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)
    raw = np.frombuffer(data, np.dtype(f"u{DTYPE_BYTES[info.dtype]}"))
    return mx.array(raw).view(DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of one small file, in memory; nothing of it is left to be read later.

    Raises:
        WeightsError: as for `read_header`.
    """
    tensors = lazy_tensors(path)
    mx.eval(tensors)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header; none where it has no such part.

    Raises:
        WeightsError: the file is broken.
    """
    read_header(path)
    with path.open("rb") as file:
        header, _ = _raw_header(file, path.stat().st_size)
    found = header.get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def lazy_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of one file, each read when it is first evaluated.

    Raises:
        WeightsError: as for `read_header`; MLX must not meet a broken file.
    """
    read_header(path)
    return dict(mx.load(str(path)))  # type: ignore[arg-type]  # a safetensors file is a dict of arrays


def _raw_header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise ValueError(f"the file has {size} bytes; it is truncated")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"the header claims {length} bytes of a file of {size}; it is truncated or corrupt")
    try:
        # Python's JSON is laxer than MLX's: other encodings, NaN, half a surrogate pair, a name twice.
        header = json.loads(
            file.read(length).decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse
        )
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("the header is no JSON; the file is corrupt") from None
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object; the file is corrupt")
    metadata = {} if header.get("__metadata__") is None else header["__metadata__"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table of texts; the file is corrupt")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown type {dtype!r}; MLX reads {', '.join(DTYPE_BYTES)}")
    numbers = (*shape, begin, end)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError("a size or offset is no natural number")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(f"{end - begin} bytes, but {dtype} of {list(shape)} takes {expected}")
    if data_start + end > size:
        raise ValueError(f"it ends at byte {data_start + end} of a file of {size}; the file is truncated")
    return TensorInfo(path, name, dtype, shape, data_start + begin, expected)


def _gaps_and_overlaps(infos: Iterable[TensorInfo], data_start: int, size: int) -> list[str]:
    problems, position = [], data_start
    for info in sorted(infos, key=lambda info: (info.start, info.num_bytes)):
        if info.start != position:
            problems.append(f"{info.name}: begins at byte {info.start}, not at {position}")
        position = info.start + info.num_bytes
    if position != size and not problems:
        problems.append(f"{size - position} bytes after the last tensor")
    return problems


def _index_files(index: Path, folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"The index is broken: {error}", where=str(index)) from None
    outside = sorted({file for file in pairs.values() if Path(file).name != file or file in ("", "..")})
    if outside:
        raise WeightsError(
            f"The index points outside of {folder.name}/: {', '.join(outside[:5])}", where=str(index)
        )
    return pairs


def _broken(path: Path, problems: list[str]) -> WeightsError:
    return WeightsError(
        f"The weight file is broken:\n{listed(problems)}",
        where=str(path),
        run="remove the file and fetch it again",
    )
