"""Training with layers that stay in their files: the resident run's adapter, in bounded memory."""

import gc
from contextlib import ExitStack
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import LoraConfig, TrainingConfig
from mlx_qlora.errors import WeightsError
from mlx_qlora.lora.adapter import adapter_tensors
from mlx_qlora.lora.attach import attach
from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.objective.evaluate import evaluate
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.training.offload_gradient import Untraced, offloaded_gradients
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.recompute import recomputed
from mlx_qlora.training.step import TrainStep
from mlx_qlora.weights.offload import offloaded
from mlx_qlora.weights.offload_plan import plan_offload
from tests.tiny import random_batch, target_modules, tiny_llama, tiny_model
from tests.unit.weights.test_offload import wide_llama

CONFIG = TrainingConfig(learning_rate=1e-2, warmup_steps=1, gradient_accumulation=2, seed=5)
BATCHES = [random_batch([20, 33], seed=1), random_batch([40, 12], seed=2)]


def stored(model, folder):
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def plans(model, folder):
    """One layer at a time; two, all streamed; some in memory."""
    whole = plan_offload(model, folder, 10**12)
    smallest = whole.smallest_budget_bytes
    largest = max(layer.reading_bytes for layer in whole.layers)
    return [
        plan_offload(model, folder, budget) for budget in (smallest, smallest + largest, whole.peak_bytes - 1)
    ]


def trained(model, plan=None, *, targets=("q_proj", "v_proj", "down_proj"), checkpointed=False, **lora):
    """Losses, gradient norms and the adapter of two updates, and the loss after them."""
    with ExitStack() as stack:
        offload = stack.enter_context(offloaded(model, plan)) if plan else None
        attach(model, LoraConfig(rank=4, target_modules=targets, **lora), seed=0)
        model.train()
        gradient = stack.enter_context(offloaded_gradients(offload)) if offload else None
        stack.enter_context(recomputed(list(model.layers), enabled=checkpointed))
        stack.enter_context(dense_products(model))
        objective = objective_for(model)
        if gradient:
            objective = replace(objective, apart=gradient.loss)
        step = TrainStep(objective, build_optimizer(CONFIG), CONFIG)
        outcomes = [step(BATCHES, number, 1e-2) for number in (1, 2)]
        loss = evaluate(model, BATCHES[:1], objective).loss_nats
        return [(o.nll, o.grad_norm) for o in outcomes], loss, adapter_tensors(model)


def assert_same(one, other):
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    for name, array in one[2].items():
        assert mx.array_equal(array, other[2][name]).item(), name


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 4), ("llama", None), ("qwen3", 4), ("gemma2", 4), ("gemma2", None)]
)
def test_the_adapter_is_that_of_the_resident_run_bit_for_bit(tmp_path, name, bits):
    stored(tiny_model(name, bits=bits), tmp_path)
    targets = target_modules(name)
    resident = trained(tiny_model(name, bits=bits), targets=targets)
    for index in (0, 2):
        model = tiny_model(name, bits=bits)
        assert_same(trained(model, plans(model, tmp_path)[index], targets=targets), resident)


def test_dropout_draws_the_same_masks(tmp_path):
    stored(tiny_llama(layers=4, tied=True), tmp_path)
    resident = trained(tiny_llama(layers=4, tied=True), dropout=0.3)
    assert resident[0] != trained(tiny_llama(layers=4, tied=True))[0]
    assert_same(trained(tiny_llama(layers=4, tied=True), checkpointed=True, dropout=0.3), resident)
    for index in range(3):
        model = tiny_llama(layers=4, tied=True)
        assert_same(trained(model, plans(model, tmp_path)[index], dropout=0.3), resident)


def test_layers_below_the_first_trained_one_are_read_once(tmp_path):
    stored(tiny_llama(layers=4), tmp_path)
    resident = trained(tiny_llama(layers=4), num_layers=2)
    model = tiny_llama(layers=4)
    assert_same(trained(model, plans(model, tmp_path)[0], num_layers=2), resident)


