"""quantization/dense.py: the same numbers through unpacked weights."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qlora.objective import fused
from mlx_qlora.objective.loss import Objective, objective_for
from mlx_qlora.quantization import dense
from mlx_qlora.quantization.dense import MIN_ROWS, dense_products, product, use_dense_products
from mlx_qlora.training.recompute import recomputed
from tests.tiny import random_batch, tiny_llama, tiny_model, with_lora
from tests.unit.objective.test_fused import CHUNK, assert_equal, gradients

KEYS = mx.random.split(mx.random.key(5), 6)


@pytest.fixture(params=[True, False], ids=["BLAS", "no BLAS"], autouse=True)
def has_blas(request, monkeypatch):
    """What is unpacked, and how, depends on it; the numbers do not."""
    monkeypatch.setattr(dense, "blas_is_fast", lambda: request.param)
    return request.param


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # qwen2 has biases
def test_loss_and_every_gradient_are_those_of_quantized_products(name, compiled):
    model, batch = with_lora(tiny_model(name), dropout=0.3), random_batch([9, 40])
    plain = gradients(Objective(model, None), batch, keys=KEYS)
    with dense_products(model, enabled=True):
        assert_equal(plain, gradients(objective_for(model, CHUNK), batch, compiled=compiled, keys=KEYS))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_head_is_unpacked_once_for_all_chunks_and_gives_the_same_numbers(bits, monkeypatch):
    model, batch = with_lora(tiny_llama(bits=bits)), random_batch([9, 40])
    monkeypatch.setattr(fused, "use_dense_products", lambda: False)
    plain = gradients(objective_for(model, CHUNK), batch)
    monkeypatch.setattr(fused, "use_dense_products", lambda: True)
    assert_equal(plain, gradients(objective_for(model, CHUNK), batch))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_with_gradient_checkpointing_too(compiled):
    model, batch = with_lora(tiny_llama(), dropout=0.3), random_batch([9, 40])
    plain = gradients(Objective(model, None), batch, keys=KEYS)
    with recomputed(list(model.layers)), dense_products(model, enabled=True):
        assert_equal(plain, gradients(objective_for(model), batch, compiled=compiled, keys=KEYS))


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


def kinds(model) -> list[type]:
    """The class of every module."""
    return [type(module) for _, module in model.named_modules()]


def test_the_layers_are_themselves_again_after_an_error():
    model = tiny_llama()
    before = kinds(model)

    def fail():
        with dense_products(model, enabled=True):
            assert nn.QuantizedLinear not in kinds(model)
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert kinds(model) == before
    with dense_products(model, enabled=False):
        assert kinds(model) == before


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_memory_does_not_grow_with_the_number_of_layers(compiled):
    layers = [nn.QuantizedLinear(512, 512, bias=False, group_size=64, bits=4) for _ in range(24)]
    mx.eval([layer.parameters() for layer in layers])

    def peak_bytes(count):
        def through(x):
            for layer in layers[:count]:
                x = product(x, layer)
            return x.sum()

        graph = mx.compile(mx.grad(through)) if compiled else mx.grad(through)
        x = mx.ones((MIN_ROWS, 512))
        mx.eval(x)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(graph(x))
        return mx.get_peak_memory() - before

    one_weight = 4 * 512 * 512
    assert peak_bytes(24) - peak_bytes(8) < 3 * one_weight  # of sixteen more


def test_a_bfloat16_layer_is_multiplied_in_float32():
    linear = nn.Linear(64, 32, bias=False)
    linear.set_dtype(mx.bfloat16)
    layer = nn.QuantizedLinear.from_linear(linear, 64, 4)
    x = mx.random.normal((MIN_ROWS, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    weight = mx.dequantize(layer.weight, scales, biases, group_size=64, bits=4)

    y, (grad,) = mx.vjp(lambda x: product(x, layer), [x], [mx.ones((MIN_ROWS, 32), mx.bfloat16)])

    assert y[0].dtype == grad.dtype == mx.bfloat16
    assert mx.array_equal(y[0], (x.astype(mx.float32) @ weight.T).astype(mx.bfloat16))
    assert mx.array_equal(grad, (mx.ones((MIN_ROWS, 32)) @ weight).astype(mx.bfloat16))


def test_another_model_is_left_alone():
    model, other = tiny_llama(), tiny_llama()
    with dense_products(model, enabled=True), dense_products(model, enabled=True):
        assert type(other.layers[0].self_attn.q_proj) is nn.QuantizedLinear
        assert type(model.layers[0].self_attn.q_proj) is not nn.QuantizedLinear
    assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear


def test_it_rests_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dense.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    model = tiny_llama()
    assert not use_dense_products()
    with dense_products(model):
        assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear
