"""Quantized layers on a CPU with a fast BLAS: unpack the weight, then multiply dense.

MLX's CPU backend multiplies quantized weights with loops of its own, which no BLAS speeds up. For many rows
it is far cheaper to unpack a layer's weight in float32, multiply, and forget it. The backward pass unpacks
it again, so no unpacked weight is kept. BLAS knows no bfloat16: such a layer multiplies in float32 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.blas import blas_is_fast

MIN_ROWS = 16
"""Fewer rows do not pay for unpacking: generation stays with the quantized product."""


def use_dense_products() -> bool:
    """Whether unpacking pays on this device: on a CPU with a fast BLAS, and nowhere else."""
    return mx.default_device() == mx.cpu and blas_is_fast()


@contextmanager
def dense_products(model: nn.Module, *, enabled: bool | None = None) -> Iterator[None]:
    """Let the quantized linear layers of `model`, and only these, unpack their weights while this is open.

    Args:
        enabled: None asks `use_dense_products`.
    """
    is_on = use_dense_products() if enabled is None else enabled
    layers = [m for _, m in model.named_modules() if type(m) is nn.QuantizedLinear] if is_on else []
    for layer in layers:
        layer.__class__ = _UnpackedLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.QuantizedLinear


class _UnpackedLinear(nn.QuantizedLinear):
    """A quantized linear layer that multiplies with its unpacked weight when there are many rows."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < MIN_ROWS:
            return super().__call__(x)
        y = product(x, self)
        return y + self["bias"] if "bias" in self else y


def product(x: mx.array, layer: Any) -> mx.array:
    """x · Wᵀ with the unpacked weight of a quantized layer; W is frozen, x gets a gradient.

    Computed in float32, given back in the type of x.
    """

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        rows = x.astype(mx.float32)
        return (rows @ unpacked(layer, rows).T).astype(x.dtype)

    @forward.vjp
    def backward(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        rows = cotangent.astype(mx.float32)
        return (rows @ unpacked(layer, rows)).astype(x.dtype)

    y: mx.array = forward(x)  # type: ignore[assignment]  # custom_function is typed as object
    return y


def unpacked(layer: Any, after: mx.array) -> mx.array:
    """The layer's weight, (out, in), in the type of `after`, and not before `after` is there."""
    # Without this order all layers' weights may be unpacked at once, ahead of their use.
    (packed,) = mx.depends([layer["weight"]], [after])
    scales, biases = layer["scales"], layer.get("biases")
    if biases is not None:  # scales of the floating-point modes are bytes
        scales, biases = scales.astype(after.dtype), biases.astype(after.dtype)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(packed, scales, biases, **settings, dtype=after.dtype)
