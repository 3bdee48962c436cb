"""The 8-bit quantizer for any MLX model with linear layers: weights in int8, activations as they are (W8A16).

Each output channel has one scale, symmetric: W ≈ s · Q, so x · Wᵀ = (x · Qᵀ) · s and the scale is applied to
the output, not the weight. For running a real model `mlx_qlora.quantization` is faster and finer; this shows
how little it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.errors import ModelError

LARGEST_CODE = 127
"""−128 is not used: the grid is symmetric."""

Filter = Callable[[str, nn.Linear], bool]


class W8A16Linear(nn.Module):
    """A linear layer with int8 weights and one float scale per output channel; frozen."""

    def __init__(self, weight: mx.array, scale: mx.array, bias: mx.array | None = None) -> None:
        """Take codes (out, in) int8, scales (out,) and the bias as it was."""
        super().__init__()
        self.weight, self.scale = weight, scale
        if bias is not None:
            self.bias = bias
        self.freeze()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> W8A16Linear:
        """The nearest codes of a layer's weight; its bias stays what it is.

        Raises:
            ModelError: a weight is not finite.
        """
        weight = linear.weight.astype(mx.float32)
        if not mx.isfinite(weight).all().item():
            raise ModelError("A weight is not finite, so its channel has no scale.", where="linear.weight")
        largest = mx.abs(weight).max(axis=1)
        scale = mx.where(largest > 0, largest / LARGEST_CODE, 1.0)
        # In the type that is kept, so that the codes fit the scale that will multiply them.
        scale = scale.astype(linear.weight.dtype)
        codes = mx.clip(mx.round(weight / scale[:, None].astype(mx.float32)), -LARGEST_CODE, LARGEST_CODE)
        return cls(codes.astype(mx.int8), scale, linear.get("bias"))

    def __call__(self, x: mx.array) -> mx.array:
        """x · Wᵀ + b in the type of x."""
        y = (x @ self.weight.astype(x.dtype).T) * self.scale.astype(x.dtype)
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def dequantized(self) -> mx.array:
        """The weight (out, in) that the codes stand for, in the type of the scales."""
        return self.weight.astype(self.scale.dtype) * self.scale[:, None]


@dataclass(frozen=True)
class Replacement:
    """What happened to a model."""

    replaced: tuple[str, ...]
    """Paths of the layers that are W8A16 now."""
    kept: tuple[str, ...]
    """Paths of the linear layers that stay."""
    bytes_before: int
    bytes_after: int
    """Of all parameters."""


def quantize_linears(model: nn.Module, keep: Filter | None = None) -> Replacement:
    """Replace the linear layers of `model` in place by `W8A16Linear`.

    Args:
        keep: Told the path and the layer; True leaves it as it is, as one may wish for ``lm_head``. Layers of
            a class of their own (quantized already, low-rank) are not touched.

    Raises:
        ModelError: there is no linear layer to replace.
    """
    linears = [(path, module) for path, module in model.named_modules() if type(module) is nn.Linear]
    kept = {path for path, module in linears if keep is not None and keep(path, module)}
    if len(kept) == len(linears):
        raise ModelError(f"There is no linear layer to replace: {len(linears)} found, all kept.")
    before = _num_bytes(model)
    # One after another, so that no more than one layer exists twice.
    for path, module in linears:
        if path not in kept:
            replacement = W8A16Linear.from_linear(module)
            mx.eval(replacement.parameters())
            _put(model, path, replacement)
    replaced = tuple(path for path, _ in linears if path not in kept)
    return Replacement(replaced, tuple(sorted(kept)), before, _num_bytes(model))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` leads: attributes, keys of dictionaries and indices of lists."""
    *parents, last = path.split(".")
    owner = model
    for name in parents:
        owner = owner[int(name)] if isinstance(owner, list) else owner[name]
    if isinstance(owner, list):
        owner[int(last)] = module
    else:
        owner[last] = module


def _num_bytes(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
