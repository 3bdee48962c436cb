"""lab/accumulators.py: the bound is tight, and an overflow is a real one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.accumulators import (
    CodeRange,
    accumulated,
    bits_needed,
    integer_product,
    product_range,
    safe_terms,
    worst_codes,
)
from mlx_qlora.lab.linear import LinearScheme, quantize


def code_range(bits: int, kind: str) -> CodeRange:
    return CodeRange.unsigned(bits) if kind == "u" else CodeRange.signed(bits, is_restricted=kind == "r")


RANGES = st.builds(code_range, st.integers(2, 8), st.sampled_from("usr"))
PER = st.sampled_from(["tensor", "channel"])
BYTES = [code_range(8, kind) for kind in "usr"]


def test_int8_in_int32_is_safe_to_131071_products():
    assert safe_terms(CodeRange.signed(8), CodeRange.signed(8), 32) == 131071
    assert CodeRange.signed(8, is_restricted=True) == CodeRange(-127, 127)


def check_bound(a: CodeRange, b: CodeRange, width: int) -> None:
    num_terms = safe_terms(a, b, width)
    x, y = worst_codes(num_terms + 1, a, b)
    true = (num_terms + 1) * int(x[0]) * int(y[0])
    assert accumulated(x, y, 64) == true
    assert not -(2 ** (width - 1)) <= true < 2 ** (width - 1)
    assert accumulated(x, y, width) == (true + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
    assert accumulated(x[:-1], y[:-1], width) == num_terms * int(x[0]) * int(y[0])
    for product in product_range(a, b):
        assert -(2 ** (width - 1)) <= num_terms * product < 2 ** (width - 1)


@settings(deadline=None)
@given(RANGES, RANGES)
def test_the_bound_holds_and_one_product_more_overflows_for_real(a, b):
    check_bound(a, b, 16)


@pytest.mark.parametrize("a", BYTES, ids=str)
@pytest.mark.parametrize("b", BYTES, ids=str)
def test_bytes_overflow_int32_at_the_bound_for_real(a, b):
    check_bound(a, b, 32)


@given(RANGES, RANGES, st.integers(1, 10**6))
def test_the_narrowest_accumulator_holds_the_sum_and_a_narrower_one_does_not(a, b, num_terms):
    bits = bits_needed(num_terms, a, b)
    assert safe_terms(a, b, bits) >= num_terms > safe_terms(a, b, bits - 1)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["tensor", "channel"]),
)
def test_a_product_of_codes_is_the_product_of_what_they_stand_for(seed, bits, x_symmetric, w_symmetric, per):
    rng = np.random.default_rng(seed)
    x = quantize(rng.normal(0.3, 1, (5, 33)), LinearScheme(bits, x_symmetric, "tensor"))
    weight = quantize(rng.normal(-0.2, 1, (7, 33)), LinearScheme(bits, w_symmetric, per))
    wanted = x.dequantized() @ weight.dequantized().T
    assert integer_product(x, weight) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_a_product_that_could_overflow_is_refused():
    limit = safe_terms(CodeRange.signed(16), CodeRange.signed(16))
    rows = np.ones((1, limit + 1))
    codes = quantize(rows, LinearScheme(16, True, "tensor"))
    with pytest.raises(ConfigError, match="overflow"):
        integer_product(codes, codes)
    fits = quantize(rows[:, :limit], LinearScheme(16, True, "tensor"))
    assert integer_product(fits, fits) == pytest.approx(limit)


def test_scales_along_the_sum_are_refused():
    x = quantize(np.ones((2, 4)), LinearScheme(8, True, "tensor"))
    with pytest.raises(ConfigError, match="per tensor"):
        integer_product(x, quantize(np.ones((2, 4)), LinearScheme(8, True, "group", 2)))
    with pytest.raises(ConfigError, match="per tensor"):
        integer_product(quantize(np.ones((2, 4)), LinearScheme(8)), x)


def test_what_no_machine_has_is_refused():
    with pytest.raises(ConfigError, match="Accumulators"):
        accumulated(np.ones(1), np.ones(1), 12)
    with pytest.raises(ConfigError, match="zero"):
        safe_terms(CodeRange(0, 0), CodeRange.signed(8))
