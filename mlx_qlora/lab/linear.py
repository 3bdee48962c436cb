"""Linear quantization, r ≈ S · (Q − Z): symmetric and asymmetric; per tensor, channel and group.

S is the scale (a step of the grid, in the unit of r), Q the code (an integer of `bits` bits) and Z the zero
point, the code that stands for r = 0. Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.

Arrays are NumPy's, in float64: here the theory is looked at, not the speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.bitpack import pack_dense

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class LinearScheme:
    """How a matrix (out, in) is mapped to integers.

    Raises:
        ConfigError: such a scheme does not exist.
    """

    bits: int = 8
    is_symmetric: bool = True
    """Z = 0 and S from the largest magnitude; otherwise S and Z from the smallest and largest value."""
    per: Granularity = "channel"
    """What shares S and Z: the whole matrix, a row, or `group_size` consecutive columns of a row."""
    group_size: int = 32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ConfigError(f"Linear quantization has 2 to 16 bits here, not {self.bits}.", where="bits")
        if self.per not in ("tensor", "channel", "group"):
            raise ConfigError(f"{self.per!r} is none of tensor, channel and group.", where="per")
        if self.group_size < 1:
            raise ConfigError(f"A group has at least one weight, not {self.group_size}.", where="group_size")

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code, two's complement: −128 and 127 for 8 bits."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def name(self) -> str:
        """As tables show it: ``int4 sym, group 32``."""
        unit = f"group {self.group_size}" if self.per == "group" else self.per
        return f"int{self.bits} {'sym' if self.is_symmetric else 'asym'}, {unit}"


@dataclass(frozen=True)
class LinearCodes:
    """A quantized array: what is stored, and how to read it."""

    codes: np.ndarray
    """Of the original's shape."""
    scale: np.ndarray
    """(rows or 1, groups or 1)."""
    zero_point: np.ndarray
    """Integers, of the scale's shape."""
    scheme: LinearScheme

    def dequantized(self) -> np.ndarray:
        """S · (Q − Z), float64."""
        scale, zero = self._spread(self.scale), self._spread(self.zero_point)
        real: np.ndarray = scale * (_as_rows(self.codes) - zero)
        return real.reshape(self.codes.shape)

    def steps(self) -> np.ndarray:
        """The scale of each element, in the shape of the original."""
        shape = _as_rows(self.codes).shape
        return np.broadcast_to(self._spread(self.scale), shape).reshape(self.codes.shape)

    def stored_bytes(self, scale_bits: int = 16) -> int:
        """Bytes of packed codes, scales and, if asymmetric, zero points, each as wide as a code."""
        low, _ = self.scheme.code_range
        parts = [pack_dense(self.codes - low, self.scheme.bits).nbytes, self.scale.size * scale_bits // 8]
        if not self.scheme.is_symmetric:
            parts.append(pack_dense(self.zero_point - low, self.scheme.bits).nbytes)
        return sum(parts)

    def _spread(self, per_group: np.ndarray) -> np.ndarray:
        if self.scheme.per != "group":
            return per_group
        columns = _as_rows(self.codes).shape[1]
        return np.repeat(per_group, self.scheme.group_size, axis=1)[:, :columns]


def quantize(
    real: np.ndarray, scheme: LinearScheme, limits: tuple[float, float] | None = None
) -> LinearCodes:
    """The nearest codes.

    Args:
        real: Finite numbers of any shape; the first axis is the channels'. The last group may be shorter.
        limits: The range to cover, where it is known from elsewhere (calibration); values outside saturate.

    Raises:
        ConfigError: nothing to quantize, values that are not finite, limits that are no range, or limits
            per channel.
    """
    rows = _as_rows(np.asarray(real, np.float64))
    if rows.size == 0 or not np.isfinite(rows).all():
        raise ConfigError("Only finite numbers can be quantized, and at least one.", where="real")
    if limits is None:
        low, high = _limits(rows, scheme)
    else:
        if not limits[0] <= limits[1] or not np.isfinite(limits).all() or scheme.per != "tensor":
            raise ConfigError(f"{limits} is no range for a whole tensor.", where="limits")
        low, high = (np.array([[bound]]) for bound in limits)
    scale, zero = scale_and_zero_point(low, high, scheme)
    empty = LinearCodes(rows, scale, zero, scheme)
    # Division first: r / S + Z would round to the same, but for the loss of digits where Z is large.
    codes = np.rint(rows / empty._spread(scale)) + empty._spread(zero)
    codes = np.clip(codes, *scheme.code_range).astype(np.int32)
    return LinearCodes(codes.reshape(np.shape(real)), scale, zero, scheme)


def scale_and_zero_point(
    low: np.ndarray, high: np.ndarray, scheme: LinearScheme
) -> tuple[np.ndarray, np.ndarray]:
    """S and Z that cover low … high and the number 0.

    Symmetric: S = max(|low|, |high|) / q_max and Z = 0. Asymmetric: S = (high − low) / (q_max − q_min) and
    Z = round(q_min − low / S). An interval without extent gets S = 1.
    """
    q_min, q_max = scheme.code_range
    # With 0 in the range it has a code of its own, so padding and ReLU's zeros come back exactly.
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if scheme.is_symmetric:
        scale = _positive(np.maximum(-low, high) / q_max)
        return scale, np.zeros(scale.shape, np.int32)
    scale = _positive(high / (q_max - q_min) - low / (q_max - q_min))
    zero = np.clip(np.rint(q_min - low / scale), q_min, q_max)
    return scale, zero.astype(np.int32)


def _positive(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > np.finfo(np.float64).tiny, scale, 1.0)


def _as_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def _limits(rows: np.ndarray, scheme: LinearScheme) -> tuple[np.ndarray, np.ndarray]:
    if scheme.per == "tensor":
        return rows.min(keepdims=True), rows.max(keepdims=True)
    if scheme.per == "channel":
        return rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    starts = np.arange(0, rows.shape[1], scheme.group_size)
    return np.minimum.reduceat(rows, starts, axis=1), np.maximum.reduceat(rows, starts, axis=1)
