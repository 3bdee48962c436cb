"""training/step.py, training/recompute.py, objective/loss.py: one update and its mathematics."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import TrainingConfig
from mlx_qlora.dataset.batches import Batch
from mlx_qlora.objective.evaluate import evaluate
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.recompute import recomputed
from mlx_qlora.training.step import TrainStep, mixed_key
from tests.tiny import random_batch, tiny_llama, with_lora


def stepped(batches, *, model=None, dropout=0.0, checkpointing=False, step=1, rate=1e-2, **config):
    """The outcome of one update, and the trained tensors after it."""
    model = model or with_lora(tiny_llama(), dropout=dropout)
    training = TrainingConfig(**{"max_grad_norm": None, "optimizer": "sgd", **config})
    with recomputed(list(model.layers), enabled=checkpointing):
        outcome = TrainStep(objective_for(model), build_optimizer(training), training)(batches, step, rate)
    return outcome, dict(tree_flatten(model.trainable_parameters()))


def difference(one, other):
    return max(mx.abs(one[k] - other[k]).max().item() / mx.abs(one[k]).max().item() for k in one)


def single_rows(batch: Batch) -> list[Batch]:
    """Each row of a batch by itself, without its padding."""
    rows = []
    for x, y, m in zip(batch.inputs_BT, batch.targets_BT, batch.mask_BT, strict=True):
        width = np.flatnonzero(m)[-1] + 1
        rows.append(Batch(x[None, :width], y[None, :width], m[None, :width], tokens=int(width) + 1))
    return rows


def test_loss_and_gradients_of_a_padded_batch_equal_a_reference_of_one_example_at_a_time():
    batch, model = random_batch([9, 40, 23]), with_lora(tiny_llama())
    step = TrainStep(objective_for(model), build_optimizer(TrainingConfig()), TrainingConfig(compile=False))
    nll, grad = step._nll_and_grad(step.objective.prepared(batch), step._dropout_keys(1, 0))

    def one_by_one(model):
        total = mx.array(0.0)
        for row in single_rows(batch):
            logits = model(mx.array(row.inputs_BT))[0].astype(mx.float32)
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            for t in np.flatnonzero(row.mask_BT[0]):
                total = total - log_p[int(t), int(row.targets_BT[0, t])]
        return total

    reference, reference_grad = nn.value_and_grad(model, one_by_one)(model)
    assert nll.item() == pytest.approx(reference.item(), rel=1e-5)
    flat, flat_reference = dict(tree_flatten(grad)), dict(tree_flatten(reference_grad))
    assert flat.keys() == flat_reference.keys()
    assert difference(flat_reference, flat) < 1e-4


def test_a_step_is_the_same_however_its_examples_are_split():
    whole = random_batch([9, 40, 23, 12])
    together, weights = stepped([whole])
    apart, weights_apart = stepped(single_rows(whole))
    assert together.target_tokens == apart.target_tokens
    assert together.nll == pytest.approx(apart.nll, rel=1e-5)
    assert difference(weights, weights_apart) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_weight(dropout):
    batches = [random_batch([9, 40]), random_batch([30, 8], seed=1)]
    plain = stepped(batches, dropout=dropout)
    recomputing = stepped(batches, dropout=dropout, checkpointing=True)
    assert plain[0].nll == pytest.approx(recomputing[0].nll, rel=1e-6)
    assert difference(plain[1], recomputing[1]) < 1e-5


def test_mlx_lm_checkpointing_with_dropout_gives_other_gradients_and_ours_does_not_share_that_fault():
    """Documents the trap: a recomputation that draws new masks."""
    from mlx_lm.tuner.trainer import grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    def gradients(checkpointing):
        model = tiny_llama()
        model.freeze()
        lora = {"rank": 4, "scale": 2.0, "dropout": 0.5, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
        linear_to_lora_layers(model, 2, lora)
        flat = [(k, v) for k, v in tree_flatten(model.trainable_parameters()) if k.endswith("lora_b")]
        model.load_weights([(k, mx.full(v.shape, 0.02)) for k, v in flat], strict=False)
        layer_class = type(model.layers[0])
        call = layer_class.__call__
        if checkpointing:
            grad_checkpoint(model.layers[0])
        try:
            mx.random.seed(5)
            tokens = mx.array(random_batch([33]).inputs_BT)
            return dict(
                tree_flatten(nn.value_and_grad(model.train(), lambda m: m(tokens).square().mean())(model)[1])
            )
        finally:
            layer_class.__call__ = call

    plain, recomputing = gradients(False), gradients(True)
    names = [name for name in plain if mx.abs(plain[name]).max().item() > 0]
    wrong = max((mx.abs(plain[n] - recomputing[n]).max() / mx.abs(plain[n]).max()).item() for n in names)
    assert wrong > 0.1


def test_compiled_and_eager_steps_agree():
    batches = [random_batch([9, 40]), random_batch([30, 8], seed=1)]
    eager = stepped(batches, dropout=0.3, compile=False)
    compiled = stepped(batches, dropout=0.3, compile=True)
    assert eager[0].nll == pytest.approx(compiled[0].nll, rel=1e-5)
    assert difference(eager[1], compiled[1]) < 1e-5


def test_a_step_is_repeatable_bit_for_bit_and_dropout_depends_on_seed_and_step():
    batch = [random_batch([20, 33])]
    _, first = stepped(batch, dropout=0.5)
    mx.random.seed(99)  # the global generator has no say
    _, again = stepped(batch, dropout=0.5)
    assert all(mx.array_equal(first[k], again[k]) for k in first)
    for other in (stepped(batch, dropout=0.5, step=2), stepped(batch, dropout=0.5, seed=1)):
        assert not all(mx.array_equal(first[k], other[1][k]) for k in first)


def test_micro_batches_of_one_step_get_different_masks():
    row = random_batch([33])
    one = stepped([row], dropout=0.5)[0].nll
    assert stepped([row, row], dropout=0.5)[0].nll != pytest.approx(2 * one, rel=1e-6)


def test_a_non_finite_loss_updates_nothing():
    model = with_lora(tiny_llama())
    model.load_weights([("model.norm.weight", mx.full((64,), mx.nan))], strict=False)
    before = dict(tree_flatten(model.trainable_parameters()))
    outcome, after = stepped([random_batch([20])], model=model)
    assert outcome.skipped
    assert all(mx.array_equal(before[k], after[k]) for k in before)


def test_a_step_without_any_target_updates_nothing():
    batch = random_batch([20])
    empty = Batch(batch.inputs_BT, batch.targets_BT, np.zeros_like(batch.mask_BT), tokens=20)
    outcome, weights = stepped([empty])
    assert outcome.skipped
    assert all(bool(mx.isfinite(value).all()) for value in weights.values())


def test_the_context_gives_the_layers_their_class_back_even_after_an_error():
    model = tiny_llama()
    classes = [type(layer) for layer in model.layers]
    context = recomputed(list(model.layers))
    context.__enter__()
    assert [type(layer) for layer in model.layers] != classes
    context.__exit__(RuntimeError, RuntimeError(), None)
    assert [type(layer) for layer in model.layers] == classes


def test_evaluation_draws_nothing_and_leaves_the_mode_as_it_was():
    model = with_lora(tiny_llama(), dropout=0.5)
    rows = [random_batch([9, 40]), random_batch([30], seed=1)]
    state = [mx.array(a) for a in mx.random.state]
    one = evaluate(model, rows)
    assert evaluate(model, rows) == one
    assert model.training
    assert all(mx.array_equal(a, b) for a, b in zip(state, mx.random.state, strict=True))
    per_row = [evaluate(model, [row]) for batch in rows for row in single_rows(batch)]
    total = sum(part.loss_nats * part.target_tokens for part in per_row)
    assert one.loss_nats == pytest.approx(total / one.target_tokens, rel=1e-5)


def test_mixed_keys_differ_by_place():
    assert not mx.array_equal(mixed_key(1, 2, 0), mixed_key(2, 1, 0))
