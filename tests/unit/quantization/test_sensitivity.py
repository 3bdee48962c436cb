"""The error of each format, and the choice that a number of bytes allows."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization import nf4, sensitivity
from mlx_qlora.quantization.schemes import SCHEMES, Scheme, scheme_named
from mlx_qlora.quantization.sensitivity import (
    LayerWeights,
    MeasuredLayer,
    Option,
    choose,
    importances,
    measure,
    there_and_back,
)
from tests.tiny import tiny_llama

INT2, INT4, INT8 = (scheme_named(f"int{bits}") for bits in (2, 4, 8))
MLX_SCHEMES = [scheme for scheme in SCHEMES.values() if scheme.mode not in nf4.MODES]
EACH = (INT2, INT4, INT8)

errors = st.integers(0, 1024).map(lambda steps: steps / 1024)  # sums are exact
sizes = st.integers(1, 60)
layers = st.lists(
    st.lists(st.tuples(sizes, errors), min_size=1, max_size=3).map(
        lambda pairs: tuple(Option(s, size, e) for s, (size, e) in zip(EACH, pairs, strict=False))
    ),
    min_size=1,
    max_size=5,
).map(lambda many: [MeasuredLayer(f"layers.{i}", options) for i, options in enumerate(many)])


def size_of(chosen):
    return sum(option.stored_bytes for option in chosen)


def error_of(chosen):
    return sum(option.error for option in chosen)


def best_by_trying_all(measured, budget):
    every = product(*(layer.options for layer in measured))
    return min((error_of(one) for one in every if size_of(one) <= budget), default=None)


def test_what_is_chosen_together_fits_together():
    measured = [
        MeasuredLayer(
            f"layers.{i}",
            tuple(Option(s, size, e) for s, size, e in zip(EACH, (1, 3, 7), (9, 2, 0), strict=True)),
        )
        for i in range(4)
    ]
    for budget in range(4, 30):
        chosen = choose(measured, budget).values()
        assert size_of(chosen) <= budget
        assert error_of(chosen) == best_by_trying_all(measured, budget)


@given(layers, st.floats(0, 1))
def test_between_the_smallest_and_the_largest_sizes_the_choice_is_the_best(measured, share):
    smallest, largest = (
        sum(pick(option.stored_bytes for option in layer.options) for layer in measured)
        for pick in (min, max)
    )
    budget = smallest + round(share * (largest - smallest))
    chosen = choose(measured, budget).values()
    assert size_of(chosen) <= budget
    assert error_of(chosen) == best_by_trying_all(measured, budget)


def layer_of(weight, schemes=EACH):
    def read(first, last):
        return weight[first:last]

    return LayerWeights("layer", read, weight.shape, {s: s.stored_bytes(weight.size) for s in schemes})


# ---------------------------------------------------------------- the choice


@given(layers, st.integers(1, 320))
def test_the_choice_is_the_best_of_all_choices_that_fit(measured, budget):
    best = best_by_trying_all(measured, budget)
    if best is None:
        with pytest.raises(ConfigError, match="smallest formats"):
            choose(measured, budget)
        return
    chosen = choose(measured, budget)
    assert list(chosen) == [layer.path for layer in measured]
    assert all(chosen[layer.path] in layer.options for layer in measured)
    assert size_of(chosen.values()) <= budget
    assert error_of(chosen.values()) == pytest.approx(best, abs=1e-12)


@given(layers, st.integers(0, 320), st.integers(2, 12))
def test_with_coarse_cells_the_choice_fits_and_is_within_the_stated_bound(measured, spare, cells):
    budget = sum(min(o.stored_bytes for o in layer.options) for layer in measured) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "MAX_CELLS", cells)
        chosen = choose(measured, budget)
        extras = [
            [o.stored_bytes - min(p.stored_bytes for p in layer.options) for o in layer.options]
            for layer in measured
        ]
        unit, _ = sensitivity._grid(extras)
    assert size_of(chosen.values()) <= budget
    bound = best_by_trying_all(measured, budget - len(measured) * unit)
    assert bound is None or error_of(chosen.values()) <= bound + 1e-12


@given(layers, st.integers(0, 300), st.integers(0, 300), st.sampled_from([3, 7, 2**16]))
def test_a_larger_budget_never_has_more_error(measured, one, other, cells):
    floor = sum(min(o.stored_bytes for o in layer.options) for layer in measured)
    small, large = sorted((one, other))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "MAX_CELLS", cells)
        less, more = (error_of(choose(measured, floor + spare).values()) for spare in (small, large))
    assert more <= less + 1e-12


@given(layers)
def test_the_same_layers_have_the_same_choice_and_no_byte_is_spent_for_nothing(measured):
    chosen = choose(measured, 10_000)
    assert chosen == choose(measured, 10_000)
    for layer in measured:
        least = min(option.error for option in layer.options)
        assert chosen[layer.path].error == least
        assert chosen[layer.path].stored_bytes == min(
            o.stored_bytes for o in layer.options if o.error == least
        )


def test_nothing_to_choose_is_no_choice():
    assert choose([], 0) == {}
    assert choose([], 100) == {}


def test_a_small_layer_gets_more_bits_before_a_large_one_of_equal_error():
    def options(weights):
        return tuple(
            Option(s, s.stored_bytes(weights), e) for s, e in zip(EACH, (0.2, 0.01, 1e-5), strict=True)
        )

    measured = [MeasuredLayer("large", options(2**20)), MeasuredLayer("small", options(2**14))]
    budget = INT4.stored_bytes(2**20) + INT8.stored_bytes(2**14)
    chosen = choose(measured, budget)
    assert {path: option.scheme for path, option in chosen.items()} == {"large": INT4, "small": INT8}


def test_the_layers_of_a_7b_model_are_told_apart_exactly():
    shapes = [(4096, 4096)] * 128 + [(4096, 11008)] * 96 + [(32000, 4096)] * 2
    extras = [
        [
            scheme.stored_bytes(a * b) - INT2.stored_bytes(a * b)
            for scheme in SCHEMES.values()
            if scheme.mode == "affine"
        ]
        for a, b in shapes
    ]
    unit, cells = sensitivity._grid(extras)
    assert all(extra % unit == 0 for own in extras for extra in own)
    assert cells <= sensitivity.MAX_CELLS


# ---------------------------------------------------------------- the error


@pytest.mark.parametrize("scheme", MLX_SCHEMES, ids=lambda scheme: scheme.name)
def test_the_error_is_that_of_the_weight_as_mlx_unpacks_it(scheme):
    weight = mx.random.normal((48, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    parts = mx.quantize(weight, scheme.group_size, scheme.bits, mode=scheme.mode)
    settings = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}
    back = np.array(mx.dequantize(*parts, **settings).astype(mx.float32), np.float64)
    exact = np.array(weight.astype(mx.float32), np.float64)
    expected = ((exact - back) ** 2).sum()  # its importance is what the relative error is divided by
    (option,) = measure(layer_of(weight, (scheme,))).options
    assert option.error == pytest.approx(expected, rel=1e-4)
    (weighed,) = measure(layer_of(weight, (scheme,)), importance=3.0).options
    assert weighed.error == pytest.approx(3 * expected / (exact**2).sum(), rel=1e-4)
    assert option.stored_bytes == sum(part.nbytes for part in parts)


@pytest.mark.parametrize(("mode", "extra"), [("nf4", 0.0), ("nf4-dq", 0.02)])
def test_nf4_is_measured_by_its_own_codes(mode, extra):
    weight = mx.random.normal((64, 256), key=mx.random.key(1))
    (option,) = measure(layer_of(weight, (Scheme(mode, mode, 4, 64),))).options
    codes, absmax = nf4.quantize(weight, 64)
    lost = (weight - nf4.dequantize(codes, absmax, weight.shape)).square().sum()
    assert option.error == pytest.approx(lost.item(), rel=max(extra, 1e-5))
    assert (option.error == pytest.approx(lost.item(), rel=1e-5)) == (mode == "nf4")


def test_rows_read_in_blocks_give_the_same_error(monkeypatch):
    weight = mx.random.normal((100, 128), key=mx.random.key(2))
    inputs = mx.random.normal((9, 128), key=mx.random.key(3))
    whole = [measure(layer_of(weight)), measure(layer_of(weight), inputs)]
    monkeypatch.setattr(sensitivity, "BLOCK_BYTES", 7 * 4 * 128)
    parts = [measure(layer_of(weight)), measure(layer_of(weight), inputs)]
    for one, other in zip(whole, parts, strict=True):
        assert [o.error for o in one.options] == pytest.approx([o.error for o in other.options], rel=1e-5)


def test_with_inputs_the_error_is_that_of_the_outputs():
    weight = mx.random.normal((32, 128), key=mx.random.key(4))
    inputs = mx.random.normal((50, 128), key=mx.random.key(5)).astype(mx.float16)
    x, w = np.array(inputs, np.float64), np.array(weight, np.float64)
    back = np.array(there_and_back(weight, INT4), np.float64)
    expected = ((x @ (w - back).T) ** 2).sum() / ((x @ w.T) ** 2).sum()
    (option,) = measure(layer_of(weight, (INT4,)), inputs, importance=1.0).options
    assert option.error == pytest.approx(expected, rel=1e-4)
    (option,) = measure(layer_of(weight, (INT4,)), inputs).options
    assert option.error == pytest.approx(expected * (w**2).sum(), rel=1e-4)


def test_what_inputs_never_use_does_not_count():
    weight = mx.random.normal((32, 128), key=mx.random.key(6))
    weight[:, 64:] = mx.random.normal((32, 64), key=mx.random.key(7)) * 1000
    inputs = mx.random.normal((50, 128), key=mx.random.key(8))
    inputs[:, 64:] = 0
    alone = measure(layer_of(weight[:, :64], (INT2,)), inputs[:, :64], 1.0).options[0].error
    assert measure(layer_of(weight, (INT2,)), inputs, 1.0).options[0].error == pytest.approx(alone, rel=1e-3)


def test_more_bits_are_less_error():
    weight = mx.random.normal((64, 256), key=mx.random.key(9))
    affine = [scheme for scheme in SCHEMES.values() if scheme.mode == "affine"]
    found = [option.error for option in measure(layer_of(weight, affine)).options]
    assert found == sorted(found, reverse=True)
    assert found[0] > 10 * found[2] > 100 * found[-1] > 0


def test_a_weight_of_zeros_has_no_error():
    assert [o.error for o in measure(layer_of(mx.zeros((8, 64)))).options] == [0, 0, 0]


def test_memory_does_not_grow_with_the_weight(monkeypatch):
    monkeypatch.setattr(sensitivity, "BLOCK_BYTES", 64 * 4 * 1024)
    inputs = mx.ones((4, 1024))
    peaks = []
    for rows in (128, 4096):
        layer = LayerWeights(
            "layer",
            lambda first, last: mx.random.normal((last - first, 1024)),
            (rows, 1024),
            {scheme: scheme.stored_bytes(rows * 1024) for scheme in EACH},
        )
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        measure(layer, inputs)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] <= 1.2 * peaks[0]
    assert peaks[1] < 8 * 64 * 4 * 1024  # a whole weight would be 64 blocks


# ---------------------------------------------------------------- what the model makes of it


def test_the_importance_of_a_layer_is_the_change_of_the_answers_for_its_relative_error():
    model = tiny_llama(bits=None)
    tokens = [mx.array([[3, 5, 7, 11, 2], [1, 4, 1, 5, 9]])]
    found = importances(model, tokens, INT2)
    assert set(found) == {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    layer = model.layers[1].mlp.down_proj
    exact, before = layer.weight, np.array(mx.softmax(model(tokens[0]), axis=-1), np.float64)
    layer.weight = there_and_back(exact, INT2)
    after = np.array(mx.softmax(model(tokens[0]), axis=-1), np.float64)
    relative = ((exact - layer.weight).square().sum() / exact.square().sum()).item()
    divergence = (before * np.log(before / after)).sum() / 10
    assert found["model.layers.1.mlp.down_proj"] == pytest.approx(divergence / relative, rel=2e-2)


def test_measuring_importances_leaves_the_model_as_it_was_even_when_it_fails():
    model = tiny_llama(bits=None)
    before = dict(tree_flatten(model.parameters()))
    tokens = [mx.array([[3, 5, 7]])]
    importances(model, tokens, INT2)
    assert all(array is before[name] for name, array in tree_flatten(model.parameters()))

    class Failing(type(model)):
        def __call__(self, inputs):
            if self.lm_head.weight is not before["lm_head.weight"]:
                raise RuntimeError("out of luck")
            return super().__call__(inputs)

    model.__class__ = Failing
    with pytest.raises(RuntimeError, match="luck"):
        importances(model, tokens, INT2)
    assert all(array is before[name] for name, array in tree_flatten(model.parameters()))


def test_a_layer_whose_output_is_not_used_has_no_importance():
    model = tiny_llama(bits=None)
    model.layers[1].mlp.down_proj.weight = mx.zeros_like(model.layers[1].mlp.down_proj.weight)
    found = importances(model, [mx.array([[3, 5, 7, 11]])], INT2)
    assert found["model.layers.1.mlp.up_proj"] == pytest.approx(0, abs=1e-6)
    assert found["model.layers.1.mlp.down_proj"] == 0
    assert found["lm_head"] > 1e-3
