"""bitsandbytes on a CPU as the oracle of NF4, bit for bit."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.quantization import nf4
from tests.unit.quantization.nf4_vectors import FILE, SHAPES, by_bitsandbytes, digest, vector_weight

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

BLOCKS = [32, 64]


def bits(array):
    """Of a float array, so that -0.0 and 0.0 differ."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint32) if array.dtype == np.float32 else array


def assert_same_bits(ours, theirs):
    ours, theirs = bits(np.array(ours)), bits(theirs)
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)


def weights(seed):
    """Weights of many sizes: whole blocks and not, one value, zeros, outliers, all magnitudes, 16 bits."""
    rng = np.random.default_rng(seed)
    for size in (1, 2, 7, 31, 32, 33, 64, 65, 1000, 64 * 7, 64 * 255, 64 * 256, 64 * 257 + 5, 64 * 33_000):
        values = rng.standard_normal(size)
        yield values.astype(np.float32)
        if size < 64 * 300:
            yield (values * 10.0 ** rng.integers(-35, 30)).astype(np.float32)
            yield np.where(rng.random(size) < 0.5, 0, values).astype(np.float32)
            yield np.repeat(rng.standard_normal(-(-size // 64)), 64)[:size].astype(np.float32)
            yield np.where(np.arange(size) < 64, 0, values * (1 + 1e6 * (rng.random(size) < 0.01))).astype(
                np.float32
            )
            yield np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_absmax_and_both_of_the_second_quantization_are_its_own(seed, block):
    for weight in weights(seed):
        theirs = by_bitsandbytes(weight, block)
        packed, absmax = nf4.quantize(mx.array(weight), block)
        double = nf4.quantize_absmax(absmax)
        for name, array in {"packed": packed, "absmax": absmax, **double._asdict()}.items():
            assert_same_bits(array, theirs[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_weights_too(dtype):
    tensor = torch.randn(96, 256, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
    packed, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
    ours = mx.array(tensor.float().numpy()).astype(getattr(mx, dtype))
    assert_same_bits(nf4.quantize(ours, 64)[0], packed.reshape(-1).numpy())
    assert_same_bits(nf4.quantize(ours, 64)[1], state.absmax.numpy())


def test_values_at_every_boundary_between_two_codes():
    table = np.array(nf4.NF4, np.float32)
    middle = (table[:-1] + table[1:]) / np.float32(2)
    near = [middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2)), table]
    block = np.resize(np.concatenate([[1.0], *near]).astype(np.float32), 64)
    assert_same_bits(nf4.quantize(mx.array(block), 64)[0], by_bitsandbytes(block, 64)["packed"])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("codes", ["nf4", "fp4"])
def test_unpacked_values_are_its_own(codes, block):
    tensor = torch.randn(40, 192, generator=torch.Generator().manual_seed(5))
    packed, state = bnb.quantize_4bit(tensor, blocksize=block, quant_type=codes, compress_statistics=True)
    absmax = nf4.dequantize_absmax(
        mx.array(state.absmax.numpy()), mx.array(state.state2.absmax.numpy()), mx.array(state.offset.item())
    )
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert_same_bits(absmax, theirs.numpy())
    ours = nf4.dequantize(mx.array(packed.numpy()), absmax, (40, 192), codes)
    assert np.array_equal(np.array(ours), bnb.dequantize_4bit(packed, state).numpy())


def test_the_tables_are_its_own():
    for codes, table in nf4.CODES.items():
        assert np.array_equal(np.array(table, np.float32), bnb.get_4bit_type(codes, device="cpu").numpy())
    assert_same_bits(nf4.dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_kept_vectors_are_what_it_stores(name, block):
    stored = by_bitsandbytes(vector_weight(name), block)
    kept = json.loads(FILE.read_text())[f"{name}, {block}"]
    assert {part: digest(array) for part, array in stored.items()} == kept
