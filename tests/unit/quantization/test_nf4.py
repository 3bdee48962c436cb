"""quantization/nf4.py: bitsandbytes' bytes, and what the format promises."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.nf4_metal import has_kernel, unpack_on_metal
from tests.unit.quantization.nf4_vectors import FILE, SHAPES, digest, vector_weight

HALF_GAP = max(b - a for a, b in zip(nf4.NF4, nf4.NF4[1:], strict=False)) / 2
BLOCKS = [32, 64]
SEEDS = st.integers(0, 2**32 - 1)
SPREADS = st.floats(1e-20, 1e20)


def normal(seed, shape, spread=1.0):
    return mx.random.normal(shape, key=mx.random.key(seed)) * spread


def stored(weight, block):
    packed, absmax = nf4.quantize(mx.array(weight), block)
    double = nf4.quantize_absmax(absmax)
    return {"packed": packed, "absmax": absmax, **double._asdict()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_byte_is_the_one_bitsandbytes_stores(name, block):
    expected = json.loads(FILE.read_text())[f"{name}, {block}"]
    ours = stored(vector_weight(name), block)
    assert {part: digest(np.array(array)) for part, array in ours.items()} == expected


@given(seed=SEEDS, spread=SPREADS, block=st.sampled_from(BLOCKS), count=st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_a_value_is_within_half_the_widest_gap_of_its_block(seed, spread, block, count):
    weight = normal(seed, (count,), spread)
    packed, absmax = nf4.quantize(weight, block)
    back = nf4.dequantize(packed, absmax, (count,))
    limit = mx.repeat(absmax, block)[:count] * HALF_GAP * 1.000001
    assert packed.shape == (-(-count // 2),)
    assert absmax.shape == (-(-count // block),)
    assert mx.all(mx.abs(back - weight) <= limit).item()


@given(seed=SEEDS, spread=SPREADS, block=st.sampled_from(BLOCKS), count=st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_quantizing_again_changes_nothing(seed, spread, block, count):
    once = nf4.quantize(normal(seed, (count,), spread), block)
    twice = nf4.quantize(nf4.dequantize(*once, (count,)), block)
    assert all(mx.array_equal(a, b).item() for a, b in zip(once, twice, strict=True))


@given(seed=SEEDS, block=st.sampled_from(BLOCKS), rows=st.integers(1, 6), blocks=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_rows_are_stored_one_by_one_as_all_at_once(seed, block, rows, blocks):
    weight = normal(seed, (rows, block * blocks))
    packed, absmax = nf4.quantize(weight, block)
    each = [nf4.quantize(row, block) for row in weight]
    assert mx.array_equal(packed, mx.concatenate([part[0] for part in each])).item()
    assert mx.array_equal(absmax, mx.concatenate([part[1] for part in each])).item()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_zeros_stays_zeros(block):
    weight = mx.concatenate([mx.zeros((block,)), mx.ones((block,)), mx.zeros((block,))])
    parts = stored(weight, block)
    assert mx.array_equal(nf4.dequantize(parts["packed"], parts["absmax"], weight.shape), weight).item()
    zeros = stored(mx.zeros((block * 300,)), block)
    absmax = nf4.dequantize_absmax(zeros["codes"], zeros["nested_absmax"], zeros["offset"])
    assert mx.array_equal(absmax, mx.zeros_like(absmax)).item()


def test_a_short_last_block_is_divided_where_a_whole_one_is_multiplied():
    table = np.array(nf4.NF4, np.float32)
    middle = (table[:-1] + table[1:]) / np.float32(2)
    for largest in np.arange(1, 60, dtype=np.float32) / np.float32(7):
        near = np.concatenate([[largest], middle * largest, np.nextafter(middle * largest, np.float32(9))])
        for size, scaled in ((31, near / largest), (32, np.append(near, 0) * (1 / largest))):
            packed, _ = nf4.quantize(mx.array(np.append(near, 0).astype(np.float32)[:size]), 32)
            codes = np.array([[byte >> 4, byte & 15] for byte in np.array(packed)]).reshape(-1)[:size]
            expected = np.searchsorted(middle, np.clip(scaled.astype(np.float32), -1, 1))
            assert np.array_equal(codes, expected)


@pytest.mark.parametrize("codes", ["nf4", "fp4"])
def test_every_code_becomes_its_value_the_first_in_the_high_half(codes):
    packed = mx.arange(256).astype(mx.uint8)
    table = np.array(nf4.CODES[codes], np.float32)
    pairs = nf4.dequantize(packed, mx.ones((16,)), (256, 2), codes)
    assert np.array_equal(np.array(pairs), [[table[byte >> 4], table[byte & 15]] for byte in range(256)])


def test_the_dynamic_map_ascends_from_minus_one_to_one_through_zero():
    values = np.array(nf4.dynamic_map())
    assert values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    assert values[-1] == 1
    assert values[127] == 0
    assert np.array_equal(values[1:127], -values[128:254][::-1])
    assert -1 < values[0] == -values[254]


@given(seed=SEEDS, spread=SPREADS, count=st.integers(1, 1500))
@settings(max_examples=40, deadline=None)
def test_absmax_comes_back_within_half_a_step_of_the_map(seed, spread, count):
    absmax = mx.abs(normal(seed, (count,), spread)) + spread
    double = nf4.quantize_absmax(absmax)
    back = nf4.dequantize_absmax(*double)
    step = float(np.diff(np.array(nf4.dynamic_map())).max()) / 2 + 2 / 65535
    limit = mx.repeat(double.nested_absmax, 256)[:count] * step + spread * 1e-5
    assert double.codes.dtype == mx.uint8
    assert mx.all(mx.abs(back - absmax) <= limit).item()


@given(seed=SEEDS, first=st.integers(0, 900), count=st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_some_absmax_values_are_those_of_all(seed, first, count):
    double = nf4.quantize_absmax(mx.abs(normal(seed, (1200,))))
    whole = nf4.dequantize_absmax(*double)
    some = nf4.dequantize_absmax(double.codes[first : first + count], *double[1:], first)
    assert mx.array_equal(some, whole[first : first + count]).item()


@given(seed=SEEDS, count=st.integers(1, 5000))
@settings(max_examples=40, deadline=None)
def test_the_offset_is_the_mean(seed, count):
    values = mx.abs(normal(seed, (count,)))
    exact = np.array(values).astype(np.float64).mean()
    assert float(nf4.quantize_absmax(values).offset) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_words_hold_the_same_bytes_and_values(mode):
    packed, absmax = nf4.quantize(normal(1, (10, 128)), 64)
    words = nf4.pack_words(packed, 10)
    assert words.shape == (10, 16)
    assert np.array(words).tobytes() == np.array(packed).tobytes()
    expected = nf4.dequantize(packed, absmax, (10, 128), mode.removesuffix("-dq"))
    for dtype in (mx.float32, mx.bfloat16):
        values = nf4.unpack_words(words, absmax.reshape(10, 2), mode, dtype)
        assert mx.array_equal(values, expected.astype(dtype)).item()


@pytest.mark.skipif(not has_kernel(), reason="there is no Metal")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("codes", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "width", "block"), [(1, 64, 64), (3, 96, 32), (257, 1024, 64)])
def test_the_metal_kernel_gives_the_reference_values(rows, width, block, codes, dtype):
    packed, absmax = nf4.quantize(normal(2, (rows, width), 0.02), block)
    expected = nf4.dequantize(packed, absmax, (rows, width), codes).astype(dtype)
    words, scales = nf4.pack_words(packed, rows), absmax.reshape(rows, -1)
    assert mx.array_equal(unpack_on_metal(words, scales, nf4.pair_table(codes), dtype), expected).item()
    compiled = mx.compile(lambda w, s: unpack_on_metal(w, s, nf4.pair_table(codes), dtype))
    assert mx.array_equal(compiled(words[rows // 2 :], scales[rows // 2 :]), expected[rows // 2 :]).item()
