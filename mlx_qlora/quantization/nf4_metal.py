"""Unpack 4-bit codes with one Metal kernel, which keeps no intermediate array."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

_SOURCE = """
    uint place = thread_position_in_grid.x;   // of one word, eight values
    uint word = words[place];
    float scale = absmax[place * 8 / GROUP_SIZE];
    for (int i = 0; i < 4; ++i) {
        uint pair = (word >> (8 * i)) & 255;
        out[place * 8 + 2 * i] = static_cast<T>(pairs[2 * pair] * scale);
        out[place * 8 + 2 * i + 1] = static_cast<T>(pairs[2 * pair + 1] * scale);
    }
"""


def has_kernel() -> bool:
    """Whether the default device runs it: a GPU through Metal."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def unpack_on_metal(words: mx.array, absmax: mx.array, pairs: mx.array, dtype: mx.Dtype) -> mx.array:
    """As `nf4.unpack_words`, with the (256, 2) table `pairs`; multiplied in float32, then rounded."""
    if words.size == 0:
        return mx.zeros((*words.shape[:-1], 8 * words.shape[-1]), dtype)
    group_size = 8 * words.size // absmax.size
    (out,) = _kernel()(
        inputs=[words, absmax, pairs],
        template=[("T", dtype), ("GROUP_SIZE", group_size)],
        grid=(words.size, 1, 1),
        threadgroup=(min(256, words.size), 1, 1),
        output_shapes=[(*words.shape[:-1], 8 * words.shape[-1])],
        output_dtypes=[dtype],
    )
    return out


@cache
def _kernel() -> Any:
    return mx.fast.metal_kernel(
        name="unpack_sixteen_codes",
        input_names=["words", "absmax", "pairs"],
        output_names=["out"],
        source=_SOURCE,
    )
