"""Weights and an update of them into a storage format, so that as much of the update is kept as fits.

Scales. MLX takes a group's scale from its largest and smallest weight alone. Here codes and scales are chosen
in turn: with the codes fixed, scale and bias are a least-squares fit; with these fixed (and rounded, as they
are stored), each weight takes the nearest code. Several beginnings are tried, MLX's own and, where given, the
grid that the weights lay on before; of each group the best try is kept.

Codes. Weights that lie on a grid already fall back to where they were when something small is added, and all
of an update can be lost so. But what a low-rank update does, it does along few directions: the columns of A.
The error along these is fed back into the target, again and again, until the codes that were nearest to the
next one anyway have moved and carry it. The error of a single weight grows a little by that; the update
stays.

Sources: Lloyd 1982, Least squares quantization in PCM: nearest codes and centroids in turn. Feeding the
error back is how sigma-delta modulation keeps a signal through a coarse quantizer: Inose et al. 1962.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.schemes import Scheme

Parts = dict[str, mx.array]
"""What is stored of some rows: weight and scales, with biases if affine; weight and absmax if NF4."""

NUM_ROUNDS = 8
"""Of codes and scales in turn; later ones change the error by less than a thousandth."""

NUM_FEEDBACKS = 32
"""Of the error along the update."""

ALONG_WEIGHT = 4.0
"""What an error along the update counts beside any other. At 1, one without a direction would count as much
along the update as in all other directions together; more keeps more of the update."""

CLIPS = (1.0, 0.94, 0.88, 0.8)
"""Shares of a group's range that the first grids span: few weights lie at its ends."""

_ABSMAX_SHARES = (1.0, 0.96, 0.92, 0.88)
_SCALE_STEPS = {"mxfp4": (-1, 0, 1), "mxfp8": (-1, 0, 1), "nvfp4": (-4, -3, -2, -1, 0, 1, 2)}
"""Neighbours of MLX's scale byte that are tried: powers of two, or eighths of them."""


def plainly_stored(rows: mx.array, scheme: Scheme, dtype: mx.Dtype) -> Parts:
    """What MLX, or bitsandbytes, stores of `rows`, (rows, width); of double quantization the first one only.

    Args:
        dtype: Of affine scales and biases.
    """
    if scheme.is_codebook:
        packed, absmax = nf4.quantize(rows, scheme.group_size)
        words = nf4.pack_words(packed, rows.shape[0])
        return {"weight": words, "absmax": absmax.reshape(rows.shape[0], -1)}
    typed = rows.astype(dtype) if scheme.mode == "affine" else rows
    parts = mx.quantize(typed, scheme.group_size, scheme.bits, mode=scheme.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def best_stored(
    rows: mx.array,
    scheme: Scheme,
    dtype: mx.Dtype,
    *,
    grid: Parts | None = None,
    basis: mx.array | None = None,
) -> Parts:
    """What is stored of `rows`, codes and scales chosen for them; of double quantization the first one only.

    Args:
        rows: (rows, width), float32.
        dtype: Of affine scales and biases.
        grid: Scales and biases to begin from too, of the same group size.
        basis: (width, rank), orthonormal: the directions along which an update is to be kept.
    """
    if scheme.is_codebook:
        absmax = _best_absmax(_grouped(rows, scheme.group_size))
        return {"weight": recoded(rows, absmax, scheme.group_size, basis), "absmax": absmax}
    plain = plainly_stored(rows, scheme, dtype)
    if scheme.mode != "affine":
        return _as_floats(rows, scheme, plain["scales"], basis)
    return _as_affine(rows, scheme, dtype, [plain, *([grid] if grid else [])], basis)


def restored(parts: Parts, scheme: Scheme, global_scale: mx.array | None = None) -> mx.array:
    """The rows that are stored so, float32, (rows, width).

    Args:
        parts: Of `best_stored` or `plainly_stored`; absmax as float32.
        global_scale: Of an nvfp4 weight that was stored with one.
    """
    if scheme.is_codebook:
        return nf4.unpack_words(parts["weight"], parts["absmax"], scheme.mode, mx.float32)
    scales, biases = parts["scales"], parts.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        parts["weight"],
        scales,
        biases,
        scheme.group_size,
        scheme.bits,
        scheme.mode,
        global_scale=global_scale,
        dtype=mx.float32,
    )


