"""Low-rank layers on a frozen base."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ConfigError


def lora_scale(alpha: float, rank: int, variant: str = "lora") -> float:
    """Factor on the low-rank update, alpha / rank, of rsLoRA alpha / √rank (no unit).

    PEFT stores ``lora_alpha`` and ``use_rslora``; mlx-lm stores this quotient as ``scale``.

    Raises:
        ConfigError: rank is below 1.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """
    if rank < 1:
        raise ConfigError(f"The rank must be at least 1, not {rank}.", where="lora.rank")
    return alpha / math.sqrt(rank) if variant == "rslora" else alpha / rank


class DropoutKey:
    """Holds the key of a call's mask outside of the module's arrays: it is no parameter and no state."""

    key: mx.array | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer, quantized or not, plus a trained low-rank update.

    y = linear(x) + scale · (dropout(x) A) B, with A (in, rank) and B (rank, out) kept in float32 and
    applied in the type of x, so that a bfloat16 model keeps bfloat16 activations. B starts at zero:
    a new layer computes exactly what its base does.

    Attributes:
        linear: The frozen layer.
        lora_a: A, (in, rank), float32, uniform in ±1/√in.
        lora_b: B, (rank, out), float32, zeros.
        scale: alpha / rank.
        dropout: Probability that an input feature of the update is zeroed while training.
        randomness: Holds the key of the next mask; without a key nothing is dropped.

    Source: Hu et al. 2021, arXiv:2106.09685; names and layout of mlx-lm's adapters.
    """

    def __init__(self, linear: nn.Module, *, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__()
        in_features, out_features = linear_shape(linear)
        bound = 1 / math.sqrt(in_features)
        self.linear = linear
        self.scale = scale
        self.dropout = dropout
        self.lora_a = mx.random.uniform(-bound, bound, (in_features, rank), key=key)
        self.lora_b = mx.zeros((rank, out_features))
        self.randomness = DropoutKey()

    def __call__(self, x: mx.array) -> mx.array:
        z = self._dropped(x) @ self.lora_a.astype(x.dtype)
        return self.linear(x) + (z @ self.lora_b.astype(x.dtype)) * self.scale

    def delta(self) -> mx.array:
        """What the update adds to the base weight, scale · (A B)ᵀ, (out, in), float32."""
        return self.scale * (self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32)).T

    def _dropped(self, x: mx.array) -> mx.array:
        if self.dropout == 0 or not self.training or self.randomness.key is None:
            return x
        keep = 1 - self.dropout
        return mx.random.bernoulli(keep, x.shape, key=self.randomness.key) * (x * (1 / keep))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer; a quantized one stores 32 / bits features a word."""
    out_features, stored = linear.weight.shape
    return (stored * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else stored), out_features


def lora_layers(module: nn.Module) -> list[LoRALinear]:
    """The low-rank layers inside `module`, in a fixed order."""
    return [layer for _, layer in sorted(module.named_modules()) if isinstance(layer, LoRALinear)]


def set_dropout_keys(layers: list[LoRALinear], keys: mx.array | None) -> None:
    """Give each layer its own key (row i of `keys`, (layers, 2) uint32), or take all keys away.

    Without a key a layer drops nothing. Keys come from outside so that a recomputed layer draws the
    same mask again, and so that nothing depends on a global generator.
    """
    for index, layer in enumerate(layers):
        layer.randomness.key = None if keys is None else keys[index]