def test_bfloat16_activations_pass_through_untraced_copies(tmp_path):
    values = mx.random.normal((5, 3)).astype(mx.bfloat16)
    (copy,) = Untraced.of([values]).arrays()
    assert copy.dtype == mx.bfloat16
    assert mx.array_equal(copy, values).item()

    def model():
        narrow = tiny_llama(layers=3)
        narrow.set_dtype(mx.bfloat16)
        return narrow

    stored(model(), tmp_path)
    resident = trained(model())
    assert_same(trained(offered := model(), plans(offered, tmp_path)[1]), resident)


def gradient_peak_bytes(folder, layers, num_in_flight):
    """The most that a gradient takes, above the weights outside of the layers and the adapter."""
    folder.mkdir()
    gc.collect()
    before = mx.get_active_memory()
    model = wide_llama(layers)
    stored(model, folder)
    whole = plan_offload(model, folder, 10**12)
    budget = whole.outside_bytes + num_in_flight * whole.layers[0].reading_bytes
    plan = plan_offload(model, folder, budget)
    layer_bytes = plan.layers[0].num_bytes
    del whole
    with offloaded(model, plan) as offload, offloaded_gradients(offload) as gradient, memory_limits(1):
        attach(model, LoraConfig(rank=4, num_layers=2), seed=0)
        objective = replace(objective_for(model.train()), apart=gradient.loss)
        step = TrainStep(objective, build_optimizer(CONFIG), CONFIG)
        step(BATCHES[:1], 1, 1e-2)
        gc.collect()
        mx.reset_peak_memory()
        step(BATCHES[:1], 2, 1e-2)
        return mx.get_peak_memory() - before, layer_bytes


def test_the_loss_is_computed_apart_so_that_no_two_chunks_of_logits_are_there_at_once(tmp_path):
    vocabulary = 16_384
    peaks = {}
    for is_apart in (False, True):
        gc.collect()
        model = wide_llama(2, vocabulary=vocabulary)
        if not is_apart:
            stored(model, tmp_path)
        plan = plans(model, tmp_path)[0]
        with offloaded(model, plan) as offload, offloaded_gradients(offload) as gradient, memory_limits(1):
            attach(model, LoraConfig(rank=4, num_layers=1), seed=0)
            objective = objective_for(model.train(), chunk_bytes=4 * 16 * vocabulary)
            if is_apart:
                objective = replace(objective, apart=gradient.loss)
            step = TrainStep(objective, build_optimizer(CONFIG), CONFIG)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            step([random_batch([130], seed=1)], 1, 1e-2)
            peaks[is_apart] = mx.get_peak_memory() - before
        del model, plan, offload, gradient, objective, step
    all_logits = 4 * 128 * vocabulary
    assert peaks[False] - peaks[True] > 2 * all_logits


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_the_memory_of_a_step_grows_with_the_layers_in_flight_and_not_with_depth(tmp_path, num_in_flight):
    few, layer_bytes = gradient_peak_bytes(tmp_path / "few", 3, num_in_flight)
    many, _ = gradient_peak_bytes(tmp_path / "many", 9, num_in_flight)
    hidden_bytes = 4 * 2 * 64 * 256  # each layer keeps its input
    assert many - few < 6 * hidden_bytes + layer_bytes / 10
    assert few < (num_in_flight + 1.25) * layer_bytes  # and the activations of 128 positions


def test_a_file_that_changes_ends_the_step_and_leaves_the_adapter_alone(tmp_path):
    model = tiny_llama(layers=3)
    stored(model, tmp_path)
    plan = plans(model, tmp_path)[1]
    with offloaded(model, plan) as offload, offloaded_gradients(offload):
        attach(model, LoraConfig(rank=4), seed=0)
        model.train()
        step = TrainStep(objective_for(model), build_optimizer(CONFIG), CONFIG)
        step(BATCHES, 1, 1e-2)
        before = {name: np.array(array) for name, array in adapter_tensors(model).items()}
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(WeightsError, match="was changed"):
            step(BATCHES, 2, 1e-2)
        after = adapter_tensors(model)
    assert all(np.array_equal(array, np.array(after[name])) for name, array in before.items())
