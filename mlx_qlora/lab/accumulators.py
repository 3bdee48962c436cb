"""Integer products and the width of what adds them up.

A dot product of K terms of an a-bit and a b-bit code needs an accumulator that holds K · max|q_a · q_b|. For
int8 × int8 in int32 that is K ≤ ⌊(2³¹ − 1) / 2¹⁴⌋ = 131,071.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.linear import LinearCodes

_PIECE = 2**20
_ACCUMULATORS: dict[int, type[np.signedinteger]] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class CodeRange:
    """The codes one operand may have."""

    low: int
    high: int

    @classmethod
    def signed(cls, bits: int, *, is_restricted: bool = False) -> CodeRange:
        """−2^(bits−1) … 2^(bits−1) − 1; restricted leaves the lowest code out."""
        return cls(-(2 ** (bits - 1)) + is_restricted, 2 ** (bits - 1) - 1)

    @classmethod
    def unsigned(cls, bits: int) -> CodeRange:
        """0 … 2^bits − 1."""
        return cls(0, 2**bits - 1)


def product_range(a: CodeRange, b: CodeRange) -> tuple[int, int]:
    """The smallest and the largest product of two codes; exact, in Python's integers."""
    products = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(products), max(products)


def safe_terms(a: CodeRange, b: CodeRange, accumulator_bits: int = 32) -> int:
    """The largest K for which no sum of K products leaves a signed accumulator; codes at will.

    The bound is tight: with one term more, operands that are all at their worst leave it.

    Raises:
        ConfigError: the products are all zero, and nothing bounds K.
    """
    lowest, highest = product_range(a, b)
    bounds = []
    if highest > 0:
        bounds.append((2 ** (accumulator_bits - 1) - 1) // highest)
    if lowest < 0:
        bounds.append(2 ** (accumulator_bits - 1) // -lowest)
    if not bounds:
        raise ConfigError("Products that are all zero overflow nothing.", where="code ranges")
    return min(bounds)


def bits_needed(num_terms: int, a: CodeRange, b: CodeRange) -> int:
    """The narrowest signed accumulator for so many terms."""
    sums = [num_terms * product for product in product_range(a, b)]
    # ~n is −n − 1: what a negative number takes beside its sign.
    return 1 + max((total if total >= 0 else ~total).bit_length() for total in sums)


def worst_codes(num_terms: int, a: CodeRange, b: CodeRange) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of codes, int64, whose dot product is the first to leave the accumulator."""
    pairs = [(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    # The positive side has one value less to offer, so at equal size it is left first.
    x, y = max(pairs, key=lambda pair: (abs(pair[0] * pair[1]), pair[0] * pair[1]))
    return np.broadcast_to(np.int64(x), num_terms), np.broadcast_to(np.int64(y), num_terms)


def accumulated(a: np.ndarray, b: np.ndarray, accumulator_bits: int = 32) -> int:
    """The dot product as a machine with such an accumulator computes it: what does not fit wraps around.

    Raises:
        ConfigError: there is no such accumulator.
    """
    if accumulator_bits not in _ACCUMULATORS:
        raise ConfigError(f"Accumulators have 8, 16, 32 or 64 bits, not {accumulator_bits}.", where="bits")
    kind = _ACCUMULATORS[accumulator_bits]
    total = np.zeros(1, kind)  # an array wraps silently where a scalar warns
    for start in range(0, len(a), _PIECE):
        piece = slice(start, start + _PIECE)
        total += np.dot(a[piece].astype(kind), b[piece].astype(kind))
    return int(total[0])


def integer_product(x: LinearCodes, weight: LinearCodes) -> np.ndarray:
    """x · Wᵀ from codes alone: int32 sums, one multiplication with scales at the end.

    With r = S(Q − Z): S_x S_w · (Σ Q_x Q_w − Z_x Σ Q_w − Z_w Σ Q_x + K Z_x Z_w). The sums of codes do not
    depend on the other operand, so Σ Q_w is made once per weight.

    Args:
        x: (rows, K), one scale for all.
        weight: (out, K), a scale for all or one for each row.

    Raises:
        ConfigError: scales per group of columns, which cannot be taken out of the sum, or a K at which the
            sum could overflow.
    """
    if x.scheme.per != "tensor" or weight.scheme.per == "group":
        raise ConfigError(
            "An integer product takes activations per tensor and weights per tensor or channel.", where="per"
        )
    num_terms = x.codes.shape[1]
    limit = safe_terms(CodeRange(*x.scheme.code_range), CodeRange(*weight.scheme.code_range))
    if num_terms > limit:
        raise ConfigError(f"{num_terms} terms can overflow an int32 sum: at most {limit}.", where="x")
    codes_x, codes_w = x.codes.astype(np.int32), weight.codes.astype(np.int32)
    zero_x, zero_w = int(x.zero_point[0, 0]), weight.zero_point.reshape(1, -1).astype(np.int64)
    sums = (codes_x @ codes_w.T).astype(np.int64)
    sums -= zero_x * codes_w.sum(axis=1, dtype=np.int64)[None]
    sums -= zero_w * codes_x.sum(axis=1, dtype=np.int64)[:, None]
    sums += num_terms * zero_x * zero_w
    product: np.ndarray = float(x.scale[0, 0]) * weight.scale.reshape(1, -1) * sums
    return product
