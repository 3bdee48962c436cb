"""Linear layers on a CPU: unpack a quantized weight, then multiply dense.

MLX's CPU backend multiplies quantized weights with loops of its own, which no BLAS speeds up. For many rows
it is far cheaper to unpack a layer's weight in float32, multiply, and forget it, some rows of the weight at a
time. The backward pass unpacks it again, so no unpacked weight is kept. BLAS knows no bfloat16: such a layer
multiplies in float32 too.

Without a fast BLAS the same holds for x · Wᵀ, if the transpose is laid out first: MLX's own loops walk along
a row of the second matrix. There g · W, which walks along rows of W as it is, stays quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.blas import blas_is_fast
from mlx_qlora.quantization import nf4

MIN_ROWS = 16
"""Fewer rows do not pay for unpacking: generation stays with the quantized product."""


BLOCK_BYTES = 2 * 1024**2
"""Of a weight as float32: what is unpacked at a time."""
GPU_BLOCK_BYTES = 32 * 1024**2
"""The same on a GPU, which is slow at many small things."""
MIN_BLOCK_ROWS = 512
"""But so many rows at least: each block adds nodes to the graph of a step, and they take memory too."""

Product = Callable[[mx.array], mx.array]


def use_dense_products() -> bool:
    """Whether unpacking pays on this device: on a CPU, and nowhere else."""
    return mx.default_device() == mx.cpu


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

    Computed in float32, given back in the type of x; where MLX has no product of its own, so that weights are
    unpacked on a GPU too, there in the type of x.
    """
    dtype = x.dtype if is_codebook(layer) and not use_dense_products() else mx.float32

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        rows = x.astype(dtype)
        return forward_product(layer)(rows).astype(x.dtype)

    @forward.vjp
    def backward(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        rows = cotangent.astype(dtype)
        return backward_product(layer)(rows).astype(x.dtype)

    y: mx.array = forward(x)  # type: ignore[assignment]  # custom_function is typed as object
    return y


def forward_product(layer: Any) -> Product:
    """x → x · Wᵀ, unpacking W anew at each call."""

    def multiply(x: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        for rows in _blocks(layer):
            weight = unpacked(layer, outputs[-1] if outputs else x, rows)
            outputs.append(x @ _laid_out(weight))
        return _joined(outputs)

    return multiply


def backward_product(layer: Any) -> Product:
    """g → g · W, the gradient of x, unpacking W anew at each call, or not at all where that is cheaper."""
    if is_quantized(layer) and not is_codebook(layer) and not blas_is_fast():
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        return lambda g: mx.quantized_matmul(g, *_stored(layer, g.dtype), transpose=False, **settings)

    def multiply(g: mx.array) -> mx.array:
        first, *others = _blocks(layer)
        total = g[..., first] @ unpacked(layer, g, first)
        for rows in others:
            total = total + g[..., rows] @ unpacked(layer, total, rows)
        return total

    return multiply


def kept_products(layer: Any, after: mx.array) -> tuple[Product, Product]:
    """x → x · Wᵀ and g → g · W, with W unpacked once, when `after` is there, for all calls of both.

    For a fast BLAS.
    """
    blocks, weights = _blocks(layer), list[mx.array]()
    for rows in blocks:
        weights.append(unpacked(layer, weights[-1] if weights else after, rows))

    def forward(x: mx.array) -> mx.array:
        return _joined([x @ weight.T for weight in weights])

    def backward(g: mx.array) -> mx.array:
        total = g[..., blocks[0]] @ weights[0]
        for rows, weight in zip(blocks[1:], weights[1:], strict=True):
            total = total + g[..., rows] @ weight
        return total

    return forward, backward


def _joined(outputs: list[mx.array]) -> mx.array:
    return mx.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]


def _laid_out(weight: mx.array) -> mx.array:
    """The transpose of a weight, as this machine multiplies with it fastest."""
    return weight.T if blas_is_fast() else mx.contiguous(weight.T)


def _blocks(layer: Any) -> list[slice]:
    """Rows of the weight, a block at a time."""
    num_rows = layer["weight"].shape[0]
    if blas_is_fast() and not is_quantized(layer):
        return [slice(0, num_rows)]  # nothing is unpacked or laid out
    size = block_rows(_input_size(layer))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def block_rows(input_size: int) -> int:
    """Rows of a weight with so many columns that are unpacked at a time."""
    size = BLOCK_BYTES if use_dense_products() else GPU_BLOCK_BYTES
    return max(MIN_BLOCK_ROWS, size // (4 * input_size))


def _input_size(layer: Any) -> int:
    if not is_quantized(layer):
        return int(layer["weight"].shape[1])
    return int(layer["weight"].shape[1]) * 32 // int(layer.bits)


def is_quantized(layer: nn.Module) -> bool:
    """Whether MLX holds the weight of this layer in groups."""
    return isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)


def is_codebook(layer: Any) -> bool:
    """Whether each weight of this layer is one of sixteen values, as in NF4; MLX has no product with such."""
    return is_quantized(layer) and layer.mode in nf4.MODES


def unpacked(layer: Any, after: mx.array, rows: slice = slice(None)) -> mx.array:
    """Rows of the layer's weight, (out, in), not before `after` is there; of its type if it was quantized."""
    # Without this order all layers' weights may be unpacked or laid out at once, ahead of their use.
    if is_codebook(layer):
        words, scales = mx.depends([layer["weight"][rows], layer["absmax"][rows]], [after])
        return nf4.unpack_words(words, nf4.absmax_of(layer, scales, rows), layer.mode, after.dtype)
    (stored,) = mx.depends([layer["weight"][rows]], [after])
    if not is_quantized(layer):
        weight: mx.array = stored
        return weight
    packed, (_, scales, biases) = stored, _stored(layer, after.dtype)
    biases = biases[rows] if biases is not None else None
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(packed, scales[rows], biases, **settings, dtype=after.dtype)


def _stored(layer: Any, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array | None]:
    """Packed weight, scales and biases of a quantized layer."""
    scales, biases = layer["scales"], layer.get("biases")
    if biases is not None:  # scales of the floating-point modes are bytes
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return layer["weight"], scales, biases
