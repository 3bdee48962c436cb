"""NF4 with and without double quantization, bit for bit as bitsandbytes stores it.

A weight is cut into blocks of 32 or 64 consecutive values. Each block keeps its largest magnitude, `absmax`,
and of each value the nearest of sixteen codes that divide a normal distribution evenly. Two codes make a
byte, the first in its high half. Double quantization stores the absmax values in 8 bits: less their mean
(`offset`), in blocks of 256 with a largest magnitude each (`nested_absmax`), by a map of 256 values.

Sources: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E; the 8-bit map: Dettmers et al.
2022, arXiv:2110.02861. Values and roundings are those of bitsandbytes 0.50, the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qlora.quantization.nf4_metal import has_kernel, unpack_on_metal
from mlx_qlora.quantization.schemes import NESTED_BLOCK

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = (
    0.0,
    1 / 192,
    2 / 3,
    1.0,
    1 / 3,
    0.5,
    1 / 6,
    0.25,
    -0.0,
    -1 / 192,
    -2 / 3,
    -1.0,
    -1 / 3,
    -0.5,
    -1 / 6,
    -0.25,
)
"""bitsandbytes' other 4-bit codes, sign in the highest bit; read, never written."""

CODES = {"nf4": NF4, "fp4": FP4}
MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq")
"""Of a layer that stores sixteen codes; ``-dq`` is double quantization."""

_SMALLEST = 1e-38
_LANES = 8
_GRID = 65535


class DoubleQuantized(NamedTuple):
    """The absmax values of one weight, in 8 bits."""

    codes: mx.array
    """(blocks,) uint8."""
    nested_absmax: mx.array
    """(⌈blocks / 256⌉,) float32."""
    offset: mx.array
    """() float32, the mean."""


def is_double(mode: str) -> bool:
    """Whether absmax values are quantized too."""
    return mode.endswith("-dq")


