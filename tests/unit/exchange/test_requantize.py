"""Codes and scales chosen together: never worse than MLX's rule, and an update is not rounded away."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.exchange.requantize import best_stored, pack, plainly_stored, recoded, restored
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.schemes import SCHEMES, Scheme

ONE_SCALE = [name for name in SCHEMES if name != "nf4-dq"]


def weights(rows=16, width=128, *, seed=0, spread=0.02):
    return spread * mx.random.normal((rows, width), key=mx.random.key(seed))


def error(rows, parts, scheme):
    """Squared error of each row."""
    return np.array((restored(parts, scheme) - rows).square().sum(axis=1))


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_packed_codes_are_those_mlx_unpacks(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 128)).astype(np.uint32)
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    unpacked = mx.dequantize(pack(mx.array(codes), bits), ones, zeros, group_size=64, bits=bits)
    assert np.array_equal(np.array(unpacked), codes.astype(np.float32))


@pytest.mark.parametrize("name", ONE_SCALE)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-4, 1e2))
@settings(max_examples=8, deadline=None)
def test_no_row_is_further_off_than_by_the_plain_rule(name, seed, spread):
    scheme, rows = SCHEMES[name], weights(seed=seed, spread=spread)
    plain = error(rows, plainly_stored(rows, scheme, mx.float32), scheme)
    best = error(rows, best_stored(rows, scheme, mx.float32), scheme)
    assert (best <= plain * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "nvfp4", "mxfp4", "nf4"])
def test_the_error_of_a_normal_weight_is_at_least_three_percent_smaller(name):
    scheme, rows = SCHEMES[name], weights(64, 256)
    plain = error(rows, plainly_stored(rows, scheme, mx.bfloat16), scheme).sum() ** 0.5
    best = error(rows, best_stored(rows, scheme, mx.bfloat16), scheme).sum() ** 0.5
    assert best < 0.97 * plain


@pytest.mark.parametrize("name", ONE_SCALE)
def test_weights_on_a_grid_come_back_to_the_bit_when_nothing_was_added(name):
    scheme = SCHEMES[name]
    before = plainly_stored(weights(), scheme, mx.bfloat16)
    rows = restored(before, scheme)
    grid = before if scheme.mode == "affine" else None
    after = best_stored(rows, scheme, mx.bfloat16, grid=grid, basis=direction(rows.shape[1])[:, None])
    assert mx.allclose(restored(after, scheme), rows, rtol=1e-6, atol=0).item()


@pytest.mark.parametrize("width", [256, 96])
@pytest.mark.parametrize("name", ["int4", "int2"])
def test_a_row_of_equal_weights_is_kept(name, width):
    scheme = Scheme(name, "affine", SCHEMES[name].bits, 32)
    rows = mx.full((2, width), 0.25)
    assert mx.array_equal(restored(best_stored(rows, scheme, mx.bfloat16), scheme), rows).item()
    zeros = mx.zeros((2, width))
    assert mx.array_equal(restored(best_stored(zeros, scheme, mx.bfloat16), scheme), zeros).item()


def direction(width, seed=5):
    """A unit vector."""
    v = mx.random.normal((width,), key=mx.random.key(seed))
    return v / mx.linalg.norm(v)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "nf4"])
def test_a_small_update_of_weights_on_a_grid_survives_along_its_direction(name):
    """An update of a tenth of a step falls back to the old codes, unless the error is fed back."""
    scheme, width = SCHEMES[name], 512
    base = restored(plainly_stored(weights(64, width), scheme, mx.bfloat16), scheme)
    basis = direction(width)[:, None]
    rows = base + 0.02 * 0.8 * mx.random.normal((64, 1), key=mx.random.key(9)) @ basis.T

    def survived(parts):
        wanted, kept = (rows - base) @ basis, (restored(parts, scheme) - base) @ basis
        return float(((kept * wanted).sum() / wanted.square().sum()).item())

    assert survived(plainly_stored(rows, scheme, mx.bfloat16)) < 0.5
    assert survived(best_stored(rows, scheme, mx.bfloat16, basis=basis)) == pytest.approx(1, abs=0.1)


def test_new_scales_get_new_codes():
    rows = weights()
    scheme = SCHEMES["nf4"]
    absmax = plainly_stored(rows, scheme, mx.float32)["absmax"] * 0.5
    words = recoded(rows, absmax, scheme.group_size)
    values = absmax[..., None] * mx.array(np.array(nf4.NF4, np.float32))
    nearest = mx.abs(rows.reshape(16, -1, 64, 1) - values[:, :, None]).min(axis=-1).reshape(rows.shape)
    stored = restored({"weight": words, "absmax": absmax}, scheme)
    assert mx.allclose(mx.abs(stored - rows), nearest, atol=1e-8).item()
