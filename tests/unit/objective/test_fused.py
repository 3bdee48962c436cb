"""objective/fused.py, head.py, loss.py: the same numbers as the plain computation, in less memory."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.objective.fused import chunk_length, fused_nll
from mlx_qlora.objective.head import Head, split
from mlx_qlora.objective.loss import Objective, objective_for, weighted_nll
from mlx_qlora.training.recompute import recomputed
from tests.tiny import ARCHITECTURES, random_batch, target_modules, tiny_llama, tiny_model, with_lora

CHUNK = 97 * 4 * 20  # twenty positions: several chunks, the last one shorter


def gradients(objective: Objective, batch, *, compiled=False, keys=None):
    """The loss, and every gradient by name."""
    from mlx_qlora.lora.layers import lora_layers, set_dropout_keys

    model, layers, inputs = objective.model, lora_layers(objective.model), objective.prepared(batch)

    def nll(trained, inputs):
        model.update(trained)
        set_dropout_keys(layers, keys)
        return objective.nll(inputs)

    graph = mx.value_and_grad(nll)
    graph = mx.compile(graph, inputs=[model.state]) if compiled else graph
    trained = model.trainable_parameters()
    with objective.active():
        value, grad = graph(trained, inputs)
    mx.eval(value, grad)
    model.update(trained)
    set_dropout_keys(layers, None)
    return value.item(), dict(tree_flatten(grad))


def assert_equal(plain, other):
    assert other[0] == pytest.approx(plain[0], rel=1e-5)
    assert plain[1].keys() == other[1].keys()
    for name, grad in plain[1].items():
        size = mx.abs(grad).max().item()
        assert size > 0, name
        assert mx.abs(grad - other[1][name]).max().item() <= 1e-5 * size, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_every_gradient_equal_the_plain_computation(name, compiled):
    model = with_lora(tiny_model(name), dropout=0.3, target_modules=target_modules(name))
    keys = mx.random.split(mx.random.key(5), 6)
    batch = random_batch([9, 40, 23])
    fused = objective_for(model, CHUNK)
    assert fused.parts is not None
    plain = gradients(Objective(model, None), batch, keys=keys)
    assert_equal(plain, gradients(fused, batch, compiled=compiled, keys=keys))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_with_gradient_checkpointing_too(name):
    model = with_lora(tiny_model(name), dropout=0.3, target_modules=target_modules(name))
    keys, batch = mx.random.split(mx.random.key(5), 6), random_batch([9, 40])
    plain = gradients(Objective(model, None), batch, keys=keys)
    fused = objective_for(model, CHUNK)
    with recomputed(list(model.layers)):
        assert_equal(plain, gradients(fused, batch, keys=keys))


@pytest.mark.parametrize("bits", [None, 2, 8])
@pytest.mark.parametrize("adapted", [False, True], ids=["frozen head", "adapted head"])
def test_any_storage_of_the_head_and_an_adapted_one(bits, adapted):
    targets = ("q_proj", "lm_head") if adapted else ("q_proj",)
    model = with_lora(tiny_llama(bits=bits), target_modules=targets)
    fused, batch = objective_for(model, CHUNK), random_batch([9, 40])
    assert fused.parts.head.is_plain_matmul != adapted
    assert_equal(gradients(Objective(model, None), batch), gradients(fused, batch))


def test_a_biased_head_is_not_taken_for_a_plain_one():
    head = Head(nn.Linear(8, 11, bias=True), is_tied=False)
    head.module.freeze()
    hidden, targets = mx.random.normal((70, 8), key=mx.random.key(0)), mx.arange(70) % 11
    weights = (mx.arange(70) < 50).astype(mx.float32)
    assert not head.is_plain_matmul

    def plain(h):
        return weighted_nll(head(h), targets, weights)

    def fused(h):
        return fused_nll(h, targets, weights, head, 16 * 44)

    (a, da), (b, db) = mx.value_and_grad(plain)(hidden), mx.value_and_grad(fused)(hidden)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert mx.allclose(da, db, rtol=1e-5, atol=1e-6)


def test_a_model_that_does_not_come_apart_computes_all_logits_and_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def __call__(self, tokens, cache=None):
            return mx.sin(self.inner(tokens, cache=cache))

    odd = Odd()
    assert split(odd) is None
    objective = objective_for(odd)
    assert any("at once" in note for note in objective.notes)
    assert objective_for(tiny_llama()).notes == []


def test_only_labelled_positions_are_gathered_in_multiples_of_64():
    batch = random_batch([9, 40, 23], prompt=5)
    inputs = objective_for(tiny_llama()).prepared(batch)
    labels = int(batch.mask_BT.sum())
    assert inputs.labelled_M.shape == (64,)
    assert inputs.weights_M.sum().item() == labels
    chosen = np.array(inputs.labelled_M)[:labels]
    assert np.array_equal(chosen, np.flatnonzero(batch.mask_BT))
    assert np.array_equal(np.array(inputs.targets_M)[:labels], batch.targets_BT.reshape(-1)[chosen])


def test_a_chunk_is_about_eight_mebibytes_of_logits():
    assert chunk_length(32_000) == 65
    assert chunk_length(64_000) == 32
    assert chunk_length(10**7) == 16


def test_the_logits_of_a_large_vocabulary_never_exist_at_once():
    vocabulary, positions = 16_000, 1024
    head = Head(nn.Linear(64, vocabulary, bias=False), is_tied=False)
    head.module.freeze()
    hidden = mx.random.normal((positions, 64), key=mx.random.key(0))
    targets, weights = mx.arange(positions), mx.ones((positions,))
    mx.eval(hidden, head.module.parameters(), targets, weights)

    def peak(loss):
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory() - before

    logits_bytes = 4 * vocabulary * positions
    plain = peak(lambda h: weighted_nll(head(h), targets, weights))
    fused = peak(lambda h: fused_nll(h, targets, weights, head, 1024**2))
    assert plain > 2 * logits_bytes
    assert fused < 20 * 1024**2  # a chunk is 1 MiB; without the order between chunks it is 24 MiB, or 40
