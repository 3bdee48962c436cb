"""PiSSA: A and B begin along the weight's principal directions; what they begin with is taken off again."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.lora.layers import LoRALinear


class PiSSALinear(LoRALinear):
    """A frozen linear layer plus a trained low-rank matrix, less what that matrix was at the start.

    y = linear(x) + scale · x (A B − A₀ B₀). The paper moves A₀ B₀ out of the base; here the base is shared
    and may be quantized, so it stays, and A₀ B₀ is subtracted. It is computed as
    x (A − A₀) B + x A₀ (B − B₀): at the start that is exactly zero, and in 16 bits no large numbers are
    subtracted from each other. As [A − A₀, A₀] and [B, B − B₀] it is a plain update of twice the rank,
    which is what is shipped (`plain_update`).

    Attributes:
        initial_a: A₀, (in, rank), float32, frozen.
        initial_b: B₀, (rank, out), float32, frozen.

    Source: Meng et al. 2024, arXiv:2404.02948, and its appendix on converting to LoRA.
    """

    def __init__(self, linear: nn.Module, *, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank=rank, scale=scale, dropout=dropout, key=key)
        self.begin_with(self.lora_a, self.lora_b)

    def begin_with(self, a: mx.array, b: mx.array) -> None:
        """Take A (in, rank) and B (rank, out) as the beginning, at which the layer changes nothing."""
        self.lora_a, self.lora_b = a, b
        self.initial_a, self.initial_b = a, b
        self.freeze(recurse=False, keys=["initial_a", "initial_b"])

    def __call__(self, x: mx.array) -> mx.array:
        a, b = plain_update(self.lora_a, self.lora_b, self.initial_a, self.initial_b)
        z = self._dropped(x) @ a.astype(x.dtype)
        return self.linear(x) + (z @ b.astype(x.dtype)) * self.scale

    def delta(self) -> mx.array:
        """What the update adds to the base weight, scale · (A B − A₀ B₀)ᵀ, (out, in), float32."""
        a, b = plain_update(self.lora_a, self.lora_b, self.initial_a, self.initial_b)
        return self.scale * (a @ b).T


def plain_update(
    a: mx.array, b: mx.array, initial_a: mx.array, initial_b: mx.array
) -> tuple[mx.array, mx.array]:
    """A B − A₀ B₀ as one product of twice the rank: (in, 2 rank) and (2 rank, out)."""
    return mx.concatenate([a - initial_a, initial_a], axis=1), mx.concatenate([b, b - initial_b], axis=0)
