"""The topics on pruning and distillation, and the three pillars together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.lab.datasets import Split
from mlx_qlora.lab.digits import FINE_TUNING, digits_network, restored, teacher_networks
from mlx_qlora.lab.distillation import distillation_loss, ensemble_logits
from mlx_qlora.lab.finding import Finding, Table
from mlx_qlora.lab.networks import (
    Perceptron,
    Scores,
    Training,
    Weights,
    num_parameters,
    probabilities,
    scores,
    train,
    values_of,
    weights_of,
    with_weights,
)
from mlx_qlora.lab.pruning import magnitude_masks, sparse_bytes, without_units
from mlx_qlora.lab.weight_schemes import linear_scheme

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SHARES_OF_UNITS = (0.0, 0.25, 0.5, 0.75, 0.9)


def pruning(seed: int) -> Finding:
    """Single weights by magnitude, and whole units, each once as cut and once tuned after."""
    data, network = digits_network(seed)
    single: list[tuple[Any, ...]] = []
    for sparsity in SPARSITIES:
        cut = pruned_weights(network, sparsity)
        with with_weights(network, cut):
            as_cut = _scored(network, data)
        with tuned_pruned(network, data, sparsity, seed) as tuned:
            after = _scored(tuned, data)
        single.append((sparsity, as_cut.accuracy, after.accuracy, after.calibration_error, sparse_bytes(cut)))
    units: list[tuple[Any, ...]] = []
    for share in SHARES_OF_UNITS:
        smaller = without_units(network, share)
        as_cut = _scored(smaller, data)
        train(smaller, data, FINE_TUNING, seed)
        after = _scored(smaller, data)
        units.append(
            (share, as_cut.accuracy, after.accuracy, after.calibration_error, 4 * num_parameters(smaller))
        )
    by_sparsity, by_share = {row[0]: row for row in single}, {row[0]: row for row in units}
    columns = ("accuracy as cut", "accuracy tuned", "calibration error tuned", "bytes")
    formats = (".0%", ".2%", ".2%", ".4f", ",d")
    dense = sparse_bytes(weights_of(network))
    return Finding(
        "pruning",
        "Pruning: the second pillar",
        [
            Table("Weights of least magnitude, over all layers", ("removed", *columns), single, formats),
            Table("Weakest units of each hidden layer", ("removed", *columns), units, formats),
        ],
        [
            f"Without 90 % of the weights accuracy is {by_sparsity[0.9][1]:.1%}, and "
            f"{by_sparsity[0.9][2]:.1%} once tuned; before it was {by_sparsity[0.0][1]:.1%}. "
            f"A mask and the values take {by_sparsity[0.9][4] / dense:.2f} of the bytes.",
            f"Tuning alone, with nothing cut, gives {by_sparsity[0.0][2]:.1%}: compare to that.",
            f"Without half the units it is {by_share[0.5][1]:.1%} and {by_share[0.5][2]:.1%}, in "
            f"{by_share[0.5][4] / by_share[0.0][4]:.2f} of the bytes, and still dense matrices.",
        ],
    )


def pruned_weights(network: Perceptron, sparsity: float) -> Weights:
    """The network's weights, the smallest set to 0."""
    weights = weights_of(network)
    return [weight * mask for weight, mask in zip(weights, magnitude_masks(weights, sparsity), strict=True)]


@contextmanager
def tuned_pruned(network: Perceptron, data: Split, sparsity: float, seed: int) -> Iterator[Perceptron]:
    """The network pruned and trained on, what was cut held at 0; as before when this is closed."""
    with restored(network):
        masks = [mx.array(mask.astype(np.float32)) for mask in magnitude_masks(weights_of(network), sparsity)]
        for layer, mask in zip(network.layers, masks, strict=True):
            layer.weight = layer.weight * mask
        train(network, data, FINE_TUNING, seed, masks=masks)
        yield network


UNITS = (4, 8, 16)
STUDENTS = Training(num_updates=1200, batch_size=64)
TEMPERATURE, SOFT_SHARE = 3.0, 0.9
NUM_STUDENTS = 4


