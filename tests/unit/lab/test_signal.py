"""lab/signal.py: the 6 dB rule, and where the noise model holds and fails."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.signal import (
    DB_PER_BIT,
    noise_report,
    requantized,
    sampled_signal,
    slope_db_per_bit,
    snr_db,
    step_size,
)

BITS = list(range(6, 15))
N = 16384


@pytest.mark.parametrize(("name", "offset"), [("uniform", 0.0), ("sine", 1.76)])
def test_each_bit_gives_six_decibels(name, offset):
    x = sampled_signal(name, 50_000, np.random.default_rng(0))
    snr = [snr_db(x, requantized(x, bits)) for bits in BITS]
    assert slope_db_per_bit(BITS, snr) == pytest.approx(6.02, abs=0.05)
    assert np.array(snr) - DB_PER_BIT * np.array(BITS) == pytest.approx(np.full(len(BITS), offset), abs=0.4)


@given(st.floats(-1, 1), st.integers(1, 16))
def test_no_error_within_full_scale_is_larger_than_half_a_step(x, bits):
    assert abs(requantized(np.array([x]), bits)[0] - x) <= step_size(bits) * (0.5 + 1e-9)


@given(st.integers(1, 8))
def test_so_many_bits_give_so_many_levels(bits):
    y = requantized(np.linspace(-1.5, 1.5, 5000), bits)
    assert len(np.unique(y)) == 2**bits
    assert (np.diff(y) >= 0).all()


def report(name, bits, dither="none"):
    rng = np.random.default_rng(3)
    x = sampled_signal(name, N, rng) * (1 - 2 * step_size(bits))
    return noise_report(x, requantized(x, bits, dither, rng), bits)


@pytest.mark.parametrize("bits", [8, 12])
def test_noise_of_a_busy_signal_at_many_bits_is_the_models(bits):
    found = report("uniform", bits)
    assert found.is_uniform
    assert found.power_ratio == pytest.approx(1, abs=0.05)
    assert abs(found.correlation) < 0.03
    assert found.tonality_db < 12


def test_noise_of_a_tone_is_not():
    found = report("tone", 4)
    assert not found.is_uniform
    assert found.tonality_db > 25


def test_noise_of_few_bits_follows_the_signal():
    assert report("sine", 3).correlation < -0.3


def test_subtractive_dither_makes_the_model_true_for_a_tone():
    found = report("tone", 4, "subtractive")
    assert found.is_uniform
    assert found.power_ratio == pytest.approx(1, abs=0.05)
    assert abs(found.correlation) < 0.03
    assert found.tonality_db < 12


def test_triangular_dither_takes_three_times_the_power_and_leaves_no_tone():
    found = report("tone", 5, "triangular")
    assert found.power_ratio == pytest.approx(3, abs=0.15)
    assert found.tonality_db < 12
    assert not found.is_uniform


@pytest.mark.parametrize(
    ("dither", "is_steady"), [("none", False), ("subtractive", True), ("triangular", True)]
)
def test_noise_power_follows_the_input_unless_it_is_dithered(dither, is_steady):
    rng, step = np.random.default_rng(0), step_size(4)
    powers = [
        np.mean(np.square(requantized(np.full(20_000, level), 4, dither, rng) - level)) / step**2
        for level in (0.1 * step, 0.5 * step)
    ]
    assert (powers[0] == pytest.approx(powers[1], rel=0.05)) == is_steady


def test_snr_of_what_is_the_same_is_infinite_and_of_twice_the_noise_six_decibels_less():
    x = np.ones(4)
    assert snr_db(x, x) == float("inf")
    assert snr_db(x, x + 0.1) - snr_db(x, x + 0.2) == pytest.approx(6.0206, abs=1e-3)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no signal"):
        sampled_signal("square", 8, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="dither"):
        requantized(np.zeros(3), 4, "subtractive")
    with pytest.raises(ConfigError, match="dither"):
        requantized(np.zeros(3), 4, "gaussian", np.random.default_rng(0))
