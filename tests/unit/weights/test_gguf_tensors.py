"""Blocks become MLX's packed form without a bit of difference, for any bits that a block may hold."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.weights.gguf_tensors import AFFINE, FLOATS, can_dequantize, dequantize, pack, repack
from tests.gguf_files import BLOCK_TYPES, random_blocks, reference_values

WIDTH = 512


def unpacked(raw, type_, scale_dtype):
    packed = repack(raw, type_, scale_dtype)
    scales, biases = (mx.array(part.astype(np.float32)) for part in (packed.scales, packed.biases))
    return np.array(
        mx.dequantize(mx.array(packed.weight), scales, biases, group_size=32, bits=AFFINE[type_].bits)
    )


@pytest.mark.parametrize("type_", AFFINE, ids=lambda t: t.name)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_repacked_blocks_are_what_gguf_py_dequantizes(type_, seed):
    raw = random_blocks((3, WIDTH), type_, seed)
    expected = gguf.dequantize(raw, type_)
    np.testing.assert_array_equal(unpacked(raw, type_, AFFINE[type_].scale_dtype), expected)
    np.testing.assert_array_equal(dequantize(raw, type_), expected)


@pytest.mark.parametrize("type_", [t for t in BLOCK_TYPES if t not in AFFINE], ids=lambda t: t.name)
def test_other_formats_are_dequantized_as_their_reference_does(type_):
    raw = random_blocks((2, WIDTH), type_)
    values = dequantize(raw, type_)
    assert (values.shape, values.dtype) == ((2, WIDTH), np.float32)
    np.testing.assert_array_equal(values, reference_values(raw, type_))
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0


@pytest.mark.parametrize("type_", FLOATS, ids=lambda t: t.name)
def test_floats_are_read_as_they_are(type_):
    values = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float16).astype(np.float32)
    raw = gguf.quantize(values, type_).view(np.uint8).reshape(4, -1)
    tolerance = 2**-8 if type_ == Type.BF16 else 0
    np.testing.assert_allclose(dequantize(raw, type_), values, rtol=tolerance)


@pytest.mark.parametrize("bits", [4, 5, 8])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_packed_codes_come_back_from_mlx(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, 64), dtype=np.uint8)
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    back = mx.dequantize(mx.array(pack(codes, bits)), ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(back), codes)


def test_every_format_the_readme_of_ggml_calls_a_weight_can_be_read():
    no_weights = {Type.I8, Type.I16, Type.I32, Type.I64, Type.F64, Type.Q8_1}
    unread = {type_.name for type_ in Type if not can_dequantize(type_) and type_ not in no_weights}
    assert unread <= {"Q1_0"}