def distillation(seed: int) -> Finding:
    """Small students, by labels alone and by three teachers' soft answers, over several seeds."""
    data, _ = digits_network(seed)
    teachers = teacher_networks(seed)
    soft = ensemble_logits(teachers, data.x_train)
    taught = np.array(nn.softmax(ensemble_logits(teachers, data.x_test)), np.float64)
    teacher = scores(taught, data.y_test)
    rows: list[tuple[Any, ...]] = []
    gains, errors = {}, {}
    for units in UNITS:
        sets: dict[str, list[Scores]] = {"labels": [], "distilled": []}
        for number in range(NUM_STUDENTS):
            for way in sets:
                student = student_network(data, units, seed + number, soft if way == "distilled" else None)
                sets[way].append(_scored(student, data))
        for way, found in sets.items():
            accuracies = [score.accuracy for score in found]
            rows.append(
                (units, way, float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)),
                 float(np.mean([score.calibration_error for score in found])),
                 float(np.mean([score.nll_nats for score in found])))
            )  # fmt: skip
        gains[units] = rows[-1][2] - rows[-2][2]
        errors[units] = float(np.hypot(rows[-1][3], rows[-2][3]) / np.sqrt(NUM_STUDENTS))
    said = ", ".join(
        f"{100 * gain:+.1f} ± {100 * errors[units]:.1f} points with {units} units"
        for units, gain in gains.items()
    )
    is_clear = any(abs(gain) > 2 * errors[units] for units, gain in gains.items())
    return Finding(
        "distillation",
        "Distillation: the third pillar",
        [
            Table(
                f"Students of one hidden layer on digits, {NUM_STUDENTS} seeds each; τ = {TEMPERATURE:g}",
                ("units", "taught by", "accuracy", "deviation over seeds", "calibration error", "NLL, nats"),
                rows,
                ("", "", ".2%", ".2%", ".4f", ".4f"),
            )
        ],
        [
            f"The three teachers together have {teacher.accuracy:.2%}.",
            f"Distillation changes the mean accuracy by {said}; both ways see the same rows as often.",
            ("At least one of these is" if is_clear else "None of these is")
            + " more than twice its standard error.",
        ],
        {"teacher_accuracy": teacher.accuracy},
    )


def student_network(data: Split, units: int, seed: int, soft: mx.array | None) -> Perceptron:
    """A network of one hidden layer, trained by labels, or by a teacher's logits too."""
    student = Perceptron((data.x_train.shape[1], units, data.num_classes), seed)
    loss = None if soft is None else distillation_loss(soft, mx.array(data.y_train), TEMPERATURE, SOFT_SHARE)
    train(student, data, STUDENTS, seed, loss=loss)
    return student


def pillars(seed: int) -> Finding:
    """Quantization, pruning and distillation side by side, and one on top of the other."""
    data, network = digits_network(seed)
    rows: list[tuple[Any, ...]] = []
    biases = 4 * sum(int(layer.bias.size) for layer in network.layers)

    def add(name: str, pillar: str, network: Perceptron, weights: Weights, num_bytes: int) -> None:
        with with_weights(network, weights):
            rows.append((name, pillar, num_bytes, *values_of(_scored(network, data))))

    weights = weights_of(network)
    add("float32", "none", network, weights, 4 * sum(w.size for w in weights) + biases)
    for bits in (8, 4, 2):
        quantized, size = _stored(weights, bits)
        add(f"int{bits}", "quantized", network, quantized, size + biases)
    for sparsity in (0.8, 0.9):
        with tuned_pruned(network, data, sparsity, seed) as cut:
            kept = weights_of(cut)
            add(f"{sparsity:.0%} cut", "pruned", cut, kept, sparse_bytes(kept) + biases)
            quantized, _ = _stored(kept, 8)  # per channel, and 0 stays 0
            scales = 2 * sum(len(w) for w in kept)
            size = sparse_bytes(quantized, value_bits=8) + scales + biases
            add(f"{sparsity:.0%} cut, int8", "pruned + quantized", cut, quantized, size)
    soft = ensemble_logits(teacher_networks(seed), data.x_train)
    student = student_network(data, 16, seed, soft)
    small, student_biases = weights_of(student), 4 * sum(int(layer.bias.size) for layer in student.layers)
    add("student of 16", "distilled", student, small, 4 * sum(w.size for w in small) + student_biases)
    for bits in (8, 4):
        quantized, size = _stored(small, bits)
        add(f"student of 16, int{bits}", "distilled + quantized", student, quantized, size + student_biases)
    close = [row for row in rows if row[3] >= rows[0][3] - 0.01]
    smallest = min(close, key=lambda row: row[2])
    return Finding(
        "pillars",
        "The three pillars together",
        [
            Table(
                f"Digits, {len(data.y_test)} test rows; bytes of packed weights, scales, masks and biases",
                ("model", "pillar", "bytes", "accuracy", "calibration error", "NLL, nats"),
                rows,
                ("", "", ",d", ".2%", ".4f", ".4f"),
            )
        ],
        [
            f"The smallest within one point of the float network is {smallest[0]}: {smallest[2]:,d} bytes, "
            f"{smallest[2] / rows[0][2]:.3f} of the whole, at {smallest[3]:.2%} against {rows[0][3]:.2%}."
        ],
    )


def _scored(network: Perceptron, data: Split) -> Scores:
    return scores(probabilities(network, data.x_test), data.y_test)


def _stored(weights: Weights, bits: int) -> tuple[Weights, int]:
    """What comes back from linear codes, and their bytes: per channel with 8 bits, else per group."""
    scheme = linear_scheme(bits, "channel" if bits == 8 else "group")
    pairs = [scheme.restored(weight) for weight in weights]
    return [weight for weight, _ in pairs], sum(size for _, size in pairs)
