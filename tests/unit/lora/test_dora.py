"""lora/dora.py"""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_qlora.config import TrainingConfig
from mlx_qlora.lora.dora import DoRALinear, base_squares, weight_times
from mlx_qlora.lora.merge import merged_weight
from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.quantization.dense import dense_products, unpacked
from mlx_qlora.quantization.nf4_layers import NF4Linear
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.recompute import recomputed
from mlx_qlora.training.step import TrainStep
from tests.tiny import random_batch, tiny_llama, with_lora

BASES = [None, 3, 4, 8, "nf4"]


def base(bits: int | str | None = 4, *, bias: bool = False, seed: int = 0) -> nn.Module:
    linear = nn.Linear(64, 128, bias=bias)
    linear.weight = mx.random.normal((128, 64), key=mx.random.key(seed))
    if bias:
        linear.bias = 3 * mx.random.normal((128,), key=mx.random.key(seed + 1))
    linear.freeze()
    if bits == "nf4":
        return NF4Linear.from_linear(linear)
    return nn.QuantizedLinear.from_linear(linear, 64, bits) if bits else linear


def layer(linear: nn.Module, *, noise: float = 0.0, scale: float = 2.0, seed: int = 0) -> DoRALinear:
    """A layer whose B and m are `noise` away from where they begin."""
    dora = DoRALinear(linear, rank=4, scale=scale, dropout=0.0, key=mx.random.key(seed))
    one, other = mx.random.split(mx.random.key(seed + 2))
    dora.lora_b = noise * mx.random.normal(dora.lora_b.shape, key=one)
    dora.m = dora.m * (1 + 0.5 * noise * mx.random.normal(dora.m.shape, key=other))
    return dora


def dense_weight(linear: nn.Module) -> mx.array:
    return unpacked(linear, mx.zeros(0)).astype(mx.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", BASES)
def test_a_new_layer_computes_exactly_what_its_base_does(bits, bias):
    x, linear = mx.random.normal((5, 64), key=mx.random.key(9)), base(bits, bias=bias)
    assert mx.array_equal(layer(linear)(x), linear(x))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.floats(0.01, 3), scale=st.floats(0.1, 8))
