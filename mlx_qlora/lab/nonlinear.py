"""Quantizers whose steps are not all the same: companding (μ-law, A-law), code-books (k-means) and NF4.

Sources: ITU-T G.711 and Jayant & Noll 1984 (companding); Han et al. 2016, arXiv:1510.00149, section 3
(k-means on weights); Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E (NF4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.bitpack import pack_dense

MU = 255.0
"""Of North America's and Japan's telephones (G.711)."""
A = 87.6
"""Of everybody else's."""

Curve = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Compander:
    """A curve over −1 … 1 that stretches small values, and the one that undoes it."""

    name: str
    compress: Curve
    expand: Curve

    def quantized(self, x: np.ndarray, bits: int) -> np.ndarray:
        """x at 2^bits levels that are evenly spaced after the curve; |x| above 1 saturates."""
        levels = 2**bits
        cells = np.floor((np.clip(self.compress(np.clip(x, -1, 1)), -1, 1) + 1) / 2 * levels)
        centres = (np.minimum(cells, levels - 1) + 0.5) / levels * 2 - 1
        return self.expand(centres)


def mu_law(mu: float = MU) -> Compander:
    """F(x) = sgn(x) · ln(1 + μ|x|) / ln(1 + μ).

    Raises:
        ConfigError: μ is not above 0.
    """
    if not mu > 0:
        raise ConfigError(f"μ is above 0, not {mu}.", where="mu")
    return Compander(
        f"μ-law {mu:g}",
        lambda x: np.sign(x) * np.log1p(mu * np.abs(x)) / np.log1p(mu),
        lambda y: np.sign(y) * np.expm1(np.abs(y) * np.log1p(mu)) / mu,
    )


def a_law(a: float = A) -> Compander:
    """F(x) = sgn(x) · A|x| / (1 + ln A) up to |x| = 1/A, and sgn(x) · (1 + ln A|x|) / (1 + ln A) above.

    Raises:
        ConfigError: A is below 1.
    """
    if not a >= 1:
        raise ConfigError(f"A is at least 1, not {a}.", where="a")
    whole = 1 + np.log(a)

    def compress(x: np.ndarray) -> np.ndarray:
        size = np.abs(x)
        curved = 1 + np.log(np.maximum(a * size, 1.0))
        return np.sign(x) * np.where(a * size < 1, a * size, curved) / whole

    def expand(y: np.ndarray) -> np.ndarray:
        size = np.abs(y) * whole
        return np.sign(y) * np.where(size < 1, size, np.exp(np.maximum(size, 1) - 1)) / a

    return Compander(f"A-law {a:g}", compress, expand)


UNIFORM = Compander("linear", lambda x: x, lambda y: y)
"""The straight line, for comparison."""


@dataclass(frozen=True)
class CodebookCodes:
    """Codes into a table of levels, a scale per block of values."""

    codes: np.ndarray
    """Of the original's shape."""
    levels: np.ndarray
    """Ascending."""
    scale: np.ndarray
    """One per block of `block_size` consecutive values in row-major order."""
    block_size: int

    def dequantized(self) -> np.ndarray:
        """Level times scale, float64."""
        values = self.levels[self.codes].reshape(-1)
        scale = np.repeat(self.scale, self.block_size)[: values.size]
        real: np.ndarray = (values * scale).reshape(self.codes.shape)
        return real

    def stored_bytes(self, scale_bits: int = 16, *, is_table_stored: bool = False) -> int:
        """Bytes of the packed codes and scales, and of the table where it is the array's own."""
        bits = max(1, (len(self.levels) - 1).bit_length())
        own = len(self.levels) * scale_bits // 8 if is_table_stored else self.scale.size * scale_bits // 8
        return pack_dense(self.codes, bits).nbytes + own


def nearest_codes(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the nearest level, int32; halfway between two it is the lower."""
    midpoints = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(midpoints, values).astype(np.int32)


def uniform_levels(values: np.ndarray, num_levels: int) -> np.ndarray:
    """Evenly spaced, from the smallest value to the largest."""
    return np.linspace(values.min(), values.max(), num_levels)


def kmeans_levels(values: np.ndarray, num_levels: int, *, max_rounds: int = 500) -> np.ndarray:
    """Levels that k-means finds from `uniform_levels`, ascending; fewer where values repeat.

    Lloyd's rounds: each value to its nearest level, each level to the mean of its values. A round lowers the
    squared error or is the last, so the levels are never worse than those it starts from. In one dimension
    the values of a level stand side by side once sorted, and running sums give every mean at once.

    Raises:
        ConfigError: fewer than one level, or no values.

    Source: Lloyd 1982, IEEE Trans. Inf. Theory 28(2).
    """
    flat = np.sort(np.asarray(values, np.float64).reshape(-1))
    if num_levels < 1 or flat.size == 0:
        raise ConfigError(f"{flat.size} values cannot have {num_levels} levels.", where="num_levels")
    distinct = np.unique(flat)
    if len(distinct) <= num_levels:
        return distinct
    middle = flat.mean()  # sums of what is left lose fewer digits
    sums = np.concatenate([[0.0], np.cumsum(flat - middle)])
    levels = uniform_levels(flat, num_levels)
    for _ in range(max_rounds):
        borders = np.searchsorted(flat, (levels[1:] + levels[:-1]) / 2, side="right")
        edges = np.concatenate([[0], borders, [flat.size]])
        counts = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(counts, 1) + middle
        moved = np.where(counts > 0, means, levels)  # a level without values stays
        if np.array_equal(moved, levels):
            break
        levels = moved
    return np.sort(levels)


def codebook_quantize(values: np.ndarray, levels: np.ndarray) -> CodebookCodes:
    """Values at their nearest levels, without scales."""
    codes = nearest_codes(np.asarray(values, np.float64), levels)
    return CodebookCodes(codes, levels, np.ones(1), max(1, codes.size))


def normal_float_levels(bits: int = 4, offset: float | None = None) -> np.ndarray:
    """The levels of the normal-float type: quantiles of N(0, 1), scaled to −1 … 1, ascending, float64.

    2^(bits−1) quantiles on the negative side and one more on the positive side share the exact 0. `offset` is
    the probability of the outermost; the paper's code takes, for 4 bits, the mean of 1 − 1/32 and 1 − 1/30.

    Raises:
        ConfigError: fewer than two bits.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 4, and appendix E.
    """
    if bits < 2:
        raise ConfigError(f"Normal floats have at least 2 bits, not {bits}.", where="bits")
    half = 2 ** (bits - 1)
    if offset is None:
        offset = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(offset, 0.5, half + 1)[:-1])
    negative = -quantile(np.linspace(offset, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    scaled: np.ndarray = levels / np.abs(levels).max()
    return scaled


def normal_float_quantize(values: np.ndarray, block_size: int = 64, bits: int = 4) -> CodebookCodes:
    """Values divided by the largest magnitude of their block, then at the nearest level.

    Raises:
        ConfigError: no block, or nothing to quantize.
    """
    flat = np.asarray(values, np.float64).reshape(-1)
    if block_size < 1 or flat.size == 0:
        raise ConfigError(f"{flat.size} values have no blocks of {block_size}.", where="block_size")
    starts = np.arange(0, flat.size, block_size)
    largest = np.maximum.reduceat(np.abs(flat), starts)
    scale = np.where(largest > 0, largest, 1.0)
    levels = normal_float_levels(bits)
    codes = nearest_codes(flat / np.repeat(scale, block_size)[: flat.size], levels)
    return CodebookCodes(codes.reshape(np.shape(values)), levels, scale, block_size)
