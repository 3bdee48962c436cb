"""lab/networks.py, lab/weight_schemes.py, lab/integer_network.py, lab/pruning.py, lab/distillation.py"""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.datasets import Split
from mlx_qlora.lab.distillation import distillation_loss, ensemble_logits
from mlx_qlora.lab.integer_network import CALIBRATIONS, activation_range, integer_network, layer_inputs
from mlx_qlora.lab.linear import LinearScheme, quantize
from mlx_qlora.lab.networks import (
    Perceptron,
    Training,
    calibration_error,
    num_parameters,
    probabilities,
    scores,
    softmax,
    train,
    weights_of,
    with_weights,
)
from mlx_qlora.lab.pruning import magnitude_masks, sparse_bytes, without_units
from mlx_qlora.lab.weight_schemes import SCHEMES

QUICK = Training(num_updates=150, batch_size=32, learning_rate=1e-2)


def two_rings(seed=0, num_rows=300):
    """Two classes that no straight line parts."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, num_rows).astype(np.int32)
    angle, radius = rng.uniform(0, 2 * np.pi, num_rows), 0.5 + y + rng.normal(0, 0.1, num_rows)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)
    return Split("rings", x[:200], y[:200], x[200:], y[200:], 2)


@pytest.fixture(scope="module")
def trained():
    data, network = two_rings(), Perceptron((2, 24, 16, 2), seed=1)
    train(network, data, QUICK, seed=1)
    return data, network


def test_training_learns_what_it_could_not_know(trained):
    data, network = trained
    fresh = scores(probabilities(Perceptron((2, 24, 16, 2), seed=1), data.x_test), data.y_test)
    found = scores(probabilities(network, data.x_test), data.y_test)
    assert found.accuracy > 0.95 > fresh.accuracy
    assert found.nll_nats < fresh.nll_nats


def test_a_seed_gives_the_same_network_whatever_the_global_generator_did(trained):
    data, network = trained
    mx.random.seed(99)
    again = Perceptron((2, 24, 16, 2), seed=1)
    train(again, data, QUICK, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(again), weights_of(network), strict=True))
    other = Perceptron((2, 24, 16, 2), seed=2)
    assert not np.array_equal(weights_of(other)[0], weights_of(Perceptron((2, 24, 16, 2), seed=1))[0])


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    # Bin (0.933, 1]: |0.95 − 0.5|; bin (0.533, 0.6]: |0.55 − 1|.
    assert calibration_error(confidence, np.array([True, False, True, True])) == pytest.approx(0.45)
    assert calibration_error(np.ones(5), np.ones(5, bool)) == 0
    # Neighbours among 15 bins, which would make up for each other in one.
    assert calibration_error(np.array([0.55, 0.62]), np.array([True, False])) == pytest.approx(0.535)


def test_scores_by_hand():
    shares = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    found = scores(shares, np.array([0, 1, 1]))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.nll_nats == pytest.approx(-np.log([0.8, 0.6, 0.1]).mean())


def test_other_weights_are_in_place_only_while_they_are_asked_for(trained):
    data, network = trained
    before = probabilities(network, data.x_test)
    with with_weights(network, [np.zeros_like(w) for w in weights_of(network)]):
        assert np.ptp(probabilities(network, data.x_test), axis=0).max() == 0
    assert np.array_equal(probabilities(network, data.x_test), before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_scheme_brings_weights_back_from_the_bytes_it_counts(scheme):
    weight = np.random.default_rng(0).normal(0, 0.1, (48, 64))
    restored, num_bytes = scheme.restored(weight)
    bits = int(re.search(r"(?:int|NF)(\d)|(\d) bits", scheme.name).expand(r"\1\2"))
    error = np.linalg.norm(restored - weight) / np.linalg.norm(weight)
    assert restored.shape == weight.shape
    assert error < {8: 0.02, 4: 0.2, 3: 0.45, 2: 0.95}[bits]
    assert weight.size * bits / 8 < num_bytes <= weight.size * (bits + 1) / 8


def test_eight_bits_and_groups_err_least():
    weight = np.random.default_rng(0).normal(0, 0.1, (48, 64))
    errors = {s.name: np.linalg.norm(s.restored(weight)[0] - weight) for s in SCHEMES}
    for per in ("tensor", "channel", "group 32"):
        by_bits = [errors[f"int{bits} sym, {per}"] for bits in (8, 4, 3, 2)]
        assert by_bits == sorted(by_bits)
    assert errors["int4 sym, group 32"] < errors["int4 sym, channel"] < errors["int4 sym, tensor"]
    assert errors["k-means 4 bits"] < errors["int4 sym, tensor"]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_an_integer_network_computes_what_its_codes_stand_for(trained, calibration):
    data, network = trained
    integers = integer_network(network, data.x_train, 8, calibration)
    x = data.x_test.astype(np.float64)
    scheme = LinearScheme(8, False, "tensor")
    for number, (weight, bias) in enumerate(zip(integers.weights, integers.biases, strict=True)):
        x = quantize(x, scheme, integers.limits[number]).dequantized() @ weight.dequantized().T + bias
        x = x if number == 2 else np.maximum(x, 0)
    assert integers.logits(data.x_test) == pytest.approx(x, rel=1e-9, abs=1e-9)
    accuracy = scores(integers.probabilities(data.x_test), data.y_test).accuracy
    assert accuracy == pytest.approx(
        scores(probabilities(network, data.x_test), data.y_test).accuracy, abs=0.03
    )


def test_layers_inputs_lead_to_the_networks_own_logits(trained):
    data, network = trained
    last = layer_inputs(network, data.x_test)[-1]
    logits = last @ weights_of(network)[-1].T + np.array(network.layers[-1].bias)
    assert softmax(logits) == pytest.approx(probabilities(network, data.x_test), abs=1e-5)


def test_calibration_looks_away_from_outliers_where_it_is_told_to():
    values = np.append(np.random.default_rng(0).normal(0, 1, 10_000), [500.0])
    scheme, errors = LinearScheme(4, False, "tensor"), {}
    for calibration in CALIBRATIONS:
        limits = activation_range(values, 4, calibration)
        errors[calibration] = np.square(quantize(values, scheme, limits).dequantized() - values).sum()
    assert activation_range(values, 4, "min-max") == (values.min(), 500.0)
    assert activation_range(values, 4, "percentile")[1] < 5
    assert errors["least error"] <= errors["min-max"]
    with pytest.raises(ConfigError, match="no calibration"):
        activation_range(values, 4, "median")


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_pruning_removes_the_smallest_share_over_all_layers(trained, sparsity):
    weights = weights_of(trained[1])
    masks = magnitude_masks(weights, sparsity)
    total, kept = sum(w.size for w in weights), sum(int(mask.sum()) for mask in masks)
    assert total - kept == round(sparsity * total)
    flat = np.abs(np.concatenate([w.reshape(-1) for w in weights]))
    flags = np.concatenate([mask.reshape(-1) for mask in masks]).astype(bool)
    if 0 < sparsity < 1:
        assert flat[~flags].max() <= flat[flags].min()


def test_what_was_pruned_stays_zero_while_the_rest_is_tuned(trained):
    data, _ = trained
    network = Perceptron((2, 24, 16, 2), seed=1)
    masks = magnitude_masks(weights_of(network), 0.5)
    train(network, data, QUICK, 1, masks=[mx.array(mask.astype(np.float32)) for mask in masks])
    for weight, mask in zip(weights_of(network), masks, strict=True):
        assert (weight[mask == 0] == 0).all()
        assert (weight[mask == 1] != 0).all()


def test_sparse_bytes_are_a_bit_a_weight_and_the_values():
    assert sparse_bytes([np.array([[0, 1.0, 0, 2.0, 0]])]) == 1 + 2 * 4
    assert sparse_bytes([np.array([[0, 1.0, 0, 2.0, 0]])], value_bits=8) == 1 + 2


def test_removing_units_makes_smaller_matrices_and_none_changes_nothing(trained):
    data, network = trained
    same = without_units(network, 0.0)
    assert probabilities(same, data.x_test) == pytest.approx(probabilities(network, data.x_test), abs=1e-6)
    smaller = without_units(network, 0.5)
    assert [w.shape for w in weights_of(smaller)] == [(12, 2), (8, 12), (2, 8)]
    assert num_parameters(smaller) == 12 * 2 + 12 + 8 * 12 + 8 + 2 * 8 + 2
    assert [len(w) for w in weights_of(without_units(network, 1.0))] == [1, 1, 2]


def test_dead_units_go_first_and_are_not_missed():
    network, x = Perceptron((2, 24, 3), seed=4), two_rings().x_test
    weights = weights_of(network)
    weights[0][5:15] *= 100  # large, but nothing comes out of them
    weights[1][:, 5:15] = 0
    with with_weights(network, weights):
        before = probabilities(network, x)
        smaller = without_units(network, 10 / 24)
    assert np.allclose(weights_of(smaller)[0], np.delete(weights[0], range(5, 15), axis=0))
    assert probabilities(smaller, x) == pytest.approx(before, abs=1e-5)


def test_distillation_is_zero_where_the_student_is_the_teacher_and_gradients_keep_their_size():
    logits = mx.random.normal((6, 4), key=mx.random.key(0))
    rows, classes = mx.arange(6), mx.array([0, 1, 2, 3, 0, 1])
    assert distillation_loss(logits, classes, 3.0, 1.0)(logits, rows).item() == pytest.approx(0, abs=1e-6)
    student = mx.random.normal((6, 4), key=mx.random.key(1))
    # For large τ the gradient is that of half the squared distance of centred logits, over the classes.
    gradient = mx.grad(distillation_loss(logits, classes, 1000.0, 1.0))(student, rows)
    centred = [x - x.mean(axis=-1, keepdims=True) for x in (student, logits)]
    assert mx.allclose(gradient, (centred[0] - centred[1]) / 4 / 6, atol=1e-3)


def test_without_soft_answers_distillation_is_cross_entropy_and_rows_pick_their_teacher():
    logits, classes = mx.random.normal((6, 4), key=mx.random.key(0)), mx.array([0, 1, 2, 3, 0, 1])
    student, rows = mx.random.normal((2, 4), key=mx.random.key(1)), mx.array([4, 2])
    plain = nn.losses.cross_entropy(student, classes[rows], reduction="mean").item()
    assert distillation_loss(logits, classes, 3.0, 0.0)(student, rows).item() == pytest.approx(
        plain, rel=1e-5
    )
    soft, taught = (np.array(nn.softmax(x / 3)) for x in (student, logits[rows]))
    divergence = 9 * (taught * np.log(taught / soft)).sum(axis=1).mean()
    assert distillation_loss(logits, classes, 3.0, 1.0)(student, rows).item() == pytest.approx(
        divergence, rel=1e-4
    )


def test_teachers_speak_with_one_voice(trained):
    data, network = trained
    other = Perceptron((2, 24, 16, 2), seed=3)
    x = data.x_test[:3]
    wanted = (np.array(network(mx.array(x))) + np.array(other(mx.array(x)))) / 2
    assert np.array(ensemble_logits([network, other], x)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "act",
    [
        lambda: magnitude_masks([np.ones((2, 2))], 1.1),
        lambda: without_units(Perceptron((2, 3, 2), 0), -0.1),
        lambda: distillation_loss(mx.zeros((1, 2)), mx.zeros(1), 0.0, 0.5),
        lambda: distillation_loss(mx.zeros((1, 2)), mx.zeros(1), 1.0, 1.5),
    ],
)
def test_shares_and_temperatures_out_of_range_are_refused(act):
    with pytest.raises(ConfigError):
        act()
