"""One layer's weight with its update in the format it will be stored in, and what that format loses of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.exchange.fuse_base import Update, matrix_shape, stored_scheme, unpacked_rows
from mlx_qlora.exchange.requantize import Parts, best_stored, plainly_stored, recoded, restored
from mlx_qlora.objective.loss import number
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.nf4_layers import SCALES
from mlx_qlora.quantization.schemes import Scheme

BLOCK_BYTES = 4 * 1024**2
"""Of a weight in float32: what is unpacked, updated and quantized at a time; ten times as much is used."""


@dataclass(frozen=True)
class Target:
    """What becomes of one layer."""

    scheme: Scheme | None
    """None stores it unquantized."""
    dtype: mx.Dtype
    """Of an unquantized weight, and of affine scales."""
    update: Update | None = None
    compensate: bool = True
    """Choose codes and scales together (see `mlx_qlora.exchange.requantize`)."""


@dataclass(frozen=True)
class WeightLoss:
    """What storing lost of one layer: Q(W + Δ) beside W + Δ, with Δ what the adapter adds."""

    num_weights: int
    delta_squares: float
    """‖Δ‖²"""
    error_squares: float
    """‖Q(W + Δ) − (W + Δ)‖²"""
    projection: float
    """⟨Q(W + Δ) − W, Δ⟩"""

    @property
    def error(self) -> float | None:
        """‖Q(W + Δ) − (W + Δ)‖ / ‖Δ‖: over 1, that error is larger than the update. None without one."""
        return math.sqrt(self.error_squares / self.delta_squares) if self.delta_squares else None

    @property
    def survived(self) -> float | None:
        """How much of Δ is in the stored weight, along Δ: 1 is all of it, 0 nothing."""
        return self.projection / self.delta_squares if self.delta_squares else None

    def __add__(self, other: WeightLoss) -> WeightLoss:
        """Of two layers together."""
        return WeightLoss(
            self.num_weights + other.num_weights,
            self.delta_squares + other.delta_squares,
            self.error_squares + other.error_squares,
            self.projection + other.projection,
        )


NOTHING_LOST = WeightLoss(0, 0.0, 0.0, 0.0)


def is_as_stored(layer: Any, target: Target) -> bool:
    """Whether a layer is copied bit for bit: nothing is added to it, and its format stays."""
    if target.update is not None or stored_scheme(layer) != target.scheme:
        return False
    return target.scheme is not None or layer["weight"].dtype == target.dtype


def fused_parts(layer: nn.Module, target: Target) -> Parts:
    """The tensors that will be stored of a layer's weight, evaluated, by leaf name.

    Rows are unpacked, updated and quantized a block at a time; stacked weights keep their shape.
    """
    blocks = []
    for first, last in row_blocks(layer):
        blocks.append(_stored_rows(layer, target, first, last))
        mx.eval(blocks[-1])
    parts = {leaf: mx.concatenate([block[leaf] for block in blocks]) for leaf in blocks[0]}
    del blocks
    if target.scheme is not None and nf4.is_double(target.scheme.mode):
        parts = _doubled(layer, target, parts)
    leading = layer["weight"].shape[:-1]
    if len(leading) > 1:
        parts = {leaf: array.reshape(*leading, array.shape[-1]) for leaf, array in parts.items()}
    mx.eval(parts)
    return parts


def weight_loss(layer: nn.Module, target: Target, parts: Parts) -> WeightLoss:
    """What `fused_parts` lost; an update of zeros loses nothing."""
    total = NOTHING_LOST
    for first, last in row_blocks(layer):
        base = unpacked_rows(layer, first, last)
        wanted = target.update(base, first, last) if target.update is not None else base
        stored = restored_rows(parts, target.scheme, first, last)
        delta = wanted - base
        figures = [delta.square().sum(), (stored - wanted).square().sum(), ((stored - base) * delta).sum()]
        mx.eval(figures)
        total += WeightLoss(base.size, *map(number, figures))
    return total


def restored_rows(parts: Parts, scheme: Scheme | None, first: int, last: int) -> mx.array:
    """Rows [first, last) of what is stored, as a matrix, float32."""
    weight = parts["weight"].reshape(-1, parts["weight"].shape[-1])[first:last]
    if scheme is None:
        return weight.astype(mx.float32)
    return restored(scales_of(parts, scheme, slice(first, last)) | {"weight": weight}, scheme)


def scales_of(parts: Parts, scheme: Scheme, rows: slice | mx.array) -> Parts:
    """What is stored beside the codes of some rows; absmax unpacked from double quantization."""
    if scheme.is_codebook:
        return {"absmax": nf4.absmax_of(parts, parts["absmax"][rows], rows)}
    shared = {leaf: parts[leaf] for leaf in ("scales", "biases") if leaf in parts}
    return {leaf: array.reshape(-1, array.shape[-1])[rows] for leaf, array in shared.items()}


def row_blocks(layer: nn.Module) -> Iterator[tuple[int, int]]:
    """[first, last) of the rows that are worked on at a time."""
    num_rows, width = matrix_shape(layer)
    size = max(1, BLOCK_BYTES // (4 * width))
    for first in range(0, num_rows, size):
        yield first, min(first + size, num_rows)


def _stored_rows(layer: Any, target: Target, first: int, last: int) -> Parts:
    rows = _wanted_rows(layer, target, first, last)
    if target.scheme is None:
        return {"weight": rows.astype(target.dtype)}
    if not target.compensate:
        return plainly_stored(rows, target.scheme, target.dtype)
    grid = _grid(layer, target.scheme, first, last)
    return best_stored(rows, target.scheme, target.dtype, grid=grid, basis=_basis(target))


def _wanted_rows(layer: Any, target: Target, first: int, last: int) -> mx.array:
    base = unpacked_rows(layer, first, last)
    return base if target.update is None else target.update(base, first, last)


def _basis(target: Target) -> mx.array | None:
    return None if target.update is None else target.update.basis


def _grid(layer: Any, scheme: Scheme, first: int, last: int) -> Parts | None:
    """The scales the layer has now, where the new format can take them over."""
    now = stored_scheme(layer)
    if now is None or (now.mode, now.group_size) != (scheme.mode, scheme.group_size) or now.mode != "affine":
        return None
    steps, new_steps = 2**now.bits - 1, 2**scheme.bits - 1
    if new_steps % steps:
        return None
    scales, biases = (
        layer[leaf].reshape(-1, layer[leaf].shape[-1])[first:last] for leaf in ("scales", "biases")
    )
    return {"scales": scales.astype(mx.float32) * (steps / new_steps), "biases": biases}


def _doubled(layer: Any, target: Target, parts: Parts) -> Parts:
    """With the absmax values in 8 bits, and the nearest codes for what these have become."""
    scheme, shape = target.scheme, parts["absmax"].shape
    if scheme is None:
        return parts
    double = nf4.quantize_absmax(parts["absmax"])
    parts = {
        "weight": parts["weight"],
        **dict(zip(SCALES, (double.codes.reshape(shape), *double[1:]), strict=True)),
    }
    if not target.compensate:
        return parts
    words = []
    for first, last in row_blocks(layer):
        absmax = scales_of(parts, scheme, slice(first, last))["absmax"]
        words.append(
            recoded(_wanted_rows(layer, target, first, last), absmax, scheme.group_size, _basis(target))
        )
        mx.eval(words[-1])
    return {**parts, "weight": mx.concatenate(words)}
