"""lora/layers.py"""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.layers import LoRALinear, linear_shape, lora_scale, set_dropout_keys


def layer(*, dropout: float = 0.0, bits: int | None = 4) -> LoRALinear:
    linear = nn.Linear(64, 128, bias=False)
    base = nn.QuantizedLinear.from_linear(linear, 64, bits) if bits else linear
    return LoRALinear(base, rank=4, scale=2.0, dropout=dropout, key=mx.random.key(1))


def test_a_new_layer_computes_exactly_what_its_base_does():
    x = mx.random.normal((3, 5, 64), key=mx.random.key(0))
    lora = layer()
    assert mx.array_equal(lora(x), lora.linear(x))


def test_the_update_is_scale_times_x_a_b():
    x, lora = mx.random.normal((3, 64), key=mx.random.key(0)), layer(bits=None)
    lora.lora_b = mx.random.normal((4, 128), key=mx.random.key(2))
    expected = x @ (lora.linear.weight.T + 2.0 * lora.lora_a @ lora.lora_b)
    assert mx.allclose(lora(x), expected, atol=1e-4)


def test_a_bfloat16_input_stays_bfloat16_while_the_matrices_stay_float32():
    lora = layer()
    lora.linear.set_dtype(mx.bfloat16)
    assert lora(mx.ones((2, 64), mx.bfloat16)).dtype == mx.bfloat16
    assert lora.lora_a.dtype == lora.lora_b.dtype == mx.float32


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 6, 8])
def test_features_are_read_from_any_base(bits):
    assert linear_shape(layer(bits=bits).linear) == (64, 128)


def test_dropout_scales_what_it_keeps_and_depends_on_the_key_alone():
    lora = layer(dropout=0.5, bits=None).train()
    lora.lora_a, lora.lora_b = mx.eye(64), mx.eye(64, 128)
    lora.linear.weight = mx.zeros((128, 64))
    set_dropout_keys([lora], mx.random.split(mx.random.key(7), 1))
    x = mx.ones((200, 64))
    first, again = lora(x), lora(x)
    assert mx.array_equal(first, again)
    assert set(first[:, :64].flatten().tolist()) == {0.0, 4.0}  # scale 2, kept half scaled by 2
    assert abs(first[:, :64].mean().item() - 2.0) < 0.1
    set_dropout_keys([lora], mx.random.split(mx.random.key(8), 1))
    assert not mx.array_equal(first, lora(x))


def test_without_a_key_or_out_of_training_nothing_is_dropped():
    lora, x = layer(dropout=0.9), mx.ones((2, 64))
    lora.lora_b = mx.ones((4, 128))
    plain = lora.train()(x)
    set_dropout_keys([lora], mx.random.split(mx.random.key(7), 1))
    assert mx.array_equal(lora.eval()(x), plain)
    set_dropout_keys([lora], None)
    assert mx.array_equal(lora.train()(x), plain)


def output_spread(variant: str, rank: int) -> float:
    """Standard deviation of the update's output for random inputs, with the matrices of a trained layer."""
    scale = lora_scale(16, rank, variant)
    lora = LoRALinear(
        nn.Linear(256, 256, bias=False), rank=rank, scale=scale, dropout=0, key=mx.random.key(1)
    )
    lora.lora_b = mx.random.normal((rank, 256), key=mx.random.key(2))
    x = mx.random.normal((500, 256), key=mx.random.key(3))
    return mx.std(lora(x) - lora.linear(x)).item()


def test_with_rslora_a_higher_rank_has_outputs_of_the_same_size_and_without_it_smaller_ones():
    """Kalajdzievski 2023, theorem 3.2: α/√r keeps the second moment of the update in r; α/r lets it fall."""
    low, high = (output_spread("rslora", rank) for rank in (4, 128))
    assert high == pytest.approx(low, rel=0.15)
    low, high = (output_spread("lora", rank) for rank in (4, 128))
    assert high == pytest.approx(low / 32**0.5, rel=0.15)


def test_scale_is_alpha_over_rank_and_a_rank_of_zero_is_refused():
    assert lora_scale(16, 8) == 2
    assert lora_scale(16, 16, "rslora") == 4
    assert lora_scale(16, 8, "dora") == 2
    with pytest.raises(ConfigError, match="rank"):
        lora_scale(16, 0)
