"""The weight that a base and its adapter amount to."""

from __future__ import annotations

import mlx.core as mx

from mlx_qlora.lora.dora import DoRALinear, divisors
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear


def merged_weight(layer: LoRALinear | LoRAEmbedding, weight_f32: mx.array) -> mx.array:
    """What one matrix must be to compute as an adapted layer does; its bias stays as it is.

    Args:
        layer: With the low-rank matrices; its own base is not looked at.
        weight_f32: The base weight W unpacked, (out, in), or (vocabulary, features) of an embedding, float32.

    Returns:
        W + scale · (A B)ᵀ; for DoRA its rows at length m; for an embedding W + scale · A B. Float32, new.
    """
    weight = weight_f32.astype(mx.float32) + layer.delta()
    if isinstance(layer, DoRALinear):
        lengths = mx.linalg.norm(weight, axis=1, keepdims=True)
        return weight * (layer.m[:, None].astype(mx.float32) / divisors(lengths))
    return weight