def quantize(weight: mx.array, group_size: int) -> tuple[mx.array, mx.array]:
    """The NF4 codes of any array, and the largest magnitude of each block.

    Blocks run over the elements in row-major order; the last one may be shorter.

    Returns:
        (⌈elements / 2⌉,) uint8, two codes a byte; (⌈elements / group_size⌉,) float32.
    """
    flat = weight.reshape(-1).astype(mx.float32)
    whole = flat.size - flat.size % group_size
    blocks, rest = flat[:whole].reshape(-1, group_size), flat[whole:]
    absmax = mx.abs(blocks).max(axis=1) if whole else mx.zeros((0,))
    scaled = (blocks * (1 / mx.maximum(absmax, _SMALLEST))[:, None]).reshape(-1)
    if rest.size:  # where bitsandbytes divides, and keeps the lower limit
        last = mx.maximum(mx.abs(rest).max(keepdims=True), _SMALLEST)
        absmax, scaled = mx.concatenate([absmax, last]), mx.concatenate([scaled, rest / last])
    if scaled.size % 2:
        scaled = mx.concatenate([scaled, mx.zeros((1,))])
    codes = mx.searchsorted(_midpoints(), mx.clip(scaled, -1, 1)).astype(mx.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


def dequantize(packed: mx.array, absmax: mx.array, shape: tuple[int, ...], codes: str = "nf4") -> mx.array:
    """The values of packed codes, float32.

    Args:
        packed: Two codes a byte, uint8, any shape.
        absmax: (blocks,) float32; their number says how long a block is.
        shape: Of the result.
        codes: nf4 or fp4.
    """
    count = int(np.prod(shape))
    values = pair_table(codes)[packed.reshape(-1)].reshape(-1)[:count]
    group_size = _group_size(count, absmax.size)
    whole = count - count % group_size
    scaled = (values[:whole].reshape(-1, group_size) * absmax[: whole // group_size, None]).reshape(-1)
    if whole < count:
        scaled = mx.concatenate([scaled, values[whole:] * absmax[-1]])
    return scaled.reshape(shape)


def quantize_absmax(absmax: mx.array) -> DoubleQuantized:
    """The second quantization, of the absmax values of one weight."""
    absmax = absmax.reshape(-1)
    offset = _mean(absmax)
    padding = -absmax.size % NESTED_BLOCK
    blocks = mx.concatenate([absmax - offset, mx.zeros((padding,))]).reshape(-1, NESTED_BLOCK)
    nested_absmax = mx.abs(blocks).max(axis=1)
    scaled = mx.clip(blocks * (1 / nested_absmax)[:, None], -1, 1)
    # bitsandbytes looks a code up on a grid of 65536 values; 0 · ∞, of a block of zeros, is the first.
    place = mx.where(mx.isnan(scaled), mx.array(0.0), (scaled + 1) * 0.5 * _GRID + 0.5)
    codes = _nearest_on_grid()[place.astype(mx.uint32)]
    return DoubleQuantized(codes.reshape(-1)[: absmax.size], nested_absmax, offset)


def dequantize_absmax(
    codes: mx.array, nested_absmax: mx.array, offset: mx.array, first: mx.array | int = 0
) -> mx.array:
    """Some of a weight's absmax values, float32, in the shape of `codes`.

    Args:
        codes: (…, blocks) uint8.
        nested_absmax: Of the whole weight.
        first: (…), place of each row's first code among those of the whole weight.
    """
    place = (mx.expand_dims(mx.array(first), -1) + mx.arange(codes.shape[-1])) // NESTED_BLOCK
    return dynamic_map()[codes] * nested_absmax[place] + offset


def absmax_of(layer: Mapping[str, mx.array], stored: mx.array, rows: slice | mx.array) -> mx.array:
    """The absmax values, float32, of some rows of a layer's weight.

    Args:
        stored: `layer["absmax"][rows]`, codes or the values themselves.
    """
    if "offset" not in layer:
        return stored
    if isinstance(rows, slice):
        rows = mx.arange(*rows.indices(layer["weight"].shape[0]))
    return dequantize_absmax(stored, layer["nested_absmax"], layer["offset"], rows * stored.shape[-1])


def pack_words(packed: mx.array, num_rows: int) -> mx.array:
    """bitsandbytes' bytes as (rows, width / 8) uint32: the same bytes, in the shape of MLX's 4-bit ones."""
    return packed.reshape(num_rows, -1).view(mx.uint32)


def unpack_words(words: mx.array, absmax: mx.array, mode: str, dtype: mx.Dtype) -> mx.array:
    """Rows of a weight, (…, width), from words (…, width / 8) and the absmax of their blocks (…, blocks)."""
    codes = mode.removesuffix("-dq")
    if has_kernel():
        return unpack_on_metal(words, absmax, pair_table(codes), dtype)
    values = pair_table(codes)[words.view(mx.uint8)].reshape(*absmax.shape, -1)
    return (values * absmax[..., None]).reshape(*words.shape[:-1], -1).astype(dtype)


@cache
def _midpoints() -> mx.array:
    table = np.array(NF4, np.float32)
    return mx.array((table[:-1] + table[1:]) / np.float32(2))


@cache
def pair_table(codes: str) -> mx.array:
    """(256, 2) float32: the two values in a byte."""
    table = np.array(CODES[codes], np.float32)
    return mx.array(np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1))


@cache
def dynamic_map() -> mx.array:
    """The 256 values of the 8-bit map, ascending: seven decades with ever more steps, both signs, 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = _linspace(2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        decade = np.float32(10.0 ** (exponent - 6)) * means
        values += [*decade.tolist(), *(-decade).tolist()]
    return mx.array(np.sort(np.array(values, np.float32)))


def _linspace(count: int) -> np.ndarray:
    """0.1 … 1 in float32 as torch rounds it: from both ends, with one rounding a value."""
    first, last, index = np.float32(0.1), np.float32(1), np.arange(count)
    step = float((last - first) / np.float32(count - 1))
    from_first, from_last = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, from_first, from_last).astype(np.float32)


@cache
def _nearest_on_grid() -> mx.array:
    """(65536,) uint8: the code of each value of a grid over [-1, 1]; of two equally near, the lower one."""
    table = np.array(dynamic_map())
    midpoints = np.float32(0.5) * (table[:-1] + table[1:])
    grid = np.float32(-1) + np.float32(2) * np.arange(_GRID + 1).astype(np.float32) / np.float32(_GRID)
    return mx.array(np.searchsorted(midpoints, grid).astype(np.uint8))


def _group_size(count: int, blocks: int) -> int:
    """Elements of a block, a power of two."""
    size = 32
    while -(-count // size) > blocks:
        size *= 2
    return size


def _mean(values: mx.array) -> mx.array:
    """The mean, summed in the order of PyTorch's CPU kernel on one thread, so that it has the same last bit.

    Eight lanes, four rows of them at a time, each column by a cascade of partial sums.
    """
    lanes = _LANES if values.size >= _LANES else 1
    num_rows = values.size // lanes
    rows, tail = values[: num_rows * lanes].reshape(num_rows, lanes), values[num_rows * lanes :]
    fours = num_rows // 4
    columns = _cascade(rows[: 4 * fours].reshape(fours, 4 * lanes)).reshape(4, lanes)
    first = _in_turn(mx.concatenate([columns[:1], rows[4 * fours :]]))
    lane_sums = _in_turn(mx.concatenate([first[None], columns[1:]]))
    return _in_turn(mx.concatenate([tail, lane_sums])) / values.size


def _cascade(rows: mx.array) -> mx.array:
    """Sum over rows on four levels: `step` rows make one of the next level, the last takes all that come."""
    step = 1 << max(4, (max(rows.shape[0], 1) - 1).bit_length() // 4)
    left_over = []
    for _ in range(3):
        whole = rows.shape[0] // step * step
        left_over.append(_in_turn(rows[whole:]))
        rows = _in_turn(mx.moveaxis(rows[:whole].reshape(-1, step, rows.shape[1]), 1, 0))
    return _in_turn(mx.stack([*left_over, _in_turn(rows)]))


def _in_turn(terms: mx.array) -> mx.array:
    """Sum over the first axis, one after another; rounding depends on the order."""
    total = mx.zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total
