"""Pruning: single weights by magnitude, and whole units by norm.

Sources: Han et al. 2016, arXiv:1510.00149, section 2; Li et al. 2017, arXiv:1608.08710, section 3.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.networks import Perceptron, Weights, weights_of


def magnitude_masks(weights: Weights, sparsity: float) -> list[np.ndarray]:
    """0 for the share `sparsity` of all weights with the smallest magnitude, over all layers; else 1.

    Raises:
        ConfigError: the share is not within 0 … 1.
    """
    if not 0 <= sparsity <= 1:
        raise ConfigError(f"A share lies within 0 and 1; {sparsity} does not.", where="sparsity")
    sizes = np.concatenate([np.abs(weight).reshape(-1) for weight in weights])
    keep = np.ones(sizes.size)
    keep[np.argsort(sizes, kind="stable")[: round(sparsity * sizes.size)]] = 0
    borders = np.cumsum([weight.size for weight in weights])[:-1]
    parts = np.split(keep, borders)
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def sparse_bytes(weights: Weights, value_bits: int = 32) -> int:
    """Bytes of one bit per weight, and of the values that are not 0."""
    return sum(-(-w.size // 8) + int(np.count_nonzero(w)) * value_bits // 8 for w in weights)


def without_units(network: Perceptron, share: float) -> Perceptron:
    """A smaller network: the weakest share of each hidden layer's units is gone, and the matrices with it.

    A unit's strength is the norm of what goes in times the norm of what comes out; at least one unit stays.

    Raises:
        ConfigError: the share is not within 0 … 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"A share lies within 0 and 1; {share} does not.", where="share")
    weights, biases = weights_of(network), [np.array(layer.bias) for layer in network.layers]
    for number in range(len(weights) - 1):
        strength = np.linalg.norm(weights[number], axis=1) * np.linalg.norm(weights[number + 1], axis=0)
        num_kept = max(1, len(strength) - round(share * len(strength)))
        kept = np.sort(np.argsort(-strength, kind="stable")[:num_kept])
        weights[number], biases[number] = weights[number][kept], biases[number][kept]
        weights[number + 1] = weights[number + 1][:, kept]
    smaller = Perceptron([weights[0].shape[1], *(len(weight) for weight in weights)], seed=0)
    for layer, weight, bias in zip(smaller.layers, weights, biases, strict=True):
        layer.weight, layer.bias = mx.array(weight.astype(np.float32)), mx.array(bias)
    return smaller
