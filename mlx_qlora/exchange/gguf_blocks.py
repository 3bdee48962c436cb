"""Rows of numbers, or of MLX's codes and scales, as GGUF's blocks of 32: the import's formats, written.

Source: ggml-org/ggml, src/ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np

from mlx_qlora.weights.gguf_tensors import FLOATS, GROUP_SIZE, Type


@dataclass(frozen=True)
class Coded:
    """A GGUF format of codes: w = d · (q - offset), or d · q + m where there is no offset."""

    bits: int
    offset: int | None


CODED = {
    Type.Q4_0: Coded(4, 8),
    Type.Q4_1: Coded(4, None),
    Type.Q5_0: Coded(5, 16),
    Type.Q5_1: Coded(5, None),
    Type.Q8_0: Coded(8, 128),
}
"""Smallest first."""


def encode(values: np.ndarray, type_: Type) -> np.ndarray:
    """Float32 rows as stored rows, uint8 of (rows, row bytes); coded formats are quantized anew."""
    if type_ == Type.F32:
        return np.ascontiguousarray(values, "<f4").view(np.uint8)
    if type_ == Type.F16:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return gguf.quantize(np.ascontiguousarray(values, np.float32), type_).view(np.uint8)


def encode_codes(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, type_: Type) -> np.ndarray:
    """MLX's affine rows as stored rows, code by code; only the scales are rounded, to float16.

    Args:
        codes: (rows, width) uint8; scales and biases: (rows, groups) float32, groups of whole blocks.
    """
    coded = CODED[type_]
    rows, width = codes.shape
    repeat = width // GROUP_SIZE // scales.shape[1]
    d, m = (np.repeat(part, repeat, axis=1).reshape(-1, 1) for part in (scales, biases))
    q = codes.reshape(-1, GROUP_SIZE)
    parts = [_half(d)]
    if coded.offset is None:
        parts.append(_half(m))
    else:
        shift = _shift(d, m, coded.offset)
        q = (q + shift).astype(np.uint8)
    if coded.bits == 5:
        parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
    parts.append(_nibbles(q & 15) if coded.bits < 8 else q ^ 128)
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def encode_mxfp4(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """MLX's mxfp4 rows as stored rows; both are the same 4-bit floats under a power of two."""
    q = codes.reshape(-1, GROUP_SIZE)
    return np.concatenate([exponents.reshape(-1, 1), _nibbles(q)], axis=1).reshape(len(codes), -1)


def recoding_error(type_: Type, bits: int, scales: np.ndarray, biases: np.ndarray) -> float:
    """Summed over groups, the square of the most that keeping the codes in a format moves a weight.

    0 says that every number stays; infinity that there is no room for the codes or float16 for the scales.
    """
    coded = CODED[type_]
    s, b = scales.astype(np.float64), biases.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        d, m = (part.astype(np.float16).astype(np.float64) for part in (scales, biases))
        if coded.offset is None:
            has_room = np.full(s.shape, bits <= coded.bits)
            moved = np.abs(d - s) * (2**bits - 1) + np.abs(m - b)
        else:
            shift = _shift(s, b, coded.offset)
            has_room = (shift >= 0) & (shift + 2**bits <= 2**coded.bits)
            units = np.where(s == 0, 0, shift - coded.offset)
            moved = np.abs(d - s) * 2 ** (coded.bits - 1) + np.abs(b - units * s)
    return float(np.square(np.where(has_room & np.isfinite(moved), moved, np.inf)).sum())


def code_error(scales: np.ndarray) -> float:
    """Summed over groups, the mean square of what rounding to codes has changed already: scale² / 12."""
    return float(np.square(scales.astype(np.float64)).sum() / 12)


def can_hold_width(type_: Type, width: int) -> bool:
    """Whether rows of that width are whole blocks."""
    return type_ in FLOATS or width % gguf.GGML_QUANT_SIZES[type_][0] == 0


def _shift(scales: np.ndarray, biases: np.ndarray, offset: int) -> np.ndarray:
    """What is put to each code: offset + bias / scale, rounded; a group of one number, zero, has any."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.round(biases.astype(np.float64) / scales.astype(np.float64))
    usable = np.isfinite(ratio) & (np.abs(ratio) < 2**20)
    return np.where(usable, offset + np.where(usable, ratio, 0), 0).astype(np.int64)


def _half(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return scales.astype("<f2").view(np.uint8)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """(…, 32) → (…, 16): the first half low, the second high."""
    return q[:, :16] | q[:, 16:] << 4
