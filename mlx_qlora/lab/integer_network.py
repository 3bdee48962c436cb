"""Networks that multiply codes, and the calibration of their activations' ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.accumulators import integer_product
from mlx_qlora.lab.linear import LinearCodes, LinearScheme, quantize
from mlx_qlora.lab.networks import Perceptron, softmax, weights_of

Calibration = Literal["min-max", "percentile", "least error"]
CALIBRATIONS: tuple[Calibration, ...] = ("min-max", "percentile", "least error")


@dataclass(frozen=True)
class IntegerNetwork:
    """A perceptron that multiplies codes: int8 weights per channel, activations by known ranges."""

    weights: tuple[LinearCodes, ...]
    biases: tuple[np.ndarray, ...]
    limits: tuple[tuple[float, float], ...]
    """The range of each layer's input."""
    activation_bits: int

    def logits(self, x: np.ndarray) -> np.ndarray:
        """(rows, classes), from integer products with int32 sums."""
        scheme = LinearScheme(self.activation_bits, is_symmetric=False, per="tensor")
        last = len(self.weights) - 1
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = integer_product(quantize(x, scheme, self.limits[number]), weight) + bias
            x = x if number == last else np.maximum(x, 0)
        return x

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Of each class, (rows, classes)."""
        return softmax(self.logits(x))


def integer_network(
    network: Perceptron, x: np.ndarray, activation_bits: int, calibration: Calibration
) -> IntegerNetwork:
    """Weights to int8 per channel; the ranges of activations from rows `x` that stand for those to come."""
    biases = tuple(np.array(layer.bias, np.float64) for layer in network.layers)
    limits = tuple(
        activation_range(inputs, activation_bits, calibration) for inputs in layer_inputs(network, x)
    )
    weights = tuple(quantize(weight, LinearScheme(8)) for weight in weights_of(network))
    return IntegerNetwork(weights, biases, limits, activation_bits)


def layer_inputs(network: Perceptron, x: np.ndarray) -> list[np.ndarray]:
    """What each linear layer gets to see, (rows, features)."""
    inputs, last = [], len(network.layers) - 1
    hidden = mx.array(x.astype(np.float32))
    for number, layer in enumerate(network.layers):
        inputs.append(np.array(hidden, np.float64))
        hidden = layer(hidden) if number == last else nn.relu(layer(hidden))
    return inputs


def activation_range(values: np.ndarray, bits: int, calibration: Calibration) -> tuple[float, float]:
    """The range to cover: all that was seen; all but 1 in 1,000 at either end; or that of the least error.

    Raises:
        ConfigError: there is no such calibration.
    """
    low, high = float(values.min()), float(values.max())
    if calibration == "min-max":
        return low, high
    if calibration == "percentile":
        return float(np.quantile(values, 0.001)), float(np.quantile(values, 0.999))
    if calibration != "least error":
        raise ConfigError(f"There is no calibration {calibration!r}.", where="calibration")
    scheme = LinearScheme(bits, is_symmetric=False, per="tensor")
    tried = [(low * share, high * share) for share in np.linspace(0.2, 1.0, 33)]

    def error(limits: tuple[float, float]) -> float:
        return float(np.square(quantize(values, scheme, limits).dequantized() - values).sum())

    return min(tried, key=error)
