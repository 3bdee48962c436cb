"""Ways to store a network's weight matrices, each with the bytes it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_qlora.lab.linear import LinearCodes, LinearScheme, quantize
from mlx_qlora.lab.nonlinear import (
    CodebookCodes,
    codebook_quantize,
    kmeans_levels,
    mu_law,
    normal_float_quantize,
)


@dataclass(frozen=True)
class WeightScheme:
    """One way to store a weight matrix."""

    name: str
    restored: Callable[[np.ndarray], tuple[np.ndarray, int]]
    """Weight → what comes back, and the bytes that were stored."""


def linear_scheme(bits: int, per: str = "channel", *, is_symmetric: bool = True) -> WeightScheme:
    """Linear codes of one granularity, with 16-bit scales."""
    scheme = LinearScheme(bits, is_symmetric, per)  # type: ignore[arg-type]  # checked there

    def restored(weight: np.ndarray) -> tuple[np.ndarray, int]:
        return _read(quantize(weight, scheme))

    return WeightScheme(scheme.name, restored)


def normal_float_scheme(block_size: int = 64) -> WeightScheme:
    """NF4 in blocks, with 16-bit scales."""
    return WeightScheme(
        f"NF4, block {block_size}", lambda weight: _read(normal_float_quantize(weight, block_size))
    )


def kmeans_scheme(bits: int) -> WeightScheme:
    """A code-book of each matrix's own."""

    def restored(weight: np.ndarray) -> tuple[np.ndarray, int]:
        codes = codebook_quantize(weight, kmeans_levels(weight, 2**bits))
        return codes.dequantized(), codes.stored_bytes(is_table_stored=True)

    return WeightScheme(f"k-means {bits} bits", restored)


def mu_law_scheme(bits: int, mu: float = 15.0) -> WeightScheme:
    """μ-law with one 16-bit scale per row. At few bits a small μ is better than the telephone's 255."""
    curve = mu_law(mu)

    def restored(weight: np.ndarray) -> tuple[np.ndarray, int]:
        largest = np.abs(weight).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, largest, 1.0)
        return curve.quantized(weight / scale, bits) * scale, -(-weight.size * bits // 8) + 2 * len(weight)

    return WeightScheme(f"{curve.name}, {bits} bits", restored)


SCHEMES: tuple[WeightScheme, ...] = (
    *(linear_scheme(bits, per) for bits in (8, 4, 3, 2) for per in ("tensor", "channel", "group")),
    linear_scheme(4, "group", is_symmetric=False),
    linear_scheme(2, "group", is_symmetric=False),
    normal_float_scheme(),
    kmeans_scheme(4),
    kmeans_scheme(2),
    mu_law_scheme(4),
)


def _read(codes: LinearCodes | CodebookCodes) -> tuple[np.ndarray, int]:
    return codes.dequantized(), codes.stored_bytes()
