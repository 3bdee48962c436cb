"""Layers on sixteen codes: the numbers and gradients of their unpacked weights, in flat memory."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.lora.layers import LoRALinear, linear_shape
from mlx_qlora.objective.loss import Objective, objective_for
from mlx_qlora.quantization import dense, nf4
from mlx_qlora.quantization.dense import unpacked
from mlx_qlora.quantization.nf4_layers import NF4Embedding, NF4Linear, quantize_layers, quantized
from tests.tiny import random_batch, tiny_model, with_lora
from tests.unit.objective.test_fused import CHUNK, gradients

MODES = ["nf4", "nf4-dq"]
FORMATS = [(32, "nf4"), (64, "nf4"), (32, "nf4-dq"), (64, "nf4-dq")]
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture(params=[True, False], ids=["BLAS", "no BLAS"])
def few_rows_at_a_time(request, monkeypatch):
    """Blocks of 100 rows, which divide neither the weights below nor their blocks of 256 scales."""
    monkeypatch.setattr(dense, "blas_is_fast", lambda: request.param)
    monkeypatch.setattr(dense, "block_rows", lambda _width: 100)


def linear(width=192, num_rows=330, *, bias=True, seed=0):
    layer = nn.Linear(width, num_rows, bias=bias)
    layer.weight = mx.random.normal(layer.weight.shape, key=mx.random.key(seed)) * 0.1
    return layer


def weight_of(layer):
    """The whole weight, by the functions that bitsandbytes is compared with."""
    packed = layer.weight.view(mx.uint8)
    absmax = layer.absmax.reshape(-1)
    if "offset" in layer:
        absmax = nf4.dequantize_absmax(absmax, layer.nested_absmax, layer.offset)
    return nf4.dequantize(packed, absmax, (layer.weight.shape[0], 8 * layer.weight.shape[1]))


def relative_error(a, b):
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


@COMPILED
@pytest.mark.parametrize(("group_size", "mode"), FORMATS)
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_output_and_gradient_are_those_of_the_unpacked_weight(group_size, mode, compiled):
    layer = NF4Linear.from_linear(linear(), group_size, mode)
    weight, x = weight_of(layer), mx.random.normal((2, 20, 192), key=mx.random.key(1))

    def loss(x):
        return (layer(x) ** 2).sum()

    def expected(x):
        return ((x @ weight.T + layer.bias) ** 2).sum()

    function = mx.value_and_grad(loss)
    value, grad = (mx.compile(function) if compiled else function)(x)
    wanted, wanted_grad = mx.value_and_grad(expected)(x)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_error(grad, wanted_grad) < 1e-5


@pytest.mark.parametrize(("group_size", "mode"), FORMATS)
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_an_embedding_gives_rows_and_is_a_head(group_size, mode):
    table = nn.Embedding(330, 192)
    layer = NF4Embedding.from_embedding(table, group_size, mode)
    weight, tokens = weight_of(layer), mx.array([[0, 329, 7], [128, 7, 255]])
    assert mx.array_equal(layer(tokens), weight[tokens]).item()
    assert mx.array_equal(layer(mx.array(200)), weight[200]).item()
    x = mx.random.normal((20, 192), key=mx.random.key(1))
    assert relative_error(layer.as_linear(x), x @ weight.T) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_some_rows_are_those_of_the_whole_weight(mode):
    layer = NF4Linear.from_linear(linear(), 64, mode)
    weight, after = weight_of(layer), mx.zeros((1,))
    for rows in (slice(None), slice(0, 1), slice(85, 300), slice(300, 330)):
        assert mx.array_equal(unpacked(layer, after, rows), weight[rows]).item()


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_frozen_and_tells_its_shape(mode):
    layer = NF4Linear.from_linear(linear(), 64, mode)
    layer.unfreeze()
    layer.freeze()
    assert layer.trainable_parameters() == {}
    assert linear_shape(layer) == (192, 330)
    fresh = NF4Linear(192, 330, True, 64, mode)
    shapes = {name: (array.shape, array.dtype) for name, array in fresh.parameters().items()}
    assert shapes == {name: (array.shape, array.dtype) for name, array in layer.parameters().items()}


def test_bfloat16_in_gives_bfloat16_out():
    table = nn.Embedding(40, 64)
    table.set_dtype(mx.bfloat16)
    layer = NF4Linear.from_linear(linear(64, 40, bias=False))
    x = NF4Embedding.from_embedding(table)(mx.array([1, 2]))
    assert x.dtype == layer(x).dtype == mx.bfloat16
    assert layer.absmax.dtype == mx.float32


@pytest.mark.parametrize("mode", MODES)
def test_low_rank_layers_train_on_it_and_change_nothing_before(mode):
    base = NF4Linear.from_linear(linear(), 64, mode)
    layer = LoRALinear(base, rank=4, scale=2.0, dropout=0.0, key=mx.random.key(2))
    layer.linear.freeze()
    x = mx.random.normal((5, 192), key=mx.random.key(1))
    assert mx.array_equal(layer(x), base(x)).item()
    assert {name for name, _ in tree_flatten(layer.trainable_parameters())} == {"lora_a", "lora_b"}


def in_nf4(name, mode):
    """A tiny model of that architecture in NF4, and the same numbers in float32."""
    model, same = tiny_model(name, bits=None), tiny_model(name, bits=None)
    modules, weights = dict(model.named_modules()), {}
    quantize_layers(model, lambda _path, _module: {"group_size": 32, "bits": 4, "mode": mode})
    for path, layer in model.named_modules():
        if isinstance(layer, NF4Linear | NF4Embedding):
            bias = {"bias": modules[path].bias} if "bias" in layer else {}
            layer.update({**quantized(modules[path].weight, 32, mode), **bias})
            weights[f"{path}.weight"] = weight_of(layer)
    same.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters(), same.parameters())
    return model, same


@COMPILED
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])  # an own head, a tied one, one with a soft-cap
@pytest.mark.usefixtures("few_rows_at_a_time")
def test_a_whole_model_has_the_loss_and_gradients_of_its_unpacked_weights(name, mode, compiled, monkeypatch):
    monkeypatch.setattr(dense, "block_rows", lambda _width: 24)
    model, same = in_nf4(name, mode)
    batch = random_batch([9, 40])
    ours = gradients(objective_for(with_lora(model), CHUNK), batch, compiled=compiled)
    theirs = gradients(Objective(with_lora(same), None), batch)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    worst = max(relative_error(ours[1][key], theirs[1][key]) for key in theirs[1])
    assert worst < 1e-5


@COMPILED
@pytest.mark.parametrize("mode", MODES)
def test_memory_does_not_grow_with_the_number_of_layers(mode, compiled):
    source = linear(512, 512, bias=False)
    layers = [NF4Linear.from_linear(source, 64, mode) for _ in range(48)]
    mx.eval([layer.parameters() for layer in layers])

    def peak_bytes(count):
        def through(x):
            for layer in layers[:count]:
                x = layer(x)
            return x.sum()

        graph = mx.compile(mx.grad(through)) if compiled else mx.grad(through)
        x = mx.ones((16, 512))
        mx.eval(x)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(graph(x))
        return mx.get_peak_memory() - before

    one_weight = 4 * 512 * 512
    assert peak_bytes(48) - peak_bytes(16) < 2 * one_weight  # of thirty-two more


def test_layers_of_several_formats_stand_side_by_side():
    model = tiny_model("llama", bits=None)
    formats = {
        "lm_head": {"group_size": 64, "bits": 8, "mode": "affine"},
        "model.embed_tokens": None,
    }
    quantize_layers(model, lambda path, _: formats.get(path, {"group_size": 64, "bits": 4, "mode": "nf4"}))
    assert type(model.lm_head) is nn.QuantizedLinear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.layers[0].mlp.up_proj) is NF4Linear