def test_each_row_of_the_merged_weight_has_the_length_m(seed, noise, scale):
    linear = base(4, seed=seed)
    dora = layer(linear, noise=noise, scale=scale, seed=seed)
    lengths = mx.linalg.norm(merged_weight(dora, dense_weight(linear)), axis=1)
    assert mx.allclose(lengths, mx.abs(dora.m), rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", BASES)
def test_the_layer_computes_with_the_merged_weight(bits, bias):
    x, linear = mx.random.normal((20, 64), key=mx.random.key(9)), base(bits, bias=bias)
    dora = layer(linear, noise=0.5)
    wanted = x @ merged_weight(dora, dense_weight(linear)).T + (linear.bias if bias else 0)
    assert mx.allclose(dora(x), wanted, atol=1e-4)
    assert mx.allclose(dora.eval()(x), wanted, atol=1e-4)
    assert not mx.allclose(linear(x), wanted, atol=1)


@pytest.mark.parametrize("bits", BASES)
@pytest.mark.parametrize("rank", [4, 20])
def test_lengths_without_the_weight_are_those_of_the_weight(bits, rank):
    linear = base(bits)
    a = mx.random.normal((64, rank), key=mx.random.key(3))
    weight = dense_weight(linear)
    assert mx.allclose(base_squares(linear), mx.square(weight).sum(1), rtol=1e-5)
    assert mx.allclose(weight_times(linear, a), (weight @ a).T, atol=1e-4)


def test_gradients_are_the_papers_with_the_norm_as_a_constant():
    linear, x = base(None), mx.random.normal((20, 64), key=mx.random.key(9))
    dora = layer(linear, noise=0.5)
    trained = {name: dora[name] for name in ("lora_a", "lora_b", "m")}

    def ours(trained):
        dora.update(trained)
        return mx.square(dora(x)).sum()

    def papers(trained):
        adapted = linear.weight + dora.scale * (trained["lora_a"] @ trained["lora_b"]).T
        lengths = mx.stop_gradient(mx.linalg.norm(adapted, axis=1))
        return mx.square(x @ ((trained["m"] / lengths)[:, None] * adapted).T).sum()

    wanted = mx.grad(papers)(trained)
    got = mx.grad(ours)(trained)
    for name, gradient in wanted.items():
        assert mx.allclose(got[name], gradient, rtol=1e-3, atol=1e-3 * mx.abs(gradient).max().item()), name


def test_a_row_of_zeros_stays_one_and_has_no_nan():
    linear = base(None)
    linear.weight[7] = 0.0
    dora, x = layer(linear), mx.random.normal((5, 64), key=mx.random.key(9))
    assert mx.array_equal(dora(x), linear(x))
    assert mx.array_equal(merged_weight(dora, linear.weight)[7], mx.zeros(64))
    trained = {name: dora[name] for name in ("lora_a", "lora_b", "m")}
    gradients = mx.grad(lambda own: mx.square(dora.update(own)(x)).sum())(trained)
    assert all(mx.all(mx.isfinite(gradient)).item() for gradient in gradients.values())


def test_out_of_training_it_can_be_compiled_and_used_again_after_that():
    dora, x = layer(base(), noise=0.5).eval(), mx.random.normal((5, 64), key=mx.random.key(9))
    traced = mx.compile(lambda own, x: dora.update(own)(x))
    trained = {name: dora[name] for name in ("lora_a", "lora_b", "m")}
    in_graph = traced(trained, x)
    dora.update(trained)
    assert mx.allclose(in_graph, dora(x), atol=1e-5)
    assert mx.allclose(dora(x), dora.train()(x), atol=1e-5)


def test_out_of_training_lengths_are_computed_once_and_again_when_the_matrices_change():
    dora = layer(base(), noise=0.5).eval()
    first = dora.adapted_lengths()
    assert dora.adapted_lengths() is first
    dora.lora_b = 2 * dora.lora_b
    assert not mx.allclose(dora.adapted_lengths(), first, rtol=1e-2)
    assert mx.allclose(dora.adapted_lengths(), dora.train().adapted_lengths(), rtol=1e-6)


def test_bfloat16_activations_stay_so_and_m_stays_float32():
    dora = layer(base())
    dora.linear.set_dtype(mx.bfloat16)
    assert dora(mx.ones((2, 64), mx.bfloat16)).dtype == mx.bfloat16
    assert dora.m.dtype == mx.float32


def gradient_peak_bytes(num_layers: int, *, rank: int = 16, width: int = 1024) -> int:
    """The most that gradients through so many layers take, in bytes, over what was there."""
    linear = nn.QuantizedLinear(width, width, bias=False, group_size=64, bits=4)
    layers = [
        DoRALinear(linear, rank=rank, scale=2.0, dropout=0.0, key=mx.random.key(i)) for i in range(num_layers)
    ]
    mx.eval([(dora.parameters(), dora.lengths.base_squares) for dora in layers])
    x = mx.ones((4, width))

    def total(trained):
        y = x
        for dora, own in zip(layers, trained, strict=True):
            dora.update(own)
            y = y + dora(y)
        return y.sum()

    with memory_limits(1), dense_products(nn.Sequential(*layers)):
        trained = [dora.trainable_parameters() for dora in layers]
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(total)(trained))
        for dora, own in zip(layers, trained, strict=True):
            dora.update(own)
        return mx.get_peak_memory() - before


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU unpacks larger blocks")
def test_no_unpacked_weight_is_kept_however_many_layers_there_are():
    few, many = (gradient_peak_bytes(num_layers) for num_layers in (2, 10))
    unpacked_bytes = 4 * 1024 * 1024
    assert many - few < unpacked_bytes / 2
    assert many < 2 * unpacked_bytes


def one_update(**options) -> dict[str, mx.array]:
    """The trained tensors of a tiny DoRA model after one update."""
    training = TrainingConfig(optimizer="sgd", max_grad_norm=None, compile=options.get("compile", False))
    model = with_lora(tiny_llama(), variant="dora", dropout=0.3)
    with recomputed(list(model.layers), enabled=options.get("checkpointing", False)):
        step = TrainStep(objective_for(model), build_optimizer(training), training)
        for number in (1, 2):
            step([random_batch([9, 40, 23])], number, 1e-2)
    return dict(tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize("options", [{"compile": True}, {"checkpointing": True}])
def test_compiled_or_recomputed_an_update_is_the_same(options):
    wanted, got = one_update(), one_update(**options)
    assert {name.rpartition(".")[2] for name in wanted} == {"lora_a", "lora_b", "m"}
    for name, array in wanted.items():
        assert mx.allclose(got[name], array, rtol=1e-4, atol=1e-5 * mx.abs(array).max().item()), name
