"""The network that several topics start from, and the ways it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from mlx_qlora.lab.datasets import Split, holdout
from mlx_qlora.lab.networks import Perceptron, Training, train

SIZES = (64, 128, 64, 10)
"""Features, units, classes."""
TRAINING = Training(num_updates=800, batch_size=64)
FINE_TUNING = Training(num_updates=500, batch_size=64, learning_rate=1e-3)


@lru_cache(maxsize=2)
def digits_network(seed: int) -> tuple[Split, Perceptron]:
    """The digits' split and the network that several topics start from; whoever changes it puts it back."""
    data = holdout("digits", seed)
    network = Perceptron(SIZES, seed)
    train(network, data, TRAINING, seed)
    return data, network


@lru_cache(maxsize=2)
def teacher_networks(seed: int) -> tuple[Perceptron, ...]:
    """Three networks that differ in their first weights and orders; the first is `digits_network`'s."""
    data, first = digits_network(seed)
    others = [Perceptron(SIZES, seed + number) for number in (100, 101)]
    for number, network in enumerate(others):
        train(network, data, TRAINING, seed + 100 + number)
    return (first, *others)


@contextmanager
def restored(network: Perceptron) -> Iterator[None]:
    """The layers and parameters as they are now, when this is closed."""
    layers, parameters = list(network.layers), [(layer.weight, layer.bias) for layer in network.layers]
    try:
        yield
    finally:
        network.layers = layers
        for layer, (weight, bias) in zip(layers, parameters, strict=True):
            layer.weight, layer.bias = weight, bias
