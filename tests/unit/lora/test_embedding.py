"""lora/embedding.py"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.attach import attach, target_paths
from mlx_qlora.lora.embedding import LoRAEmbedding, embedding_shape
from mlx_qlora.lora.merge import merged_weight
from mlx_qlora.quantization.dense import unpacked
from mlx_qlora.quantization.nf4_layers import NF4Embedding
from tests.tiny import random_batch, tiny_llama, with_lora

TOKENS = mx.array([[1, 5, 9, 33, 2]])


def layer(bits: int | str | None = 4, *, noise: float = 0.0) -> LoRAEmbedding:
    embedding = nn.Embedding(97, 64)
    if bits == "nf4":
        embedding = NF4Embedding.from_embedding(embedding)
    elif bits:
        embedding = nn.QuantizedEmbedding.from_embedding(embedding, 64, bits)
    lora = LoRAEmbedding(embedding, rank=4, scale=2.0, key=mx.random.key(1))
    lora.lora_b = noise * mx.random.normal((4, 64), key=mx.random.key(2))
    return lora


@pytest.mark.parametrize("bits", [None, 4, "nf4"])
def test_it_embeds_and_heads_with_the_merged_weight(bits):
    lora, x = layer(bits, noise=0.5), mx.random.normal((3, 64), key=mx.random.key(0))
    weight = merged_weight(lora, unpacked(lora.embedding, mx.zeros(0)).astype(mx.float32))
    assert embedding_shape(lora.embedding) == (97, 64)
    assert mx.allclose(lora(TOKENS), weight[TOKENS], atol=1e-5)
    assert mx.allclose(lora.as_linear(x), x @ weight.T, atol=1e-4)
    assert not mx.allclose(lora(TOKENS), lora.embedding(TOKENS), atol=1e-3)


def test_a_new_layer_computes_exactly_what_its_base_does():
    lora = layer()
    assert mx.array_equal(lora(TOKENS), lora.embedding(TOKENS))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_whose_embedding_is_named_trains_it(tied):
    model = tiny_llama(tied=tied)
    before = model(TOKENS)
    assert attach(model, LoraConfig(rank=4, target_modules=("embed_tokens",)), 0) == ["model.embed_tokens"]
    assert mx.array_equal(model(TOKENS), before)
    leaves = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert leaves == {"model.embed_tokens.lora_a", "model.embed_tokens.lora_b"}


def test_a_step_moves_the_embedding():
    from tests.unit.training.test_step import stepped

    model = with_lora(tiny_llama(), target_modules=("embed_tokens", "q_proj"))
    before = dict(tree_flatten(model.trainable_parameters()))
    outcome, after = stepped([random_batch([9, 20])], model=model)
    assert not outcome.skipped
    assert all(not mx.array_equal(before[name], after[name]) for name in before)


def test_a_wildcard_means_linear_layers_only():
    assert "model.embed_tokens" not in target_paths(tiny_llama(), LoraConfig(target_modules=("*",)))


@pytest.mark.parametrize("choice", [{"variant": "dora"}, {"init": "pissa"}])
def test_what_is_for_linear_layers_is_refused_for_an_embedding(choice):
    with pytest.raises(ConfigError, match=r"model\.embed_tokens is an embedding"):
        attach(tiny_llama(), LoraConfig(target_modules=("embed_tokens", "q_proj"), **choice), 0)