def recoded(rows: mx.array, absmax: mx.array, group_size: int, basis: mx.array | None = None) -> mx.array:
    """NF4 words of `rows` for scales that are given, (rows, width / 8) uint32.

    Args:
        absmax: (rows, width / group_size), float32.
        basis: As of `best_stored`.
    """
    table, scale = mx.array(np.array(nf4.NF4, np.float32)), absmax[..., None]

    def rounded(target: mx.array) -> mx.array:
        return table[_nf4_codes(_grouped(target, group_size), scale)] * scale

    codes = _nf4_codes(_grouped(_fed_back(rows, rounded, basis), group_size), scale)
    pairs = codes.astype(mx.uint8).reshape(-1, 2)
    return nf4.pack_words((pairs[:, 0] << 4) | pairs[:, 1], rows.shape[0])


def _fed_back(rows: mx.array, rounded: Callable[[mx.array], mx.array], basis: mx.array | None) -> mx.array:
    """What to round instead of `rows`, so that the error along `basis` is small.

    Args:
        rounded: Rows → what is stored of them, in groups.
    """
    if basis is None:
        return rows
    weight = ALONG_WEIGHT * rows.shape[1] / basis.shape[1]
    target, best, least = rows, rows, mx.full((rows.shape[0], 1), mx.inf)
    for _ in range(NUM_FEEDBACKS):
        error = rounded(target).reshape(rows.shape) - rows
        along = error @ basis
        cost = error.square().sum(axis=1, keepdims=True) + weight * along.square().sum(axis=1, keepdims=True)
        best, least = mx.where(cost < least, target, best), mx.minimum(cost, least)
        target = target - along @ basis.T
        mx.eval(target, best, least)
    return best


def _as_affine(
    rows: mx.array, scheme: Scheme, dtype: mx.Dtype, grids: list[Parts], basis: mx.array | None
) -> Parts:
    x, top = _grouped(rows, scheme.group_size), 2**scheme.bits - 1
    least, best_scale, best_bias = mx.full((*x.shape[:-1], 1), mx.inf), mx.zeros((1,)), mx.zeros((1,))
    for scale, bias in _first_grids(x, top, grids):
        for _ in range(NUM_ROUNDS):
            scale, bias = _as_type(scale, dtype), _as_type(bias, dtype)
            codes = _affine_codes(x, scale, bias, top)
            error = (x - (scale * codes + bias)).square().sum(axis=-1, keepdims=True)
            is_better = error < least
            best_scale, best_bias = (
                mx.where(is_better, scale, best_scale),
                mx.where(is_better, bias, best_bias),
            )
            least = mx.minimum(error, least)
            scale, bias = _fitted(x, codes, scale, dtype)
        mx.eval(least, best_scale, best_bias)

    def codes_of(target: mx.array) -> mx.array:
        return _affine_codes(_grouped(target, scheme.group_size), best_scale, best_bias, top)

    target = _fed_back(rows, lambda t: best_scale * codes_of(t) + best_bias, basis)
    return {
        "weight": pack(codes_of(target).reshape(rows.shape).astype(mx.uint32), scheme.bits),
        "scales": best_scale[..., 0].astype(dtype),
        "biases": best_bias[..., 0].astype(dtype),
    }


def _first_grids(x: mx.array, top: int, grids: list[Parts]) -> Iterator[tuple[mx.array, mx.array]]:
    for grid in grids:
        yield grid["scales"].astype(mx.float32)[..., None], grid["biases"].astype(mx.float32)[..., None]
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    for share in CLIPS:
        yield 2 * share * half / top, middle - share * half


