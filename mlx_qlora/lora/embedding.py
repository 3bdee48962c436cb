"""A low-rank update of a frozen embedding."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


class LoRAEmbedding(nn.Module):
    """A frozen embedding, quantized or not, plus a trained low-rank update.

    Token t becomes embedding(t) + scale · A[t] B, with A (vocabulary, rank) and B (rank, features). Where the
    embedding is the output head too (tied), the head is updated as well. Nothing is dropped.

    Attributes:
        embedding: The frozen layer.
        lora_a: A, (vocabulary, rank), float32, uniform in ±1/√vocabulary.
        lora_b: B, (rank, features), float32, zeros.
        scale: As of `LoRALinear`.

    Source: Hu et al. 2021, arXiv:2106.09685; names and layout of mlx-lm's adapters.
    """

    def __init__(self, embedding: nn.Module, *, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        num_embeddings, features = embedding_shape(embedding)
        bound = 1 / math.sqrt(num_embeddings)
        self.embedding = embedding
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (num_embeddings, rank), key=key)
        self.lora_b = mx.zeros((rank, features))

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)
        z = self.lora_a[tokens].astype(y.dtype) @ self.lora_b.astype(y.dtype)
        return y + z * self.scale

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of hidden states: the updated embedding as a head."""
        z = (x @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype)
        return self.embedding.as_linear(x) + z * self.scale

    def delta(self) -> mx.array:
        """What the update adds to the base weight, scale · A B, (vocabulary, features), float32."""
        return self.scale * (self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32))


def embedding_shape(embedding: nn.Module) -> tuple[int, int]:
    """(vocabulary, features) of an embedding; a quantized one stores 32 / bits features a word."""
    num_embeddings, stored = embedding.weight.shape
    is_packed = isinstance(embedding, nn.QuantizedEmbedding)
    return num_embeddings, stored * 32 // embedding.bits if is_packed else stored
