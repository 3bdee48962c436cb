"""Weights of any format, unpacked as they are meant, and an update some rows at a time."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.exchange.fuse_base import Update, base_layer, matrix_shape, stored_scheme, unpacked_rows
from mlx_qlora.lora.dora import DoRALinear
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear
from mlx_qlora.lora.merge import merged_weight
from mlx_qlora.lora.pissa import PiSSALinear
from mlx_qlora.quantization.nf4_layers import NF4Embedding, NF4Linear
from mlx_qlora.quantization.schemes import SCHEMES

KEY = mx.random.key(4)


def linear(name, *, rows=48, width=128, is_embedding=False):
    mx.random.seed(1)
    layer = nn.Embedding(rows, width) if is_embedding else nn.Linear(width, rows)
    if name is None:
        return layer
    scheme = SCHEMES[name]
    if scheme.is_codebook:
        make = NF4Embedding.from_embedding if is_embedding else NF4Linear.from_linear
        return make(layer, scheme.group_size, scheme.mode)
    return layer.to_quantized(scheme.group_size, scheme.bits, mode=scheme.mode)


def adapted(kind, base):
    if kind is LoRAEmbedding:
        layer = kind(base, rank=4, scale=2.0, key=KEY)
    else:
        layer = kind(base, rank=4, scale=2.0, dropout=0.0, key=KEY)
    layer.lora_b = layer.lora_b + 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(8))
    if kind is DoRALinear:
        layer.m = layer.m * mx.linspace(0.5, 1.5, layer.m.size)
    return layer


@pytest.mark.parametrize("is_embedding", [False, True])
@pytest.mark.parametrize("name", [None, *SCHEMES])
def test_unpacked_rows_multiply_as_the_layer_does(name, is_embedding):
    layer = linear(name, is_embedding=is_embedding)
    x = mx.random.normal((5, 128), key=mx.random.key(2))
    weight = mx.concatenate([unpacked_rows(layer, first, first + 16) for first in (0, 16, 32)])
    made = layer.as_linear(x) if is_embedding else layer(x) - layer.bias
    assert mx.allclose(x @ weight.T, made, atol=1e-5).item()
    assert matrix_shape(layer) == (48, 128)
    assert stored_scheme(layer) == (None if name is None else SCHEMES[name])


def test_stacked_weights_are_rows_of_one_matrix():
    from mlx_lm.models.switch_layers import SwitchLinear

    stacked = SwitchLinear(64, 32, 3, bias=False)
    packed = stacked.to_quantized(group_size=64, bits=8)
    rows = unpacked_rows(packed, 0, 96)
    assert matrix_shape(packed) == (96, 64)
    assert mx.allclose(rows, stacked.weight.reshape(96, 64), atol=2e-3).item()


@pytest.mark.parametrize("name", [None, "int4", "nf4-dq"])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, PiSSALinear, LoRAEmbedding])
@given(first=st.integers(0, 46), count=st.integers(1, 20))
@settings(max_examples=5, deadline=None)
def test_an_update_by_rows_is_the_whole_one(kind, name, first, count):
    layer = adapted(kind, linear(name, is_embedding=kind is LoRAEmbedding))
    whole = unpacked_rows(base_layer(layer), 0, 48)
    wanted = merged_weight(layer, whole)
    last = min(first + count, 48)
    rows = Update(layer)(whole[first:last], first, last)
    assert mx.allclose(rows, wanted[first:last], rtol=1e-6, atol=1e-7).item()


@pytest.mark.parametrize("kind", [LoRALinear, PiSSALinear, LoRAEmbedding])
def test_the_basis_holds_all_that_an_update_changes(kind):
    layer = adapted(kind, linear(None, is_embedding=kind is LoRAEmbedding))
    basis, delta = Update(layer).basis, layer.delta()
    assert mx.allclose(basis.T @ basis, mx.eye(basis.shape[1]), atol=1e-5).item()
    assert mx.linalg.norm(delta - (delta @ basis) @ basis.T).item() < 1e-5 * mx.linalg.norm(delta).item()


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_an_update_keeps_no_base_in_memory(kind):
    layer = adapted(kind, linear(None, rows=1024, width=1024))
    mx.eval(layer.parameters())
    update = Update(layer)
    base_bytes = layer.linear.weight.nbytes
    before = mx.get_active_memory()
    del layer
    assert before - mx.get_active_memory() >= base_bytes
    assert update(mx.zeros((1, 1024)), 0, 1).shape == (1, 1024)
