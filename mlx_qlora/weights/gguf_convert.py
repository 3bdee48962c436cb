"""A GGUF tensor's rows, block by block, as the bytes of the tensors they become."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_file import GgufTensor
from mlx_qlora.weights.gguf_model import Target
from mlx_qlora.weights.gguf_tensors import AFFINE, FLOATS, GROUP_SIZE, dequantize, repack
from mlx_qlora.weights.stream import raw_bytes

BLOCK_BYTES = 16 * 1024**2
"""Rows are converted in blocks of about this many bytes of float32: what bounds memory."""


class BeyondHalfError(ValueError):
    """A scale or weight is too large for float16."""


def write_shard(file: BinaryIO, targets: Sequence[Target], on_read: Callable[[int], None]) -> None:
    """Fill one safetensors file, whose header is known before its data.

    Raises:
        BeyondHalfError: a tensor needs float32 scales.
        ModelError: as for `convert`.
    """
    outputs = [out for target in targets for out in target.outputs]
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for out in outputs:
        entry = {
            "dtype": out.dtype,
            "shape": list(out.shape),
            "data_offsets": [position, position + out.num_bytes],
        }
        header[out.name] = entry
        position += out.num_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    start, read = file.tell(), 0
    file.truncate(start + position)
    for target in targets:
        at = [start + header[out.name]["data_offsets"][0] for out in target.outputs]
        for data, num_bytes in convert(target):
            for index, part in enumerate(data):
                file.seek(at[index])
                file.write(part)
                at[index] += len(part)
            read += num_bytes
            on_read(read)
    file.seek(start + position)


def convert(target: Target) -> Iterator[tuple[list[bytes], int]]:
    """Block by block, the bytes of each of the target's outputs, and how many bytes were read for them.

    Raises:
        ModelError: the file holds numbers that are not finite, or has become shorter.
    """
    for part in target.parts:
        rows_together = (part.last - part.first) // target.num_heads if target.num_heads else 1
        if len(target.shape) == 1:
            rows_together = part.last - part.first
        for raw, num_bytes in blocks(part.tensor, part.first, part.last, rows_together):
            yield _converted(raw, target), num_bytes


def blocks(
    tensor: GgufTensor, first: int, last: int, rows_together: int = 1
) -> Iterator[tuple[np.ndarray, int]]:
    """Stored rows [first, last) in blocks of whole runs of `rows_together`, with the bytes read for each."""
    rows = max(1, BLOCK_BYTES // (4 * tensor.shape[-1] * max(rows_together, 1))) * max(rows_together, 1)
    for begin in range(first, last, rows):
        raw = tensor.read(begin, min(begin + rows, last))
        yield raw, raw.size


def _converted(raw: np.ndarray, target: Target) -> list[bytes]:
    if target.num_heads is not None and len(target.shape) > 1:
        raw = raw[_head_order(len(raw), math.prod(target.shape[:-1]) // target.num_heads)]
    if target.bits is None:
        return [_as_float(raw, target)]
    if target.type in AFFINE:
        packed = repack(raw, target.type, target.dtype)
        _check_finite(target, packed.scales, packed.biases)
        return [packed.weight.tobytes(), packed.scales.tobytes(), packed.biases.tobytes()]
    values = dequantize(raw, target.type)
    if target.dtype == "F16":
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
    _check_finite(target, values)
    parts = mx.quantize(mx.array(values), GROUP_SIZE, target.bits)
    return [raw_bytes(part) for part in parts]


def _as_float(raw: np.ndarray, target: Target) -> bytes:
    values = dequantize(raw, target.type)
    if not np.isfinite(values).all():
        raise _damaged(target)
    if target.num_heads is not None and len(target.shape) == 1:
        values = values.reshape(-1)[_head_order(values.size, values.size // target.num_heads)]
    elif target.type in FLOATS and FLOATS[target.type] == target.dtype and not target.added:
        return raw.tobytes()
    values = values + np.float32(target.added)
    if target.dtype == "F32":
        return values.astype("<f4").tobytes()
    if target.dtype == "F16":
        return values.astype("<f2").tobytes()
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()  # it was bfloat16 before


def _head_order(rows: int, rows_per_head: int) -> np.ndarray:
    """Rows of whole heads as the transformers layout has them; llama.cpp keeps rotary pairs side by side."""
    index = np.arange(rows).reshape(-1, rows_per_head // 2, 2)
    return index.swapaxes(1, 2).reshape(-1)


def _check_finite(target: Target, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise BeyondHalfError if target.dtype == "F16" and target.bits else _damaged(target)


def needs_wide_scales(target: Target) -> bool:
    """Whether float16 cannot hold the target's scales; reads all of it."""
    try:
        for _ in convert(target):
            pass
    except BeyondHalfError:
        return True
    return False


def _damaged(target: Target) -> ModelError:
    tensor = target.parts[0].tensor
    return ModelError(
        f"{tensor.name} holds numbers that are not finite; the file is damaged.",
        where=str(tensor.file),
        run="remove the file and fetch it again",
    )