def _affine_codes(x: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    """Nearest codes; all alike where the scale is 0."""
    step = mx.where(scale == 0, mx.array(1.0), scale)
    return mx.clip(mx.round((x - bias) / step), 0, top)


def _fitted(x: mx.array, codes: mx.array, scale: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and bias with the least squared error for these codes; the bias for the scale as it is stored."""
    mean_x, mean_code = x.mean(axis=-1, keepdims=True), codes.mean(axis=-1, keepdims=True)
    off = codes - mean_code
    spread = off.square().sum(axis=-1, keepdims=True)
    slope = ((x - mean_x) * off).sum(axis=-1, keepdims=True) / mx.maximum(spread, 1e-12)
    fitted = _as_type(mx.where(spread == 0, scale, slope), dtype)
    return fitted, mean_x - fitted * mean_code


def _as_type(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype).astype(mx.float32)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes, (rows, width) uint32, as MLX stores them: a stream of bits, the lowest first, 32 to a word."""
    groups = codes.reshape(*codes.shape[:-1], -1, 32)
    words = []
    for word in range(bits):
        first, last = word * 32 // bits, -(-(word + 1) * 32 // bits)
        total = mx.zeros(groups.shape[:-1], mx.uint32)
        for index in range(first, last):
            shift = index * bits - word * 32
            code = groups[..., index]
            total = total | (code << shift if shift >= 0 else code >> -shift)
        words.append(total)
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


def _as_floats(rows: mx.array, scheme: Scheme, scales: mx.array, basis: mx.array | None) -> Parts:
    table = _scale_table(scheme)
    least, best = mx.full(scales.shape, mx.inf), scales.astype(mx.int32)
    x = _grouped(rows, scheme.group_size)
    for step in _SCALE_STEPS[scheme.mode]:
        moved = mx.clip(scales.astype(mx.int32) + step, 0, table.size - 1)
        error = (x - _rounded_floats(x, table[moved][..., None], scheme.bits)).square().sum(axis=-1)
        best, least = mx.where(error < least, moved, best), mx.minimum(error, least)
        mx.eval(least, best)
    scale = table[best][..., None]

    def rounded(target: mx.array) -> mx.array:
        return _rounded_floats(_grouped(target, scheme.group_size), scale, scheme.bits)

    x = _grouped(_fed_back(rows, rounded, basis), scheme.group_size)
    sign = (x < 0).astype(mx.uint32) << (scheme.bits - 1)
    codes = _float_codes(x, scale, scheme.bits).astype(mx.uint32) | sign
    return {"weight": pack(codes.reshape(rows.shape), scheme.bits), "scales": best.astype(mx.uint8)}


def _rounded_floats(x: mx.array, scale: mx.array, bits: int) -> mx.array:
    return _magnitudes(bits)[_float_codes(x, scale, bits)] * mx.sign(x) * scale


def _float_codes(x: mx.array, scale: mx.array, bits: int) -> mx.array:
    table = np.array(_magnitudes(bits))
    scaled = mx.abs(x) / mx.where(scale == 0, mx.array(1.0), scale)
    return mx.searchsorted(mx.array((table[:-1] + table[1:]) / 2), scaled)


@cache
def _magnitudes(bits: int) -> mx.array:
    """What the codes without a sign stand for, ascending: e2m1 or e4m3, as MLX unpacks them."""
    mode, words = ("mxfp8", 127) if bits == 8 else ("mxfp4", 8)
    codes = mx.concatenate([mx.arange(words), mx.zeros(-words % 32, mx.int32)]).astype(mx.uint32)[None]
    one = mx.full((1, codes.size // 32), 127, mx.uint8)  # 2^0
    values = mx.dequantize(pack(codes, bits), one, group_size=32, bits=bits, mode=mode, dtype=mx.float32)
    return values[0, :words]


@cache
def _scale_table(scheme: Scheme) -> mx.array:
    """Byte → scale, finite and positive ones, ascending, as MLX unpacks them."""
    count = 127 if scheme.mode == "nvfp4" else 255
    ones = mx.full((count, 32), 2 if scheme.bits == 4 else 0x38, mx.uint32)  # the code of 1
    scales = mx.repeat(mx.arange(count).astype(mx.uint8)[:, None], 32 // scheme.group_size, axis=1)
    return restored({"weight": pack(ones, scheme.bits), "scales": scales}, scheme)[:, 0]


def _best_absmax(x: mx.array) -> mx.array:
    """The absmax of each NF4 block with the least squared error that was found, (rows, blocks)."""
    table = mx.array(np.array(nf4.NF4, np.float32))
    largest = mx.abs(x).max(axis=-1, keepdims=True)
    least, best = mx.full(largest.shape, mx.inf), largest
    for share in _ABSMAX_SHARES:
        absmax = share * largest
        for _ in range(NUM_ROUNDS // 2):
            values = table[_nf4_codes(x, absmax)]
            error = (x - absmax * values).square().sum(axis=-1, keepdims=True)
            best, least = mx.where(error < least, absmax, best), mx.minimum(error, least)
            size = values.square().sum(axis=-1, keepdims=True)
            fitted = (x * values).sum(axis=-1, keepdims=True) / mx.maximum(size, 1e-12)
            absmax = mx.where(fitted > 0, fitted, absmax)
        mx.eval(least, best)
    return best[..., 0]


def _nf4_codes(x: mx.array, absmax: mx.array) -> mx.array:
    table = np.array(nf4.NF4, np.float32)
    midpoints = mx.array((table[:-1] + table[1:]) / np.float32(2))
    return mx.searchsorted(midpoints, x / mx.where(absmax == 0, mx.array(1.0), absmax))


def _grouped(rows: mx.array, group_size: int) -> mx.array:
    return rows.astype(mx.float32).reshape(rows.shape[0], -1, group_size)
