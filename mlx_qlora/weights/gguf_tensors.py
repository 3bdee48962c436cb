"""GGUF's block formats: to MLX's packed affine form without loss where they are affine, else to float32.

Seven formats are w = scale·q + bias over 32 neighbours, as MLX's ``affine`` with group 32 is; only the bits
are in another order, and every product fits float32's 24 bits. Source: ggml-org/ggml, src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

GROUP_SIZE = 32
FLOATS = {Type.F32: "F32", Type.F16: "F16", Type.BF16: "BF16"}
"""Kept byte for byte, by safetensors' names."""

Groups = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Codes (blocks, groups, 32) uint8; scales and biases (blocks, groups) float32."""


@dataclass(frozen=True)
class Affine:
    """A GGUF format that MLX can hold as it is."""

    bits: int
    scale_dtype: str
    """F16 holds a block's own float16 scale; the product of two needs F32."""
    decode: Callable[[np.ndarray], Groups]


@dataclass(frozen=True)
class Packed:
    """Rows in MLX's affine form, group size 32."""

    weight: np.ndarray
    """(rows, width · bits / 32) uint32"""
    scales: np.ndarray
    """(rows, width / 32) float32 or float16, and the biases likewise."""
    biases: np.ndarray


def can_dequantize(type_: Type) -> bool:
    """Whether the numbers of that format can be computed at all."""
    return type_ in FLOATS or type_ == Type.Q8_K or type_ in gguf.quants._type_traits


def dequantize(raw: np.ndarray, type_: Type) -> np.ndarray:
    """Stored rows, uint8 of (rows, row bytes), as float32 of (rows, width)."""
    with np.errstate(over="ignore", invalid="ignore"):  # damaged blocks give what their bits say
        if type_ == Type.Q8_K:
            return _q8_k(_blocks(raw, type_)).reshape(len(raw), -1)
        return gguf.dequantize(raw, type_).astype(np.float32, copy=False)


def repack(raw: np.ndarray, type_: Type, scale_dtype: str) -> Packed:
    """Stored rows, uint8 of (rows, row bytes), in MLX's form: the same numbers, bit for bit in float32.

    Args:
        scale_dtype: F16 or F32.
    """
    affine = AFFINE[type_]
    with np.errstate(over="ignore", invalid="ignore"):
        codes, scales, biases = affine.decode(_blocks(raw, type_))
        dtype = np.float16 if scale_dtype == "F16" else np.float32
        rows = len(raw)
        return Packed(
            pack(codes.reshape(rows, -1), affine.bits),
            scales.reshape(rows, -1).astype(dtype),
            biases.reshape(rows, -1).astype(dtype),
        )


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, width) as MLX packs them: one stream of bits, the first code in the lowest."""
    if bits == 4:
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
    elif bits == 5:
        eight = codes.reshape(len(codes), -1, 8).astype("<u8")
        word = np.bitwise_or.reduce(eight << np.arange(0, 40, 5, dtype=np.uint64), axis=-1)
        packed = word[..., None].view(np.uint8)[..., :5].reshape(len(codes), -1)
    else:
        packed = codes
    return np.ascontiguousarray(packed).view("<u4")


def _blocks(raw: np.ndarray, type_: Type) -> np.ndarray:
    return raw.reshape(-1, gguf.GGML_QUANT_SIZES[type_][1])


def _half(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """(…, 16) bytes → (…, 32): first all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> Groups:
    d = _half(b[:, :2])
    return _nibbles(b[:, None, 2:]), d, -8 * d


def _q4_1(b: np.ndarray) -> Groups:
    return _nibbles(b[:, None, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b: np.ndarray) -> Groups:
    d = _half(b[:, :2])
    return _nibbles(b[:, None, 6:]) | _fifth_bits(b[:, None, 2:6]), d, -16 * d


def _q5_1(b: np.ndarray) -> Groups:
    codes = _nibbles(b[:, None, 8:]) | _fifth_bits(b[:, None, 4:8])
    return codes, _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b: np.ndarray) -> Groups:
    d = _half(b[:, :2])
    return b[:, None, 2:] ^ 128, d, -128 * d


def _q8_k(b: np.ndarray) -> np.ndarray:
    """gguf-py has no reader for it. Its float32 scale times a code has more bits than float32 holds."""
    return np.ascontiguousarray(b[:, :4]).view("<f4") * b[:, 4:260].view(np.int8)


def _q4_k(b: np.ndarray) -> Groups:
    scales, biases = _k_scales(b)
    return _k_nibbles(b[:, 16:]), scales, biases


def _q5_k(b: np.ndarray) -> Groups:
    scales, biases = _k_scales(b)
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _k_nibbles(b[:, 48:]) | fifth << 4, scales, biases


def _k_nibbles(raw: np.ndarray) -> np.ndarray:
    """128 bytes → 8 groups of 32; a run of 32 bytes holds one group low and the next high."""
    runs = raw.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 8, 32)


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima in 12 bytes, times the block's two float16 factors."""
    low, middle, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=-1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=-1)
    return _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * minima)


AFFINE = {
    Type.Q4_0: Affine(4, "F16", _q4_0),
    Type.Q4_1: Affine(4, "F16", _q4_1),
    Type.Q5_0: Affine(5, "F16", _q5_0),
    Type.Q5_1: Affine(5, "F16", _q5_1),
    Type.Q8_0: Affine(8, "F16", _q8_0),
    Type.Q4_K: Affine(4, "F32", _q4_k),
    Type.Q5_K: Affine(5, "F32", _q5_k),
}
