"""Every scheme MLX has, and a clear refusal of every other."""

from itertools import product

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.nf4_layers import quantized
from mlx_qlora.quantization.schemes import SCHEMES, UNQUANTIZED, Scheme, checked, resolve, scheme_named

MODES = ["affine", "mxfp4", "mxfp8", "nvfp4"]
OURS = ["nf4", "nf4-dq"]


def mlx_accepts(scheme: Scheme) -> bool:
    x = mx.random.normal((2, 256)).astype(mx.bfloat16)
    try:
        q = mx.quantize(x, scheme.group_size, scheme.bits, mode=scheme.mode)
        format_of = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}
        mx.eval(mx.quantized_matmul(x, *q, transpose=True, **format_of))
    except ValueError:
        return False
    return True


def we_accept(scheme: Scheme) -> bool:
    try:
        checked(scheme)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("mode", MODES)
def test_exactly_what_mlx_quantizes_and_multiplies_is_accepted(mode):
    # One bit, which MLX has, is no base anyone can train on.
    for bits, group_size in product(range(2, 10), [8, 16, 32, 64, 128, 256]):
        scheme = Scheme("any", mode, bits, group_size)
        assert we_accept(scheme) == mlx_accepts(scheme), scheme


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("dtype", "scale_bits"), [(mx.bfloat16, 16), (mx.float32, 32)])
def test_stored_bytes_are_those_that_are_stored(scheme, dtype, scale_bits):
    x = mx.random.normal((16, 256)).astype(dtype)
    if scheme.is_codebook:
        parts = tuple(quantized(x, scheme.group_size, scheme.mode).values())
    else:
        parts = mx.quantize(x, scheme.group_size, scheme.bits, mode=scheme.mode)
    num_bytes = sum(part.nbytes for part in parts)
    assert scheme.stored_bytes(x.size, scale_bits) == num_bytes
    # Double quantization rounds its scales up to whole blocks, and keeps one number for all.
    rounding = 64 / x.size if scheme.mode == "nf4-dq" else 0
    assert 0 <= 8 * num_bytes / x.size - scheme.bits_per_weight(scale_bits) <= rounding


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_found_by_its_name_and_resolves_to_itself(name):
    assert resolve(QuantizationConfig(scheme=name)) == scheme_named(name) == SCHEMES[name]
    assert checked(SCHEMES[name]) == SCHEMES[name]


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_some_names_keep_the_checkpoint_as_it_is(name):
    assert resolve(QuantizationConfig(scheme=name)) is None


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Scheme("int4", "affine", 4, 64)),
        ({"bits": 8}, Scheme("int8", "affine", 8, 64)),
        ({"group_size": 32}, Scheme("int4", "affine", 4, 32)),
        ({"scheme": "int8", "group_size": 128}, Scheme("int8", "affine", 8, 128)),
        ({"mode": "mxfp4"}, Scheme("mxfp4", "mxfp4", 4, 32)),
        ({"mode": "nvfp4"}, Scheme("nvfp4", "nvfp4", 4, 16)),
        ({"mode": "mxfp8", "bits": 8}, Scheme("mxfp8", "mxfp8", 8, 32)),
        ({"scheme": "nf4", "group_size": 32}, Scheme("nf4", "nf4", 4, 32)),
        ({"mode": "nf4-dq"}, Scheme("nf4-dq", "nf4-dq", 4, 64)),
        ({"scheme": "mxfp4", "mode": "affine", "bits": 3}, Scheme("int3", "affine", 3, 64)),
    ],
)
def test_one_part_of_a_scheme_can_be_changed(keys, expected):
    assert resolve(QuantizationConfig(**keys)) == expected


@pytest.mark.parametrize(
    ("keys", "where", "says"),
    [
        ({"scheme": "int44"}, "quantization.scheme", "Did you mean int4"),
        ({"scheme": "q"}, "quantization.scheme", "int2, int3, int4"),
        ({"bits": 7}, "quantization.bits", "2, 3, 4, 5, 6, 8 bits, not 7"),
        ({"mode": "gguf"}, "quantization.mode", "affine, mxfp4, mxfp8, nvfp4"),
        ({"group_size": 48}, "quantization.group_size", "groups of 32, 64, 128, not 48"),
        ({"scheme": "nf4", "group_size": 128}, "quantization.group_size", "groups of 32, 64, not 128"),
        ({"scheme": "nf4-dq", "bits": 8}, "quantization.bits", "nf4-dq has 4 bits, not 8"),
        ({"scheme": "nvfp4", "group_size": 32}, "quantization.group_size", "groups of 16, not 32"),
    ],
)
def test_an_impossible_scheme_says_what_is_possible_and_which_key_to_change(keys, where, says):
    with pytest.raises(ConfigError, match=says) as caught:
        resolve(QuantizationConfig(**keys))
    assert caught.value.where == where


@given(
    scheme=st.sampled_from([*SCHEMES, "none", "int99", ""]),
    bits=st.none() | st.integers(1, 64),
    group_size=st.none() | st.integers(1, 256),
    mode=st.none() | st.sampled_from([*MODES, *OURS, "x"]),
)
def test_a_configuration_gives_a_scheme_mlx_has_or_a_config_error(scheme, bits, group_size, mode):
    config = QuantizationConfig(scheme=scheme, bits=bits, group_size=group_size, mode=mode)
    try:
        resolved = resolve(config)
    except ConfigError:
        return
    assert resolved is None or resolved.is_codebook or mlx_accepts(resolved)


def test_a_mode_alone_takes_its_own_width_and_group():
    scheme = resolve(QuantizationConfig(mode="mxfp8"))
    assert (scheme.name, scheme.bits, scheme.group_size) == ("mxfp8", 8, 32)


def test_bits_per_weight_of_nf4_are_those_of_its_paper():
    assert SCHEMES["nf4"].bits_per_weight() == 4.5
    assert SCHEMES["nf4-dq"].bits_per_weight() == pytest.approx(4.127, abs=1e-3)
