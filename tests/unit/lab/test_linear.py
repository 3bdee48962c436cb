"""lab/linear.py: what the theory promises of every array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.bitpack import words_needed
from mlx_qlora.lab.linear import LinearScheme, quantize

NUMBERS = st.floats(-1e4, 1e4, allow_subnormal=False).map(lambda value: 0.0 if abs(value) < 1e-9 else value)
MATRICES = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 11)), elements=NUMBERS)
SCHEMES = st.builds(
    LinearScheme,
    bits=st.integers(2, 16),
    is_symmetric=st.booleans(),
    per=st.sampled_from(["tensor", "channel", "group"]),
    group_size=st.integers(1, 12),
)
TENSOR = SCHEMES.map(lambda scheme: LinearScheme(scheme.bits, scheme.is_symmetric, "tensor"))


@given(MATRICES, SCHEMES)
def test_no_error_is_larger_than_half_a_step(real, scheme):
    codes = quantize(real, scheme)
    error = np.abs(codes.dequantized() - real)
    assert (error <= codes.steps() * (0.5 + 1e-9)).all()


@given(MATRICES, SCHEMES)
def test_quantizing_what_comes_back_changes_nothing(real, scheme):
    once = quantize(real, scheme)
    twice = quantize(once.dequantized(), scheme)
    assert np.allclose(twice.dequantized(), once.dequantized(), rtol=1e-12, atol=0)


@given(MATRICES, TENSOR)
def test_a_larger_number_never_has_a_smaller_code(real, scheme):
    order = np.argsort(real, axis=None)
    assert (np.diff(quantize(real, scheme).codes.reshape(-1)[order]) >= 0).all()


@given(MATRICES, SCHEMES)
def test_zero_maps_to_the_zero_point_and_comes_back_as_zero(real, scheme):
    real[0, 0] = 0.0
    codes = quantize(real, scheme)
    assert codes.codes[0, 0] == codes.zero_point[0, 0]
    assert codes.dequantized()[0, 0] == 0


@given(MATRICES, SCHEMES)
def test_codes_and_zero_points_stay_within_their_bits(real, scheme):
    codes = quantize(real, scheme)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    assert low <= codes.codes.min()
    assert codes.codes.max() <= high
    assert ((low <= codes.zero_point) & (codes.zero_point <= high)).all()
    assert (codes.zero_point == 0).all() or not scheme.is_symmetric


@given(MATRICES, st.integers(2, 16), st.booleans())
def test_one_code_per_step_r_is_s_times_q_minus_z(real, bits, is_symmetric):
    codes = quantize(real, LinearScheme(bits, is_symmetric, "tensor"))
    scale, zero = codes.scale[0, 0], codes.zero_point[0, 0]
    assert np.array_equal(codes.dequantized(), scale * (codes.codes - zero))


def test_int8_symmetric_by_hand():
    codes = quantize(np.array([[-2.54, 0.0, 0.03, 1.27]]), LinearScheme(8, True, "tensor"))
    assert codes.scale[0, 0] == pytest.approx(0.02)
    assert codes.codes.tolist() == [[-127, 0, 2, 64]]  # 1.5 and 63.5 lie halfway and go to the even code


def test_uint2_asymmetric_by_hand():
    codes = quantize(np.array([[-1.0, 0.2, 2.0]]), LinearScheme(2, False, "tensor"))
    assert (codes.scale[0, 0], codes.zero_point[0, 0]) == (1.0, -1)
    assert codes.codes.tolist() == [[-2, -1, 1]]


@pytest.mark.parametrize(("per", "shape"), [("tensor", (1, 1)), ("channel", (6, 1)), ("group", (6, 3))])
def test_scales_are_as_many_as_shares(per, shape):
    codes = quantize(np.random.default_rng(0).normal(size=(6, 40)), LinearScheme(4, True, per, 16))
    assert codes.scale.shape == codes.zero_point.shape == shape


@given(hnp.arrays(np.float64, (3, 10), elements=NUMBERS), st.integers(2, 8), st.booleans())
def test_each_row_and_each_group_is_quantized_as_if_it_were_alone(real, bits, is_symmetric):
    by_channel = quantize(real, LinearScheme(bits, is_symmetric, "channel")).dequantized()
    by_group = quantize(real, LinearScheme(bits, is_symmetric, "group", 4)).dequantized()
    alone = LinearScheme(bits, is_symmetric, "tensor")
    for row in range(3):
        assert np.array_equal(by_channel[row], quantize(real[row], alone).dequantized())
        for start in (0, 4, 8):
            part = quantize(real[row, start : start + 4], alone).dequantized()
            assert np.array_equal(by_group[row, start : start + 4], part)


def test_known_limits_saturate_what_lies_outside():
    codes = quantize(np.array([-9.0, 0.5, 9.0]), LinearScheme(8, False, "tensor"), limits=(-1.0, 1.0))
    assert codes.dequantized() == pytest.approx([-1, 0.5, 1], abs=2 / 255)


@given(st.integers(2, 16), st.integers(1, 5), st.integers(1, 50), st.integers(1, 20))
def test_stored_bytes_are_codes_scales_and_zero_points(bits, rows, columns, group_size):
    real = np.random.default_rng(0).normal(size=(rows, columns))
    groups = rows * -(-columns // group_size)
    packed = words_needed(rows * columns * bits, 1, 8, dense=True)
    assert quantize(real, LinearScheme(bits, True, "group", group_size)).stored_bytes() == packed + 2 * groups
    zero_points = words_needed(groups * bits, 1, 8, dense=True)
    asymmetric = quantize(real, LinearScheme(bits, False, "group", group_size))
    assert asymmetric.stored_bytes() == packed + 2 * groups + zero_points


@pytest.mark.parametrize("real", [[], [np.nan], [np.inf, 1.0]])
def test_what_cannot_be_quantized_is_refused(real):
    with pytest.raises(ConfigError, match="finite"):
        quantize(np.array(real), LinearScheme())


@pytest.mark.parametrize("key", [{"bits": 1}, {"bits": 17}, {"per": "column"}, {"group_size": 0}])
def test_a_scheme_that_does_not_exist_is_refused(key):
    with pytest.raises(ConfigError):
        LinearScheme(**key)


@pytest.mark.parametrize("limits", [(1.0, -1.0), (0.0, np.inf)])
def test_limits_that_are_no_range_are_refused(limits):
    with pytest.raises(ConfigError, match="no range"):
        quantize(np.ones(3), LinearScheme(8, False, "tensor"), limits)
