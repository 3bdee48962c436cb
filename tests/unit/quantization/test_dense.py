"""quantization/dense.py: the same numbers through unpacked weights."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qlora.objective.loss import Objective, objective_for
from mlx_qlora.quantization.dense import MIN_ROWS, dense_products, product
from mlx_qlora.training.recompute import recomputed
from tests.tiny import random_batch, tiny_llama, tiny_model, with_lora
from tests.unit.objective.test_fused import assert_equal, gradients

KEYS = mx.random.split(mx.random.key(5), 6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # qwen2 has biases
def test_loss_and_every_gradient_are_those_of_quantized_products(name, compiled):
    model, batch = with_lora(tiny_model(name), dropout=0.3), random_batch([9, 40])
    plain = gradients(Objective(model, None), batch, keys=KEYS)
    with dense_products(model, enabled=True):
        assert_equal(plain, gradients(objective_for(model), batch, compiled=compiled, keys=KEYS))


def test_with_gradient_checkpointing_too():
    model, batch = with_lora(tiny_llama(), dropout=0.3), random_batch([9, 40])
    plain = gradients(Objective(model, None), batch, keys=KEYS)
    with recomputed(list(model.layers)), dense_products(model, enabled=True):
        assert_equal(plain, gradients(objective_for(model), batch, keys=KEYS))


@pytest.mark.parametrize(("mode", "group", "bits"), [("affine", 64, 3), ("mxfp4", 32, 4), ("nvfp4", 16, 4)])
def test_any_format_is_unpacked(mode, group, bits):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), group, bits, mode=mode)
    x = mx.random.normal((MIN_ROWS, 64), key=mx.random.key(0))
    assert mx.allclose(product(x, layer), layer(x), rtol=1e-5, atol=1e-5)


def test_few_rows_stay_with_the_quantized_product():
    model = tiny_llama()
    layer = model.layers[0].self_attn.q_proj
    with dense_products(model, enabled=True):
        few = layer(mx.ones((MIN_ROWS - 1, 64)))
    assert mx.array_equal(few, layer(mx.ones((MIN_ROWS - 1, 64))))


def test_the_layers_are_themselves_again_after_an_error():
    model = tiny_llama()

    def fail():
        with dense_products(model, enabled=True):
            assert type(model.layers[0].self_attn.q_proj) is not nn.QuantizedLinear
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear
    with dense_products(model, enabled=False):
        assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear


def test_no_unpacked_weight_is_kept():
    layers = [nn.QuantizedLinear(512, 512, bias=False, group_size=64, bits=4) for _ in range(12)]
    mx.eval([layer.parameters() for layer in layers])

    def through(x):
        for layer in layers:
            x = product(x, layer)
        return x.sum()

    x = mx.ones((MIN_ROWS, 512))
    mx.eval(x)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(through)(x))
    one_weight = 4 * 512 * 512
    assert mx.get_peak_memory() - before < 6 * one_weight  # of twelve
