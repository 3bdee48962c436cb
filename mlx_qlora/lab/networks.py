"""Small networks: trained, asked for probabilities, and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_qlora.lab.datasets import Split

Loss = Callable[[mx.array, mx.array], mx.array]
"""Logits (B, classes) and numbers of the rows → mean loss."""
Weights = list[np.ndarray]


class Perceptron(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        """Layers from sizes[0] features to sizes[-1] logits; first weights are drawn by `seed` alone."""
        super().__init__()
        self.layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
        rng = np.random.default_rng(seed)
        for layer in self.layers:
            out, features = layer.weight.shape
            # He et al. 2015, for ReLU. Not MLX's generator: its state is the whole process's.
            drawn = rng.normal(0, np.sqrt(2 / features), (out, features))
            layer.weight, layer.bias = mx.array(drawn.astype(np.float32)), mx.zeros(out)

    def __call__(self, x: mx.array) -> mx.array:
        """Logits (B, classes)."""
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


@dataclass(frozen=True)
class Training:
    """How a small network is trained."""

    num_updates: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class Scores:
    """How good probabilities are on rows they were not fitted to."""

    accuracy: float
    calibration_error: float
    """Expected calibration error, 15 bins: how far confidence is from accuracy on average."""
    nll_nats: float
    """Mean negative log-likelihood of the true class."""


def train(
    network: nn.Module,
    data: Split,
    training: Training,
    seed: int,
    *,
    loss: Loss | None = None,
    masks: Sequence[mx.array] | None = None,
) -> None:
    """Fit `network` in place by AdamW; the rows' order is drawn by `seed`.

    Args:
        loss: None is cross-entropy with the classes.
        masks: One per layer; where one is 0 the weight is held at 0.
    """
    x, y = mx.array(data.x_train), mx.array(data.y_train)
    loss_of = loss or (lambda logits, rows: nn.losses.cross_entropy(logits, y[rows], reduction="mean"))
    rate = optim.cosine_decay(training.learning_rate, training.num_updates)
    optimizer = optim.AdamW(rate, weight_decay=training.weight_decay, bias_correction=True)
    optimizer.init(network.trainable_parameters())
    loss_and_grad = nn.value_and_grad(network, lambda rows: loss_of(network(x[rows]), rows))
    state = [network.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(rows: mx.array) -> mx.array:
        value, gradients = loss_and_grad(rows)
        optimizer.update(network, gradients)
        for layer, mask in zip(network.layers, masks or (), strict=False):
            layer.weight = layer.weight * mask
        return value

    for rows in islice(_batches(len(data.y_train), training, seed), training.num_updates):
        step(mx.array(rows))
        mx.eval(state)


def _batches(num_rows: int, training: Training, seed: int) -> Iterator[np.ndarray]:
    """Whole batches only: one shape is traced once. The rest has its turn in another epoch's order."""
    rng, size = np.random.default_rng([seed, 1]), min(training.batch_size, num_rows)
    while True:
        order = rng.permutation(num_rows).astype(np.int32)
        yield from order[: num_rows // size * size].reshape(-1, size)


def probabilities(network: nn.Module, x: np.ndarray) -> np.ndarray:
    """Of each class, (rows, classes), float64."""
    return softmax(np.array(network(mx.array(x)), np.float64))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def scores(probabilities: np.ndarray, y: np.ndarray) -> Scores:
    """Accuracy, calibration and likelihood of predictions (rows, classes) against classes (rows,)."""
    chosen = probabilities.argmax(axis=1)
    likelihood = np.maximum(probabilities[np.arange(len(y)), y], 1e-12)
    return Scores(
        accuracy=float(np.mean(chosen == y)),
        calibration_error=calibration_error(probabilities.max(axis=1), chosen == y),
        nll_nats=float(-np.mean(np.log(likelihood))),
    )


def values_of(score: Scores) -> tuple[float, float, float]:
    """Accuracy, calibration error and NLL, as tables have them."""
    return score.accuracy, score.calibration_error, score.nll_nats


def calibration_error(confidence: np.ndarray, is_right: np.ndarray, num_bins: int = 15) -> float:
    """Σ share of rows in a bin · |mean confidence − accuracy| over bins of equal width.

    Source: Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=confidence - is_right.astype(float), minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def weights_of(network: nn.Module) -> Weights:
    """The weight matrices, (out, in), float64; biases stay in the network."""
    return [np.array(layer.weight, np.float64) for layer in network.layers]


@contextmanager
def with_weights(network: nn.Module, weights: Weights) -> Iterator[nn.Module]:
    """The network with other weight matrices while this is open."""
    before = [layer.weight for layer in network.layers]
    try:
        for layer, weight in zip(network.layers, weights, strict=True):
            layer.weight = mx.array(weight.astype(np.float32))
        yield network
    finally:
        for layer, weight in zip(network.layers, before, strict=True):
            layer.weight = weight


def num_parameters(network: nn.Module) -> int:
    """Weights and biases."""
    return sum(layer.weight.size + layer.bias.size for layer in network.layers)
