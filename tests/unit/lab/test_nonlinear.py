"""lab/nonlinear.py: companding, code-books, NF4."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.nonlinear import (
    UNIFORM,
    a_law,
    codebook_quantize,
    kmeans_levels,
    mu_law,
    nearest_codes,
    normal_float_levels,
    normal_float_quantize,
    uniform_levels,
)
from mlx_qlora.lab.signal import snr_db

CURVES = [UNIFORM, mu_law(), mu_law(15), a_law(), a_law(1.0)]
VALUES = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-50, 50, allow_subnormal=False))

# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
@given(x=hnp.arrays(np.float64, 20, elements=st.floats(-1, 1, allow_subnormal=False)))
def test_expanding_undoes_compressing(curve, x):
    assert curve.expand(curve.compress(x)) == pytest.approx(x, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_a_curve_is_odd_rises_and_keeps_the_ends(curve):
    x = np.linspace(-1, 1, 4001)
    y = curve.compress(x)
    assert (np.diff(y) > 0).all()
    assert y == pytest.approx(-y[::-1], abs=1e-12)
    assert (y[0], y[-1]) == pytest.approx((-1, 1))


def test_the_curves_are_those_of_the_telephone():
    # G.711's A-law halves: F(1/A) = 1 / (1 + ln A).
    assert a_law(87.6).compress(np.array([1 / 87.6])) == pytest.approx(1 / (1 + np.log(87.6)))
    assert mu_law(255).compress(np.array([0.01])) == pytest.approx(np.log(3.55) / np.log(256))


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_quantized_values_are_their_own_levels_and_no_more_than_the_bits_allow(curve, bits):
    x = np.append(curve.expand(np.linspace(-1, 1, 2001)), [-1.2, 1.2])
    x.sort()
    once = curve.quantized(x, bits)
    assert len(np.unique(once)) == 2**bits
    assert curve.quantized(once, bits) == pytest.approx(once, rel=1e-12)
    assert (np.diff(once) >= 0).all()


def test_companding_flattens_snr_as_the_rule_says():
    x = np.random.default_rng(0).laplace(0, 0.02, 200_000)
    for curve, factor in ((mu_law(), np.log(256)), (a_law(), 1 + np.log(87.6))):
        rule = 20 * np.log10(2) * 8 + 10 * np.log10(3) - 20 * np.log10(factor)
        assert snr_db(x, curve.quantized(x, 8)) == pytest.approx(rule, abs=1.5)
    assert snr_db(x, UNIFORM.quantized(x, 8)) < 25


@given(VALUES, st.integers(1, 9))
def test_a_value_goes_to_its_nearest_level(values, num_levels):
    levels = np.unique(uniform_levels(np.append(values, [-1.0, 1.0]), num_levels))
    found = np.abs(values - levels[nearest_codes(values, levels)])
    assert found == pytest.approx(np.abs(values[:, None] - levels).min(axis=1), abs=1e-12)


@given(VALUES, st.integers(1, 17))
def test_k_means_is_never_worse_than_the_even_grid_it_starts_from(values, num_levels):
    errors = [
        np.square(codebook_quantize(values, levels).dequantized() - values).sum()
        for levels in (kmeans_levels(values, num_levels), uniform_levels(values, num_levels))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-12


@given(VALUES, st.integers(1, 17))
def test_k_means_levels_ascend_and_are_no_more_than_asked_for(values, num_levels):
    levels = kmeans_levels(values, num_levels)
    assert 1 <= len(levels) <= num_levels
    assert (np.diff(levels) >= 0).all()
    assert values.min() - 1e-9 <= levels[0]
    assert levels[-1] <= values.max() + 1e-9


def test_our_k_means_is_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    values = np.random.default_rng(1).normal(0, 1, 600)
    means = cluster.KMeans(8, init=uniform_levels(values, 8)[:, None], n_init=1, tol=0, max_iter=500)
    means.fit(values[:, None])
    assert kmeans_levels(values, 8) == pytest.approx(np.sort(means.cluster_centers_[:, 0]), abs=1e-6)


def test_few_distinct_values_come_back_as_they_are():
    values = np.array([3.0, -1.0, 3.0, 0.5])
    assert kmeans_levels(values, 4).tolist() == [-1.0, 0.5, 3.0]
    assert codebook_quantize(values, kmeans_levels(values, 4)).dequantized().tolist() == values.tolist()


def test_nf4_from_the_normal_distribution_is_what_was_published():
    # Published in float32, from an outermost probability cut to seven digits.
    assert normal_float_levels(offset=0.9677083) == pytest.approx(PUBLISHED_NF4, abs=1.2e-7)
    assert normal_float_levels() == pytest.approx(PUBLISHED_NF4, abs=3e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_normal_float_has_all_its_levels_an_exact_zero_and_both_ends(bits):
    levels = normal_float_levels(bits)
    assert len(levels) == 2**bits
    assert (np.diff(levels) > 0).all()
    assert 0.0 in levels
    assert (levels[0], levels[-1]) == (-1, 1)
    assert (levels < 0).sum() == 2 ** (bits - 1) - 1


@given(hnp.arrays(np.float64, st.integers(1, 150), elements=st.floats(-1e3, 1e3, allow_subnormal=False)),
       st.integers(1, 70))  # fmt: skip
def test_normal_floats_keep_zero_the_largest_of_a_block_and_what_came_back(values, block_size):
    codes = normal_float_quantize(values, block_size)
    back = codes.dequantized()
    assert (back[values == 0] == 0).all()
    for start in range(0, len(values), block_size):
        block, restored = values[start : start + block_size], back[start : start + block_size]
        largest = np.argmax(np.abs(block))
        assert restored[largest] == pytest.approx(block[largest])
        # The widest gap between levels is 1 − 0.7230.
        assert np.abs(restored - block).max() <= 0.1521 * np.abs(block[largest]) + 1e-12
    assert normal_float_quantize(back, block_size).dequantized() == pytest.approx(back)


def test_nf4_beats_symmetric_int4_on_normal_values_and_loses_on_uniform_ones():
    from mlx_qlora.lab.linear import LinearScheme, quantize

    rng = np.random.default_rng(0)
    for values, is_better in ((rng.normal(size=(500, 64)), True), (rng.uniform(-1, 1, (500, 64)), False)):
        error = np.linalg.norm(normal_float_quantize(values).dequantized() - values)
        other = np.linalg.norm(quantize(values, LinearScheme(4)).dequantized() - values)
        assert (error < 0.9 * other) if is_better else (error > 1.2 * other)


def test_stored_bytes_are_codes_and_scales_or_codes_and_table():
    values = np.random.default_rng(0).normal(size=(3, 50))
    assert normal_float_quantize(values, 64).stored_bytes() == 75 + 3 * 2
    levels = kmeans_levels(values, 8)
    assert codebook_quantize(values, levels).stored_bytes(is_table_stored=True) == -(-150 * 3 // 8) + 8 * 2


@pytest.mark.parametrize(
    "act",
    [
        lambda: mu_law(0),
        lambda: a_law(0.5),
        lambda: kmeans_levels(np.array([]), 3),
        lambda: kmeans_levels(np.ones(3), 0),
        lambda: normal_float_levels(1),
        lambda: normal_float_quantize(np.array([])),
        lambda: normal_float_quantize(np.ones(3), 0),
    ],
)
def test_settings_that_mean_nothing_are_refused(act):
    with pytest.raises(ConfigError):
        act()
