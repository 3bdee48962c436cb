"""training/diagnosis.py: the batch and the layer where numbers stopped being numbers."""

import mlx.core as mx
import pytest

from mlx_qlora.config import LoraConfig
from mlx_qlora.lora.attach import attach
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.training.diagnosis import diagnose
from tests.tiny import random_batch, target_modules, tiny_model

TARGETS = ("llama", "gemma2", "phi3")


def adapted(name="llama"):
    model = tiny_model(name)
    attach(model, LoraConfig(rank=4, target_modules=target_modules(name)), seed=0)
    return objective_for(model.train())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_layer_is_named_and_the_model_is_as_before(name, bad):
    objective = adapted(name)
    layers = objective.model.layers
    classes = [type(layer) for layer in layers]
    norm = layers[1].input_layernorm
    norm.weight = mx.full(norm.weight.shape, bad)
    batches = [random_batch([20, 33], seed=1)]
    said = diagnose(objective, batches)
    assert said == "micro-batch 1 of 1: the output of layer 1 is not finite, its input is"
    assert [type(layer) for layer in layers] == classes
    assert objective.model.training


def test_only_the_batch_that_holds_the_token_is_named():
    objective = adapted()
    embedding = objective.model.model.embed_tokens
    clean, dirty = random_batch([12, 9], seed=1), random_batch([12, 9], seed=2)
    only = next(t for t in dirty.inputs_BT[0, 1:5].tolist() if t not in clean.inputs_BT)
    embedding.scales[only] = mx.full(embedding.scales.shape[1:], float("nan"))
    said = diagnose(objective, [clean, dirty])
    assert said == "micro-batch 2 of 2: the embedding gives numbers that are not finite"


def test_the_adapter_the_head_and_a_finite_loss_are_told_apart():
    objective = adapted()
    batches = [random_batch([20], seed=1)]
    assert diagnose(objective, batches) == "the loss is finite, a gradient is not"
    projection = objective.model.layers[0].self_attn.q_proj
    projection.lora_b = mx.full(projection.lora_b.shape, float("nan"))
    assert "the adapter itself is not finite: model.layers.0" in diagnose(objective, batches)
    objective = adapted()
    objective.model.model.norm.weight = mx.full(objective.model.model.norm.weight.shape, float("inf"))
    assert "all layers are finite" in diagnose(objective, batches)
