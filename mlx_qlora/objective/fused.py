"""Linear layer and cross-entropy in one, chunk by chunk: all logits at once never exist.

For a vocabulary of 128 k, the logits of 2048 tokens are a gigabyte in float32, and a plain backward pass
keeps several such arrays. Here a chunk's logits give its loss and the gradient of its hidden states at
once, and are forgotten. The mathematics is that of the plain computation.

Shapes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.blas import blas_is_fast
from mlx_qlora.objective.exponential import exp_of_shifted
from mlx_qlora.objective.head import Head
from mlx_qlora.quantization.dense import (
    Product,
    backward_product,
    forward_product,
    is_codebook,
    is_quantized,
    kept_products,
    use_dense_products,
)

CHUNK_BYTES = 8 * 1024**2
"""float32 logits of one chunk: small enough to be forgotten, large enough to keep a matmul busy."""

UNPACKED_HEAD_BYTES = 256 * 1024**2
"""On a CPU with a fast BLAS a head up to this size is unpacked once for all chunks of a batch."""


def chunk_length(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Positions per chunk, at least 16."""
    return max(16, chunk_bytes // (4 * vocabulary))


def fused_nll(
    hidden_ND: mx.array, targets_N: mx.array, weights_N: mx.array, head: Head, chunk_bytes: int = CHUNK_BYTES
) -> mx.array:
    """Sum of weight · negative log-likelihood, float32, as `masked_nll` of the head's logits.

    Gradients flow to the hidden states and to whatever the head trains.

    Args:
        weights_N: 1 where a position counts, 0 where it pads.
    """
    if head.is_plain_matmul:
        return _plain(head, chunk_bytes)(hidden_ND, targets_N, weights_N)[0]
    return _generic(head, chunk_bytes)(hidden_ND, targets_N, weights_N, head.module.trainable_parameters())[0]


def _plain(head: Head, chunk_bytes: int) -> Any:
    """For logits = hidden · Wᵀ with W frozen: two matmuls a chunk, as in a plain forward and backward."""
    vocabulary = head.module.weight.shape[0]

    @mx.custom_function
    def nll(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        to_logits, to_hidden = _products(head.module, hidden)
        chunk = partial(_chunk, to_logits, to_hidden)
        length = chunk_length(vocabulary, chunk_bytes)
        total, grads = mx.array(0.0), list[mx.array]()
        for first in range(0, hidden.shape[0], length):
            part = slice(first, first + length)
            rows = hidden[part]
            if grads:
                # Behind the last chunk's gradient and loss: else all chunks' logits may live at once.
                (rows,) = mx.depends([rows], [grads[-1], total])
            value, grad = chunk(rows, targets[part], weights[part])
            total = total + value
            grads.append(grad)
        return total, mx.concatenate(grads)

    @nll.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, targets, weights = primals
        d_hidden = outputs[1] * cotangents[0].astype(outputs[1].dtype)
        return d_hidden, mx.zeros_like(targets), mx.zeros_like(weights)

    return nll


def _chunk(
    to_logits: Product, to_hidden: Product, hidden: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """The loss of some positions and the gradient of their hidden states."""
    logits = to_logits(hidden).astype(mx.float32)
    highest = logits.max(axis=-1, keepdims=True)
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)
    d_logits = exp_of_shifted(logits - highest)
    total = d_logits.sum(axis=-1, keepdims=True)
    lse = highest + mx.log(total)
    nll = ((lse - at_target)[:, 0] * weights).sum()
    d_logits = d_logits * (weights[:, None] / total)
    minus_one = (mx.exp(at_target - lse) - 1) * weights[:, None]
    d_logits = mx.put_along_axis(d_logits, targets[:, None], minus_one, axis=-1)
    return nll, to_hidden(d_logits.astype(hidden.dtype))


def _generic(head: Head, chunk_bytes: int) -> Any:
    """For any head: biased, soft-capped, or trained itself."""

    def chunk(hidden: mx.array, trained: Any, targets: mx.array, weights: mx.array) -> mx.array:
        before = head.module.trainable_parameters()
        head.module.update(trained)
        logits = head(hidden).astype(mx.float32)
        head.module.update(before)
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    value_and_grads = mx.value_and_grad(chunk, argnums=(0, 1))

    @mx.custom_function
    def nll(hidden: mx.array, targets: mx.array, weights: mx.array, trained: Any) -> Any:
        vocabulary = head.module.weight.shape[0] if "weight" in head.module else hidden.shape[-1]
        length = chunk_length(vocabulary, chunk_bytes)
        total, grads, d_trained = mx.array(0.0), list[mx.array](), None
        for first in range(0, hidden.shape[0], length):
            part = slice(first, first + length)
            rows = hidden[part]
            if grads:
                (rows,) = mx.depends([rows], [grads[-1], total])
            value, (grad, d_part) = value_and_grads(rows, trained, targets[part], weights[part])
            total = total + value
            grads.append(grad)
            flat = [array for _, array in tree_flatten(d_part)]
            d_trained = flat if d_trained is None else [a + b for a, b in zip(d_trained, flat, strict=True)]
        return total, mx.concatenate(grads), *(d_trained or [])

    @nll.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, targets, weights, trained = primals
        d_hidden = outputs[1] * cotangents[0].astype(outputs[1].dtype)
        names = [name for name, _ in tree_flatten(trained)]
        d_trained = tree_unflatten(
            [(name, grad * cotangents[0]) for name, grad in zip(names, outputs[2:], strict=True)]
        )
        return d_hidden, mx.zeros_like(targets), mx.zeros_like(weights), d_trained or trained

    return nll


def _products(layer: nn.Module, hidden: mx.array) -> tuple[Product, Product]:
    """hidden → logits, and gradient of the logits → gradient of hidden, for a frozen weight (V, D)."""
    if use_dense_products():
        # Without a BLAS a product takes so long that unpacking for every chunk is not felt.
        is_small = 4 * layer.weight.shape[0] * hidden.shape[-1] <= UNPACKED_HEAD_BYTES
        if blas_is_fast() and is_small:
            return kept_products(layer, hidden)
        return forward_product(layer), backward_product(layer)
    if is_codebook(layer):
        return forward_product(layer), backward_product(layer)
    weight = layer.weight
    if not is_quantized(layer):
        return (lambda h: h @ weight.T), (lambda g: g @ weight)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    scales, biases = layer.scales, layer.get("biases")

    def multiply(x: mx.array, *, transpose: bool) -> mx.array:
        return mx.quantized_matmul(x, weight, scales, biases, transpose=transpose, **settings)

    return (lambda h: multiply(h, transpose=True)), (lambda g: multiply(g, transpose=False))
