"""lab/w8a16.py: the 8-bit quantizer on models of several makes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.errors import ModelError
from mlx_qlora.lab.w8a16 import W8A16Linear, quantize_linears
from tests.tiny import tiny_llama, tiny_model


class Odd(nn.Module):
    """Layers in a list, in a dictionary, and behind an attribute of another module."""

    def __init__(self):
        super().__init__()
        self.listed = [nn.Linear(8, 8), [nn.Linear(8, 8, bias=False)]]
        self.named = {"first": nn.Linear(8, 4)}
        self.norm = nn.LayerNorm(8)

    def __call__(self, x):
        return self.named["first"](self.listed[1][0](nn.relu(self.listed[0](self.norm(x)))))


def relative(got, wanted):
    return float(mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted))


def test_a_weight_is_within_half_a_step_of_its_channel_and_takes_a_byte():
    linear = nn.Linear(33, 7)
    layer = W8A16Linear.from_linear(linear)
    assert layer.weight.dtype == mx.int8
    assert layer.scale.shape == (7,)
    error = np.abs(np.array(layer.dequantized() - linear.weight))
    assert (error <= np.array(layer.scale)[:, None] * 0.5001).all()
    assert np.abs(np.array(layer.weight)).max(axis=1).tolist() == [127] * 7


def test_the_layer_multiplies_with_what_its_codes_stand_for():
    layer = W8A16Linear.from_linear(nn.Linear(16, 5))
    x = mx.random.normal((3, 16), key=mx.random.key(0))
    assert mx.allclose(layer(x), x @ layer.dequantized().T + layer.bias, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_activations_keep_their_type(dtype):
    linear = nn.Linear(16, 5)
    linear.set_dtype(dtype)
    layer = W8A16Linear.from_linear(linear)
    assert layer(mx.ones((2, 16), dtype)).dtype == layer.scale.dtype == dtype


def test_layers_are_found_in_lists_dictionaries_and_below():
    mx.random.seed(0)
    model, x = Odd(), mx.random.normal((4, 8), key=mx.random.key(1))
    before = model(x)
    done = quantize_linears(model)
    assert set(done.replaced) == {"listed.0", "listed.1.0", "named.first"}
    assert relative(model(x), before) < 0.02
    assert all(type(m) is not nn.Linear for _, m in model.named_modules())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_a_model_of_mlx_lm_is_quantized_and_gives_nearly_the_same_logits(architecture):
    model = tiny_model(architecture, bits=None)
    tokens = mx.array([[3, 14, 15, 92, 65]])
    before = model(tokens)
    mx.eval(before)
    parts = dict(tree_flatten(model.parameters()))
    done = quantize_linears(model, keep=lambda path, _: path == "lm_head")
    sizes = {path: parts[f"{path}.weight"].size for path in done.replaced}
    channels = {path: parts[f"{path}.weight"].shape[0] for path in done.replaced}
    assert done.kept == (("lm_head",) if "lm_head.weight" in parts else ())
    assert done.bytes_before - done.bytes_after == sum(3 * sizes[p] - 4 * channels[p] for p in sizes)
    assert 0 < relative(model(tokens), before) < 0.05


def test_a_replaced_model_is_frozen_passes_gradients_and_comes_back_from_disk(tmp_path):
    model = tiny_llama(bits=None)
    quantize_linears(model)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert not [path for path in trainable if "_proj" in path]
    layer, x = model.layers[0].mlp.up_proj, mx.random.normal((2, 64), key=mx.random.key(0))
    gradient = mx.grad(lambda x: layer(x).sum())(x)
    assert mx.allclose(gradient, mx.broadcast_to(layer.dequantized().sum(axis=0), (2, 64)), atol=1e-4)
    model.save_weights(str(tmp_path / "model.safetensors"))
    other = tiny_llama(bits=None, seed=5)
    quantize_linears(other)
    other.load_weights(str(tmp_path / "model.safetensors"))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(other(tokens), model(tokens))


def test_layers_quantized_already_are_left_alone_and_none_is_an_error():
    with pytest.raises(ModelError, match="no linear layer"):
        quantize_linears(tiny_llama(bits=4))
    with pytest.raises(ModelError, match="1 found, all kept"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), keep=lambda *_: True)


def test_an_empty_channel_has_a_scale_and_a_broken_one_is_refused():
    linear = nn.Linear(4, 2)
    linear.weight = mx.array([[0.0] * 4, [1.0] * 4])
    assert mx.array_equal(W8A16Linear.from_linear(linear).dequantized(), linear.weight)
    linear.weight = mx.array([[float("nan")] * 4] * 2)
    with pytest.raises(ModelError, match="not finite"):
        W8A16Linear.from_linear(linear)
