"""lab/calculator.py"""

import pytest

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.calculator import (
    MODELS,
    Device,
    adam_bytes,
    devices,
    lora_parameters,
    lora_plan,
    num_devices,
    stored_bytes,
    weight_bytes,
)
from mlx_qlora.memory.plan import GIB, mac_budget

TINY, SEVEN, THIRTEEN, SEVENTY = MODELS
MAC = mac_budget(64 * GIB)


def test_parameters_are_those_the_models_were_published_with():
    counts = [shape.num_parameters for shape in MODELS]
    assert counts == [1_100_048_384, 6_738_415_616, 13_015_864_320, 68_976_648_192]


@pytest.mark.parametrize(
    ("billions", "number_format", "gigabytes"),
    [(7, "FP32", 28), (7, "FP16", 14), (7, "BF16", 14), (7, "INT8", 7), (7, "INT4", 3.5), (70, "INT4", 35)],
)
def test_the_courses_table(billions, number_format, gigabytes):
    assert weight_bytes(billions * 10**9, number_format) == gigabytes * 1e9


def test_a_cache_is_keys_and_values_of_every_layer():
    assert SEVEN.kv_cache_bytes(1) == 2 * 32 * 4096 * 2  # half a MiB per token
    assert SEVENTY.kv_cache_bytes(1) == 2 * 80 * 1024 * 2  # eight heads for 64
    assert SEVEN.kv_cache_bytes(4096, num_sequences=3, bits=8) == 3 * GIB


def test_int4_takes_four_and_a_half_bits_and_norms_sixteen():
    bits = 8 * stored_bytes(SEVEN, "int4") / SEVEN.num_parameters
    assert bits == pytest.approx(4.5, abs=0.001)
    assert stored_bytes(SEVEN, None) == 2 * SEVEN.num_parameters


def test_training_by_adam_takes_sixteen_bytes_a_parameter():
    assert adam_bytes(7 * 10**9) == 112 * 10**9


def test_adapters_are_two_thin_matrices_on_three_layers():
    assert lora_parameters(SEVEN, 8) == 32 * 3 * 8 * (4096 + 4096)
    assert lora_parameters(SEVENTY, 8) == 80 * 8 * ((8192 + 8192) + 2 * (8192 + 1024))


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_qlora_needs_less_than_lora_and_lora_less_than_adam(shape):
    qlora, lora = (lora_plan(shape, scheme, MAC).needed_bytes for scheme in ("int4", None))
    assert stored_bytes(shape, "int4") < qlora < lora < adam_bytes(shape.num_parameters)
    assert lora - qlora == stored_bytes(shape, None) - stored_bytes(shape, "int4")


def test_what_a_step_takes_grows_with_the_row():
    plans = [lora_plan(SEVEN, "int4", MAC, num_tokens=n) for n in (512, 1024)]
    of_a_step = ("activations", "attention", "loss")
    short, long = (sum(plan.parts[part] for part in of_a_step) for plan in plans)
    assert short > 0
    assert 1.5 * short < long < 2.5 * short  # the peak may come in another phase


def test_longer_rows_and_higher_ranks_take_more():
    least = lora_plan(SEVEN, "int4", MAC, num_tokens=128).needed_bytes
    assert lora_plan(SEVEN, "int4", MAC, num_tokens=1024).needed_bytes > least
    assert lora_plan(SEVEN, "int4", MAC, num_tokens=128, rank=64).needed_bytes > least


def test_devices_are_as_many_as_hold_it():
    device = Device("ten", 10)
    assert [num_devices(n, device) for n in (1, 10, 11, 95)] == [1, 1, 2, 10]
    assert {d.name: d.usable_bytes for d in devices()}["Mac 64GB"] == 48 * GIB


def test_a_format_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="FP8"):
        weight_bytes(1, "FP8")
