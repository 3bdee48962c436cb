"""Linear and embedding layers on a weight of sixteen codes (NF4 or FP4), with or without double quantization.

MLX has no product with such a weight. It is unpacked some rows at a time and forgotten, forward and backward,
so that memory does not grow with the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.dense import product

SCALES = ("absmax", "nested_absmax", "offset")
"""Parameters beside the packed weight; they keep their type whatever a model is cast to."""


def quantized(weight: mx.array, group_size: int, mode: str) -> dict[str, mx.array]:
    """The parameters of a layer with that weight, (out, in): weight, absmax and, doubly, their own scales.

    The words hold the bytes that bitsandbytes stores.
    """
    num_rows = weight.shape[0]
    packed, absmax = nf4.quantize(weight, group_size)
    words = nf4.pack_words(packed, num_rows)
    if not nf4.is_double(mode):
        return {"weight": words, "absmax": absmax.reshape(num_rows, -1)}
    double = nf4.quantize_absmax(absmax)
    codes = double.codes.reshape(num_rows, -1)
    return {"weight": words, **dict(zip(SCALES, (codes, *double[1:]), strict=True))}


def stored_shapes(num_rows: int, width: int, group_size: int, mode: str) -> dict[str, tuple[Any, mx.Dtype]]:
    """Name → (shape, type) of the parameters of such a layer, in the order they are stored."""
    blocks = num_rows * width // group_size
    is_double = nf4.is_double(mode)
    shapes: dict[str, tuple[Any, mx.Dtype]] = {
        "weight": ((num_rows, width // 8), mx.uint32),
        "absmax": ((num_rows, width // group_size), mx.uint8 if is_double else mx.float32),
    }
    if is_double:
        shapes |= {
            "nested_absmax": ((math.ceil(blocks / nf4.NESTED_BLOCK),), mx.float32),
            "offset": ((), mx.float32),
        }
    return shapes


def _set_up(layer: Any, num_rows: int, width: int, group_size: int, mode: str) -> None:
    nn.Module.__init__(layer)  # the parent's own would quantize random numbers
    layer.group_size, layer.bits, layer.mode = group_size, 4, mode
    for name, (shape, dtype) in stored_shapes(num_rows, width, group_size, mode).items():
        layer[name] = mx.zeros(shape, dtype)


class NF4Linear(nn.QuantizedLinear):
    """y = x · Wᵀ + b on a frozen weight of sixteen codes; x gets a gradient.

    Attributes:
        weight: (out, in / 8) uint32, bitsandbytes' bytes.
        absmax: (out, in / group_size), float32; with double quantization their uint8 codes.
        nested_absmax: (⌈blocks / 256⌉,) float32, with double quantization only, and
        offset: () float32, so is this.
        mode: nf4, nf4-dq, fp4 or fp4-dq.
    """

    def __init__(
        self, input_dims: int, output_dims: int, bias: bool = True, group_size: int = 64, mode: str = "nf4"
    ) -> None:
        _set_up(self, output_dims, input_dims, group_size, mode)
        if bias:
            self.bias = mx.zeros((output_dims,))
        self.freeze()

    @classmethod
    def from_linear(cls, linear_layer: nn.Module, group_size: int = 64, mode: str = "nf4") -> NF4Linear:
        """The layer with the same weight, quantized."""
        num_rows, width = linear_layer.weight.shape
        layer = cls(width, num_rows, False, group_size, mode)
        layer.update(quantized(linear_layer.weight, group_size, mode))
        if "bias" in linear_layer:
            layer.bias = linear_layer.bias
        layer.freeze()
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self)
        return y + self["bias"] if "bias" in self else y


class NF4Embedding(nn.QuantizedEmbedding):
    """A frozen embedding of sixteen codes, which may be the output head too; attributes as of `NF4Linear`.

    Attributes:
        dtype: Type of the hidden states it gives; the model's.
    """

    def __init__(self, num_embeddings: int, dims: int, group_size: int = 64, mode: str = "nf4") -> None:
        _set_up(self, num_embeddings, dims, group_size, mode)
        self.num_embeddings, self.dims = num_embeddings, dims
        self.dtype = mx.float32
        self.freeze()

    @classmethod
    def from_embedding(
        cls, embedding_layer: nn.Module, group_size: int = 64, mode: str = "nf4"
    ) -> NF4Embedding:
        """The layer with the same weight, quantized."""
        num_rows, width = embedding_layer.weight.shape
        layer = cls(num_rows, width, group_size, mode)
        layer.update(quantized(embedding_layer.weight, group_size, mode))
        layer.dtype = embedding_layer.weight.dtype
        layer.freeze()
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        absmax = nf4.absmax_of(self, self["absmax"][x], x)
        return nf4.unpack_words(self["weight"][x], absmax, self.mode, self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """x · Wᵀ: the embedding as a head."""
        return product(x, self)


def with_codes(layer: nn.Module, group_size: int, mode: str) -> nn.Module | None:
    """A layer of zeros in the place of an unquantized one; None unless that is linear or an embedding."""
    if type(layer) is nn.Linear:
        num_rows, width = layer.weight.shape
        return NF4Linear(width, num_rows, "bias" in layer, group_size, mode)
    if type(layer) is nn.Embedding:
        num_rows, width = layer.weight.shape
        return NF4Embedding(num_rows, width, group_size, mode)
    return None


def quantize_layers(
    model: nn.Module, settings_of: Callable[[str, nn.Module], Mapping[str, Any] | None]
) -> None:
    """Put quantized layers into `model`, of MLX's formats and of ours; ours hold zeros, to be loaded.

    Args:
        settings_of: (path, layer) → group_size, bits and mode, as in config.json; None keeps the layer.
    """
    layers: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        settings = settings_of(path, module) if hasattr(module, "to_quantized") else None
        if settings is None:
            continue
        group_size, mode = settings["group_size"], settings.get("mode", "affine")
        layer = with_codes(module, group_size, mode) if mode in nf4.MODES else None
        layers.append((path, layer or module.to_quantized(group_size, settings["bits"], mode=mode)))
    model.update_modules(tree_unflatten(layers))
