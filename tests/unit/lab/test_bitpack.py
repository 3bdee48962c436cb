"""lab/bitpack.py"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.bitpack import pack, pack_dense, unpack, unpack_dense, weights_per_word, words_needed

WORDS = (8, 16, 32, 64)


@st.composite
def codes(draw, max_bits=16):
    bits = draw(st.integers(1, max_bits))
    return bits, np.array(draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.uint64)


@given(codes(), st.sampled_from([16, 32, 64]))
def test_unpacking_words_gives_the_codes_back(case, word_bits):
    bits, values = case
    words = pack(values, bits, word_bits)
    assert words.dtype.itemsize * 8 == word_bits
    assert len(words) == words_needed(len(values), bits, word_bits)
    assert (unpack(words, bits, len(values)) == values).all()


@given(codes(max_bits=64))
def test_unpacking_a_dense_stream_gives_the_codes_back(case):
    bits, values = case
    stream = pack_dense(values, bits)
    assert stream.nbytes == -(-len(values) * bits // 8)
    assert (unpack_dense(stream, bits, len(values)) == values).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word_bits", WORDS)
def test_a_word_holds_as_many_codes_as_fit_and_not_one_more(bits, word_bits):
    held = weights_per_word(bits, word_bits)
    assert held * bits <= word_bits < (held + 1) * bits
    assert len(pack(np.full(held, 2**bits - 1), bits, word_bits)) == 1
    assert len(pack(np.full(held + 1, 2**bits - 1), bits, word_bits)) == 2


def test_two_and_four_bits_lie_in_a_byte_lowest_first():
    assert pack(np.array([1, 2, 3, 0]), 2, 8).tolist() == [0b00_11_10_01]
    assert pack(np.array([0xA, 0x5]), 4, 8).tolist() == [0x5A]
    assert pack_dense(np.array([0b001, 0b010, 0b111]), 3).tolist() == [0b11_010_001, 0b1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_stores_its_codes_as_our_dense_stream(bits):
    weight = mx.random.normal((4, 64), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(weight, 32, bits)
    spread = [np.repeat(np.array(part), 32, axis=1) for part in (scales, biases)]
    restored = np.array(mx.dequantize(words, scales, biases, 32, bits))
    values = np.rint((restored - spread[1]) / spread[0]).astype(int)
    assert pack_dense(values, bits).tobytes() == np.array(words).tobytes()
    if bits in (2, 4, 8):
        assert pack(values, bits, 32).tobytes() == np.array(words).tobytes()


@pytest.mark.parametrize(("values", "bits"), [([4], 2), ([-1], 2), ([256], 8)])
def test_a_code_that_does_not_fit_is_refused(values, bits):
    with pytest.raises(ConfigError, match="do not fit"):
        pack(np.array(values), bits)
    with pytest.raises(ConfigError, match="do not fit"):
        pack_dense(np.array(values), bits)


@pytest.mark.parametrize(("bits", "word_bits"), [(0, 32), (33, 32), (4, 12)])
def test_words_that_do_not_exist_are_refused(bits, word_bits):
    with pytest.raises(ConfigError):
        weights_per_word(bits, word_bits)
