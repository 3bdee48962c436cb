"""Codes go over into GGUF's blocks as they are; what is rounded is known before it is written."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.exchange.gguf_blocks import (
    CODED,
    can_hold_width,
    code_error,
    encode,
    encode_codes,
    encode_mxfp4,
    recoding_error,
)
from mlx_qlora.exchange.gguf_weights import unpack
from mlx_qlora.weights.gguf_tensors import Type, pack, repack

ROWS, WIDTH = 3, 128


def random_groups(seed, bits, group_size, dtype=np.float16, spread=0.02):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (ROWS, WIDTH), dtype=np.uint8)
    shape = (ROWS, WIDTH // group_size)
    scales = (spread * rng.standard_normal(shape)).astype(dtype)
    biases = (spread * 8 * rng.standard_normal(shape)).astype(dtype)
    return codes, scales.astype(np.float32), biases.astype(np.float32)


def values_of(codes, scales, biases):
    grouped = codes.reshape(*scales.shape, -1)
    return (grouped * scales[..., None] + biases[..., None]).reshape(codes.shape)


@pytest.mark.parametrize(("type_", "bits"), [(Type.Q4_1, 4), (Type.Q5_1, 5)])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), group_size=st.sampled_from([32, 64, 128]))
def test_four_and_five_bits_come_back_from_the_import_as_the_same_words_scales_and_biases(
    type_, bits, seed, group_size
):
    codes, scales, biases = random_groups(seed, bits, group_size)
    raw = encode_codes(codes, scales, biases, type_)
    back = repack(raw, type_, "F16")
    np.testing.assert_array_equal(back.weight, pack(codes, bits))
    np.testing.assert_array_equal(back.scales, np.repeat(scales, group_size // 32, axis=1))
    np.testing.assert_array_equal(back.biases, np.repeat(biases, group_size // 32, axis=1))
    np.testing.assert_array_equal(gguf.dequantize(raw, type_), values_of(codes, scales, biases))


@pytest.mark.parametrize("type_", CODED)
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    dtype=st.sampled_from([np.float16, np.float32]),
    is_centred=st.booleans(),
    spread=st.sampled_from([1e-7, 1e-5, 0.02, 3.0]),
)
def test_the_error_that_is_announced_is_zero_or_a_bound(type_, seed, bits, dtype, is_centred, spread):
    codes, scales, biases = random_groups(seed, bits, 32, dtype, spread)
    if is_centred:
        biases = -(2.0 ** (bits - 1)) * scales
    announced = recoding_error(type_, bits, scales, biases)
    if np.isinf(announced):
        return
    values = values_of(codes.astype(np.float64), scales.astype(np.float64), biases.astype(np.float64))
    written = gguf.dequantize(encode_codes(codes, scales, biases, type_), type_).astype(np.float64)
    changes = np.abs(written - values).reshape(ROWS, -1, 32).max(axis=-1)
    rounding = 2.0**-23 * (np.abs(biases) + np.abs(scales) * 256)  # of the sum in float32 itself
    assert np.square(np.maximum(changes - rounding, 0)).sum() <= announced * (1 + 1e-6)
    if announced == 0:
        np.testing.assert_array_equal(written.astype(np.float32), values.astype(np.float32))


def test_a_format_has_no_room_for_more_bits_or_codes_off_its_centre():
    _, scales, biases = random_groups(0, 4, 32)
    assert np.isinf(recoding_error(Type.Q4_1, 5, scales, biases))
    assert recoding_error(Type.Q5_1, 4, scales, biases) == 0
    assert recoding_error(Type.Q4_0, 4, scales, -8 * scales) == 0
    assert np.isinf(recoding_error(Type.Q4_0, 4, scales, -7 * scales))
    assert recoding_error(Type.Q5_0, 4, scales, -7 * scales) == 0
    assert recoding_error(Type.Q8_0, 8, scales, -128 * scales) == 0
    assert np.isinf(recoding_error(Type.Q8_0, 8, scales, -127 * scales))
    assert np.isinf(recoding_error(Type.Q4_1, 4, scales + 1e6, biases))
    assert code_error(np.full((2, 6), 3.0)) == pytest.approx(2 * 6 * 9 / 12)


def test_a_group_of_one_number_keeps_it_where_there_is_a_minimum_and_else_only_zero():
    zeros, ones = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    assert recoding_error(Type.Q4_1, 4, zeros, ones) == 0
    assert recoding_error(Type.Q4_0, 4, zeros, ones) > 0
    assert recoding_error(Type.Q4_0, 4, zeros, zeros) == 0
    assert not gguf.dequantize(encode_codes(codes, zeros, zeros, Type.Q4_0), Type.Q4_0).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_unpacking_gives_the_codes_that_mlx_multiplies_with(bits):
    weight = mx.random.normal((5, 128), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(weight, 32, bits)
    codes = unpack(np.array(words), bits)
    assert codes.max() == 2**bits - 1
    expected = np.array(mx.dequantize(words, scales, biases, 32, bits))
    np.testing.assert_allclose(values_of(codes, np.array(scales), np.array(biases)), expected, atol=1e-6)


def test_mxfp4_is_the_same_numbers_in_both_formats():
    weight = mx.random.normal((5, 128), key=mx.random.key(0)) * mx.array([[1e-6], [1], [30], [0], [0.1]])
    words, scales = mx.quantize(weight, 32, 4, mode="mxfp4")
    raw = encode_mxfp4(unpack(np.array(words), 4), np.array(scales))
    expected = np.array(mx.dequantize(words, scales, None, 32, 4, "mxfp4").astype(mx.float32))
    np.testing.assert_array_equal(gguf.dequantize(raw, Type.MXFP4), expected)


@pytest.mark.parametrize("type_", [Type.F32, Type.F16, Type.BF16, *CODED])
def test_numbers_written_anew_are_near_the_old_ones(type_):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    raw = encode(values, type_)
    assert raw.dtype == np.uint8
    near = {Type.F32: 0, Type.F16: 2e-3, Type.BF16: 2e-2, Type.Q8_0: 0.02, Type.Q5_0: 0.15, Type.Q5_1: 0.12}
    np.testing.assert_allclose(gguf.dequantize(raw, type_), values, atol=near.get(type_, 0.3))


def test_only_floats_take_rows_of_any_width():
    assert can_hold_width(Type.F16, 172)
    assert not can_hold_width(Type.Q8_0, 172)
    assert can_hold_width(Type.Q8_0, 160)
