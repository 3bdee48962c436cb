"""How much each layer suffers from each format, measured; and the choice that a number of bytes allows.

A layer's relative error in a format is ‖W − Ŵ‖² / ‖W‖² or, where inputs X of it are at hand, that of its
outputs, ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖². Its error is this times its importance; a choice's error, the sum over layers.
Where nothing else is known, the importance is ‖W‖², so that what is lost counts alike wherever it is lost.
`importances` measures what the loss does to the answers of the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.schemes import Scheme

BLOCK_BYTES = 8 * 1024**2
"""Of a weight in float32: what is in memory at a time, three or four times."""
MAX_CELLS = 2**16
"""Sizes that the choice tells apart. With fewer distinct sizes than this it is the best there is; else each
layer's size is rounded up, to a multiple of 1/65536 of what all layers together can grow by."""

RoundTrip = Callable[[mx.array, Scheme], mx.array]
"""(rows, scheme) → the rows as they come back from that format, in float32."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer that could be stored in several formats."""

    path: str
    read: Callable[[int, int], mx.array]
    """Rows [first, last) of its weight as a matrix; called in order, each row once."""
    shape: tuple[int, int]
    stored_bytes: Mapping[Scheme, int]
    """The formats it could have, and what it takes in each."""


@dataclass(frozen=True)
class Option:
    """One format of one layer."""

    scheme: Scheme
    stored_bytes: int
    error: float
    """Relative squared error times the layer's importance."""


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer with the error of each format it could have."""

    path: str
    options: tuple[Option, ...]


def measure(
    layer: LayerWeights,
    inputs: mx.array | None = None,
    importance: float | None = None,
    round_trip: RoundTrip | None = None,
) -> MeasuredLayer:
    """The error of a layer in each of its formats, some rows at a time.

    Args:
        inputs: What it was given in calibration, (number of vectors, input features); None measures the
            weight itself.
        importance: Of the layer; None is the squared norm of its weight.
        round_trip: None is `there_and_back`.
    """
    back = there_and_back if round_trip is None else round_trip
    schemes = list(layer.stored_bytes)
    rows, width = layer.shape
    x_NI = None if inputs is None else inputs.astype(mx.float32)
    energy, size, lost = 0.0, 0.0, [0.0] * len(schemes)
    block = max(1, BLOCK_BYTES // (4 * width))
    for first in range(0, rows, block):
        w_OI = layer.read(first, min(first + block, rows))
        energy += _energy(w_OI.astype(mx.float32), None)
        size += _energy(w_OI.astype(mx.float32), x_NI)
        for index, scheme in enumerate(schemes):
            lost[index] += _energy(w_OI.astype(mx.float32) - back(w_OI, scheme), x_NI)
    factor = energy if importance is None else importance
    options = [
        Option(scheme, layer.stored_bytes[scheme], factor * each / size if size else 0.0)
        for scheme, each in zip(schemes, lost, strict=True)
    ]
    return MeasuredLayer(layer.path, tuple(options))


def importances(model: nn.Module, batches: Sequence[mx.array], scheme: Scheme) -> dict[str, float]:
    """Path → how much the model's answers change for each unit of relative error of that layer's weight.

    One layer at a time is taken there and back in `scheme`; the change is the mean Kullback-Leibler
    divergence from the model as it is, in nats per token. There are as many passes over `batches` as layers,
    and one more; the model ends as it began.

    Args:
        model: Unquantized, in memory.
        batches: Tokens, (B, T), such as the model is used on.
        scheme: A coarse one, int3 say, so that the change is not lost in rounding.
    """
    expected = [_log_probabilities(model, tokens_BT) for tokens_BT in batches]
    mx.eval(expected)
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % scheme.group_size:
            continue
        exact = module.weight
        back = there_and_back(exact.reshape(-1, exact.shape[-1]), scheme).reshape(exact.shape)
        module.weight = back.astype(exact.dtype)
        try:
            change = sum(
                _divergence(p_BTV, _log_probabilities(model, tokens_BT))
                for p_BTV, tokens_BT in zip(expected, batches, strict=True)
            )
        finally:
            module.weight = exact
        size = _energy(exact.astype(mx.float32), None)
        lost = _energy(exact.astype(mx.float32) - back, None)
        tokens = sum(tokens_BT.size for tokens_BT in batches)
        found[path] = max(change, 0.0) / tokens * size / lost if lost else 0.0
    return found


def _divergence(p_BTV: mx.array, q_BTV: mx.array) -> float:
    """Kullback-Leibler divergence of q from p, both as logarithms, summed over tokens."""
    return float((mx.exp(p_BTV) * (p_BTV - q_BTV)).sum().item())  # type: ignore[arg-type]  # never complex


def _log_probabilities(model: nn.Module, tokens_BT: mx.array) -> mx.array:
    logits_BTV = model(tokens_BT).astype(mx.float32)
    return logits_BTV - mx.logsumexp(logits_BTV, axis=-1, keepdims=True)


def there_and_back(rows: mx.array, scheme: Scheme) -> mx.array:
    """`rows` quantized and unpacked again, in float32.

    Double quantization has one mean for a whole weight; here it is that of `rows`, hundreds of blocks.
    """
    if scheme.mode in nf4.MODES:
        codes, absmax = nf4.quantize(rows, scheme.group_size)
        if nf4.is_double(scheme.mode):
            absmax = nf4.dequantize_absmax(*nf4.quantize_absmax(absmax))
        return nf4.dequantize(codes, absmax, rows.shape)
    packed = mx.quantize(rows, scheme.group_size, scheme.bits, mode=scheme.mode)
    weight, scales, biases = packed if len(packed) > 2 else (*packed, None)
    back = mx.dequantize(weight, scales, biases, scheme.group_size, scheme.bits, mode=scheme.mode)
    return back.astype(mx.float32)


def choose(layers: Sequence[MeasuredLayer], budget_bytes: int) -> dict[str, Option]:
    """The format of each layer, so that all take `budget_bytes` at most and the error is least.

    The same layers give the same choice, and a larger budget never more error. It is the best choice if the
    layers' sizes are multiples of a common unit, at most `MAX_CELLS` of them; as the layers of a transformer
    are. Otherwise, with unit u, it is as good as the best within `budget_bytes` − (number of layers) · u.

    Raises:
        ConfigError: the smallest formats take more.

    Source: multiple-choice knapsack by dynamic programming; Kellerer et al. 2004, Knapsack Problems, 11.5.
    """
    floor = sum(min(option.stored_bytes for option in layer.options) for layer in layers)
    if floor > budget_bytes:
        raise ConfigError(
            f"The smallest formats of {len(layers)} layers take {floor} bytes, not {budget_bytes}.",
            where="quantization.bits_per_weight",
        )
    options = [
        sorted(layer.options, key=lambda option: (option.stored_bytes, option.error)) for layer in layers
    ]
    extras = [[option.stored_bytes - own[0].stored_bytes for option in own] for own in options]
    unit, num_cells = _grid(extras)
    steps = [[-(-extra // unit) for extra in own] for own in extras]
    room = min((budget_bytes - floor) // unit, num_cells)
    least, picked = np.zeros(room + 1), []
    for own, sizes in zip(options, steps, strict=True):
        by_option = np.full((len(own), room + 1), np.inf)
        for index, (option, size) in enumerate(zip(own, sizes, strict=True)):
            if size <= room:
                by_option[index, size:] = least[: room + 1 - size] + option.error
        picked.append(by_option.argmin(axis=0).astype(np.uint8))  # of two equal ones the smaller
        least = by_option.min(axis=0)
    cell, chosen = room, {}
    for layer, own, sizes, best in reversed(list(zip(layers, options, steps, picked, strict=True))):
        chosen[layer.path] = own[best[cell]]
        cell -= sizes[best[cell]]
    return {layer.path: chosen[layer.path] for layer in layers}


def _grid(extras: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The unit of sizes, and how many of it all layers together can grow by. Budgets have no say in it."""
    exact = math.gcd(*(extra for own in extras for extra in own)) or 1
    most = sum(max(own) for own in extras)
    unit = exact * max(1, -(-most // (exact * MAX_CELLS)))
    return unit, sum(-(-max(own) // unit) for own in extras)


def _energy(w_OI: mx.array, x_NI: mx.array | None) -> float:
    """Squared norm of the weight, or of what it makes of the inputs."""
    total = (w_OI if x_NI is None else x_NI @ w_OI.T).square().sum()
    return float(total.item())  # type: ignore[arg-type]  # never complex
