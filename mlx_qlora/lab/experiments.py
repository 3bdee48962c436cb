"""The topics on small trained networks: each is run on rows that the networks were not fitted to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.datasets import Split, holdout, splits
from mlx_qlora.lab.digits import TRAINING, digits_network, restored
from mlx_qlora.lab.finding import Finding, Table
from mlx_qlora.lab.integer_network import CALIBRATIONS, integer_network
from mlx_qlora.lab.networks import (
    Perceptron,
    Training,
    probabilities,
    scores,
    train,
    values_of,
    weights_of,
    with_weights,
)
from mlx_qlora.lab.w8a16 import quantize_linears
from mlx_qlora.lab.weight_schemes import SCHEMES

SIZES = {
    "iris": (4, 32, 32, 3),
    "wine": (13, 64, 32, 3),
    "breast-cancer": (30, 64, 32, 2),
    "digits": (64, 128, 64, 10),
    "mnist": (784, 128, 64, 10),
    "fashion-mnist": (784, 128, 64, 10),
    "cifar-10": (3072, 256, 64, 10),
}
"""Features, units, classes."""
PICTURES = ("mnist", "fashion-mnist", "cifar-10")
PICTURE_ROWS = 6000
SMALL = Training(num_updates=400, batch_size=32)


def networks(seed: int, datasets: tuple[str, ...] = ("iris", "wine", "breast-cancer", "digits")) -> Finding:
    """Accuracy and calibration before and after quantization of the weights, by cross-validation.

    Pictures from OpenML are tested on one held-out share of `PICTURE_ROWS` rows instead.

    Raises:
        ConfigError: there is no such data set, or scikit-learn is not installed.
        DataError: it is on OpenML, and OpenML cannot be reached.
    """
    rows: list[tuple[Any, ...]] = []
    if unknown := [name for name in datasets if name not in SIZES]:
        raise ConfigError(
            f"There is no data set {unknown[0]!r}; there are {', '.join(SIZES)}.", where="--data"
        )
    for name in datasets:
        rows += _quantized_networks(name, seed)
    float_rows = {row[0]: row for row in rows if row[1] == "float32"}
    harmless = [row for row in rows if row[1] == "int8 sym, channel"]
    worst = min(rows, key=lambda row: row[3] - float_rows[row[0]][3])
    moved = max(abs(row[3] - float_rows[row[0]][3]) for row in harmless)
    return Finding(
        "networks",
        "Small networks, before and after quantization of their weights",
        [
            Table(
                "Scores over all folds; every row is tested once, by a network that was not trained on it",
                ("data", "weights", "bits per weight", "accuracy", "calibration error", "NLL, nats",
                 "predictions changed"),
                rows,
                ("", "", ".2f", ".2%", ".4f", ".4f", ".2%"),
            )
        ],
        [
            f"int8 per channel moves no accuracy by more than {100 * moved:.2f} points, "
            f"and changes {max(row[6] for row in harmless):.2%} of predictions at most.",
            f"The worst is {worst[1]} on {worst[0]}: {float_rows[worst[0]][3]:.1%} before, "
            f"{worst[3]:.1%} after.",
            "Where a matrix has no more than 32 columns, a group of 32 is a channel.",
        ],
    )  # fmt: skip


def _quantized_networks(name: str, seed: int) -> list[tuple[Any, ...]]:
    """One row per scheme."""
    predicted: dict[str, list[np.ndarray]] = {}
    num_bytes: dict[str, int] = {}
    truth, num_weights = [], 0
    for number, data in enumerate(_folds(name, seed)):
        network = Perceptron(SIZES[name], seed + number)
        train(network, data, TRAINING if name in ("digits", *PICTURES) else SMALL, seed + number)
        truth.append(data.y_test)
        weights = weights_of(network)
        num_weights, num_bytes["float32"] = sum(w.size for w in weights), 4 * sum(w.size for w in weights)
        predicted.setdefault("float32", []).append(probabilities(network, data.x_test))
        for scheme in SCHEMES:
            pairs = [scheme.restored(weight) for weight in weights]
            with with_weights(network, [weight for weight, _ in pairs]):
                predicted.setdefault(scheme.name, []).append(probabilities(network, data.x_test))
            num_bytes[scheme.name] = sum(size for _, size in pairs)
    y = np.concatenate(truth)
    before = np.concatenate(predicted["float32"]).argmax(axis=1)
    rows = []
    for scheme_name, parts in predicted.items():
        shares = np.concatenate(parts)
        score = scores(shares, y)
        changed = float(np.mean(shares.argmax(axis=1) != before))
        rows.append((name, scheme_name, 8 * num_bytes[scheme_name] / num_weights, *values_of(score), changed))
    return rows


def _folds(name: str, seed: int) -> Iterable[Split]:
    if name in PICTURES:
        return [holdout(name, seed, num_rows=PICTURE_ROWS)]
    return splits(name, 3 if name == "digits" else 5, seed)


def eight_bit(seed: int) -> Finding:
    """The 8-bit quantizer on two models of different make."""
    data, network = digits_network(seed)
    with restored(network):
        before = scores(probabilities(network, data.x_test), data.y_test)
        logits = network(mx.array(data.x_test))
        mx.eval(logits)
        done = quantize_linears(network)
        after = scores(probabilities(network, data.x_test), data.y_test)
        digits_error = _relative(network(mx.array(data.x_test)), logits)
    encoder = nn.TransformerEncoder(num_layers=2, dims=64, num_heads=4, mlp_dims=128)
    rng = np.random.default_rng(seed)
    for layer in (module for _, module in encoder.named_modules() if type(module) is nn.Linear):
        layer.weight = mx.array(rng.normal(0, 0.1, layer.weight.shape).astype(np.float32))
    x = mx.array(rng.normal(0, 1, (2, 16, 64)).astype(np.float32))
    encoder.eval()
    wanted = encoder(x, None)
    mx.eval(wanted)
    done_too = quantize_linears(encoder, keep=lambda path, _: path.startswith("layers.0.linear"))
    rows = [
        ("digits perceptron", len(done.replaced), len(done.kept), done.bytes_before, done.bytes_after,
         digits_error, before.accuracy, after.accuracy),
        ("transformer encoder", len(done_too.replaced), len(done_too.kept), done_too.bytes_before,
         done_too.bytes_after, _relative(encoder(x, None), wanted), None, None),
    ]  # fmt: skip
    return Finding(
        "eight-bit",
        "The 8-bit quantizer for any model with linear layers (W8A16)",
        [
            Table(
                "int8 weights, one scale per output channel, activations as they are",
                ("model", "layers replaced", "kept", "bytes before", "bytes after",
                 "relative error of outputs", "accuracy before", "accuracy after"),
                rows,
                ("", "", "", ",d", ",d", ".2e", ".2%", ".2%"),
            )
        ],
        [
            f"The perceptron takes {done.bytes_after / done.bytes_before:.3f} of its bytes, and its logits "
            f"move by {digits_error:.2%}.",
            "The encoder's first block keeps its feed-forward layers: a filter over (path, layer) says so.",
        ],
    )  # fmt: skip


def activations(seed: int) -> Finding:
    """Integer networks: int8 weights, activations of few bits, ranges from calibration rows."""
    data, network = digits_network(seed)
    before = scores(probabilities(network, data.x_test), data.y_test)
    rows: list[tuple[Any, ...]] = [("float32", "none", *values_of(before))]
    for bits in (8, 6, 5, 4, 3):
        for calibration in CALIBRATIONS:
            # Training rows: a range from the test rows would know too much.
            integers = integer_network(network, data.x_train[:256], bits, calibration)
            rows.append(
                (
                    f"{bits} bits",
                    calibration,
                    *values_of(scores(integers.probabilities(data.x_test), data.y_test)),
                )
            )
    by_case = {row[:2]: row for row in rows}
    best = max(CALIBRATIONS, key=lambda name: by_case["4 bits", name][2])
    return Finding(
        "activations",
        "Activation calibration: integer products with int32 sums",
        [
            Table(
                f"Digits, {len(data.y_test)} test rows; int8 weights, ranges from 256 training rows",
                ("activations", "calibration", "accuracy", "calibration error", "NLL, nats"),
                rows,
                ("", "", ".2%", ".4f", ".4f"),
            )
        ],
        [
            f"With 8 bits over all that was seen accuracy is {by_case['8 bits', 'min-max'][2]:.2%}, "
            f"and {before.accuracy:.2%} in float.",
            f"With 4 bits {best} is best: {by_case['4 bits', best][2]:.2%} against "
            f"{by_case['4 bits', 'min-max'][2]:.2%} over all that was seen.",
        ],
        {"float_accuracy": before.accuracy},
    )


def _relative(got: mx.array, wanted: mx.array) -> float:
    return float(mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted))
