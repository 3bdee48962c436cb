"""DoRA: the length of each row of a weight is trained beside its direction."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.lora.layers import LoRALinear, linear_shape
from mlx_qlora.quantization.dense import (
    MIN_ROWS,
    block_rows,
    forward_product,
    is_codebook,
    is_quantized,
    unpacked,
    use_dense_products,
)


class _RowLengths:
    """What a layer knows of its rows' lengths, outside of the module's arrays: no parameter and no state."""

    def __init__(self, base_squares: mx.array) -> None:
        self.base_squares = base_squares
        self.known: tuple[mx.array, mx.array, mx.array] | None = None
        """A, B and the adapted lengths they give."""


class DoRALinear(LoRALinear):
    """A frozen linear layer with trained directions and trained row lengths.

    W' = m ⊙ (W + scale · (A B)ᵀ) / ‖W + scale · (A B)ᵀ‖, the norm of each row taken as a constant by the
    gradient (section 4.3 of the paper). m starts at ‖W‖ and B at zero: a new layer computes exactly what its
    base does. The adapted weight is never made: with w a row of W and b a column of B,
    ‖w + scale · A b‖² = ‖w‖² + 2 scale · (w A) b + scale² · bᵀ (Aᵀ A) b, and ‖w‖² never changes.

    Attributes:
        m: Length of each row, (out,), float32.

    Source: Liu et al. 2024, arXiv:2402.09353; names and layout of mlx-lm's adapters.
    """

    def __init__(self, linear: nn.Module, *, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__(linear, rank=rank, scale=scale, dropout=dropout, key=key)
        self.lengths = _RowLengths(base_squares(linear))
        self.m = mx.sqrt(self.lengths.base_squares)

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        factor = (self.m / mx.stop_gradient(divisors(self.adapted_lengths(after=x)))).astype(x.dtype)
        if "bias" not in self.linear:
            return factor * y
        return factor * y + (1 - factor) * self.linear.bias  # a bias has no length to be scaled to

    def adapted_lengths(self, after: mx.array | None = None) -> mx.array:
        """‖W + scale · (A B)ᵀ‖ of each row, (out,), float32. Out of training it is computed once.

        Args:
            after: In training, nothing is unpacked before this is there.
        """
        known = self.lengths.known
        if self.training:
            return self._adapted_lengths(after)
        if known is not None and known[0] is self.lora_a and known[1] is self.lora_b:
            return known[2]
        lengths = self._adapted_lengths(None)
        try:
            mx.eval(lengths)
        except ValueError:  # while MLX traces a function nothing is a number yet
            return lengths
        self.lengths.known = (self.lora_a, self.lora_b, lengths)
        return lengths

    def _adapted_lengths(self, after: mx.array | None) -> mx.array:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        if after is not None:
            # Lengths wait for nothing else: MLX would unpack the weights of all layers first.
            (a,) = mx.depends([a], [after])
        cross = (weight_times(self.linear, a) * b).sum(0)
        own = ((a.T @ a) @ b * b).sum(0)
        squares = self.lengths.base_squares + (2 * self.scale) * cross + (self.scale * self.scale) * own
        return mx.sqrt(mx.maximum(squares, 0))


def divisors(lengths: mx.array) -> mx.array:
    """`lengths` with 1 for 0: a row of zeros, as vocabularies are padded with, stays one."""
    return mx.where(lengths > 0, lengths, 1.0)


def base_squares(linear: nn.Module) -> mx.array:
    """‖w‖² of each row of a frozen weight, (out,), float32; unpacked a block of rows at a time."""
    num_rows = linear.weight.shape[0]
    size = block_rows(linear_shape(linear)[0])
    parts = [mx.zeros(0)]
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        weight = unpacked(linear, parts[-1], rows).astype(mx.float32)
        parts.append(mx.square(weight).sum(1))
    return mx.concatenate(parts)


def weight_times(linear: nn.Module, a: mx.array) -> mx.array:
    """(W A)ᵀ, (rank, out), of a frozen weight and A, (in, rank), both as float32; no gradient."""
    rows = mx.stop_gradient(a.T)
    is_cheaper_unpacked = use_dense_products() and rows.shape[0] >= MIN_ROWS
    if not is_quantized(linear) or is_codebook(linear) or is_cheaper_unpacked:
        return forward_product(linear)(rows)
    scales, biases = linear.scales, linear.get("biases")
    if biases is not None:
        scales, biases = scales.astype(a.dtype), biases.astype(a.dtype)
    return mx.quantized_matmul(
        rows, linear.weight, scales, biases, group_size=linear.group_size, bits=linear.bits, mode=linear.mode
    )
