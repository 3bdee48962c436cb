"""inference/comparison_reference.py: what a reference says of each token, and how far another model is."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.dataset.batches import Batch
from mlx_qlora.inference import comparison_reference
from mlx_qlora.inference.comparison_reference import HEAD, score_against, write_reference
from mlx_qlora.objective.evaluate import evaluate
from mlx_qlora.objective.loss import objective_for
from tests.tiny import ARCHITECTURES, random_batch, tiny_llama, tiny_model

BATCHES = [random_batch([40, 23, 9], seed=1), random_batch([31], seed=2)]


def log_probabilities(model, batch):
    logits = model(mx.array(batch.inputs_BT)).astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)[batch.mask_BT]


def plainly(reference, model, batches):
    """Divergence and agreement by their definitions, in float64, all logits at once."""
    p = np.concatenate([log_probabilities(reference, batch) for batch in batches])
    q = np.concatenate([log_probabilities(model, batch) for batch in batches])
    return (np.exp(p) * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).mean()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_divergence_is_that_of_all_logits_at_once_in_every_architecture(name, tmp_path):
    reference, model = tiny_model(name, bits=None), tiny_model(name, bits=2)
    write_reference(objective_for(reference), BATCHES, tmp_path)
    score = score_against(objective_for(model), BATCHES, tmp_path)
    divergence, agreement = plainly(reference, model, BATCHES)
    assert divergence > 1e-3
    assert score.divergence_nats == pytest.approx(divergence, rel=1e-3)
    assert score.agreement == pytest.approx(agreement, abs=0.02)
    assert score.target_tokens == sum(int(batch.mask_BT.sum()) for batch in BATCHES)
    assert score.loss_nats == pytest.approx(evaluate(model, BATCHES).loss_nats, rel=1e-5)


def test_a_model_is_no_way_from_itself_and_its_loss_is_that_of_evaluate(tmp_path):
    objective = objective_for(tiny_llama(bits=None))
    first = write_reference(objective, BATCHES, tmp_path)
    again = score_against(objective, BATCHES, tmp_path)
    assert first.divergence_nats == 0
    assert 0 <= again.divergence_nats < 1e-9
    assert first.agreement == again.agreement == 1
    assert first.loss_nats == again.loss_nats == pytest.approx(evaluate(objective.model, BATCHES).loss_nats)


def test_hidden_states_are_kept_where_the_head_is_a_matrix_and_logits_where_it_is_not(tmp_path):
    (tmp_path / "float").mkdir()
    (tmp_path / "int8").mkdir()
    write_reference(objective_for(tiny_llama(bits=None)), BATCHES, tmp_path / "float")
    write_reference(objective_for(tiny_llama(bits=8)), BATCHES, tmp_path / "int8")
    assert (tmp_path / "float" / HEAD).is_file()
    assert mx.load(str(tmp_path / "float" / "000000.safetensors"))["states"].shape[1] == 64
    assert not (tmp_path / "int8" / HEAD).exists()
    assert mx.load(str(tmp_path / "int8" / "000000.safetensors"))["states"].shape[1] == 97


def test_a_quantized_reference_and_one_that_cannot_be_split_are_compared_with_too(tmp_path):
    reference, model = tiny_llama(bits=8), tiny_llama(bits=3)
    divergence, _ = plainly(reference, model, BATCHES)
    write_reference(objective_for(reference), BATCHES, tmp_path)
    assert score_against(objective_for(model), BATCHES, tmp_path).divergence_nats == pytest.approx(
        divergence, rel=1e-3
    )
    whole = objective_for(model)
    object.__setattr__(whole, "parts", None)
    assert score_against(whole, BATCHES, tmp_path).divergence_nats == pytest.approx(divergence, rel=1e-3)


def test_logits_in_chunks_give_the_same_figures(tmp_path, monkeypatch):
    reference, model = tiny_llama(bits=None), tiny_llama(bits=4)
    write_reference(objective_for(reference), BATCHES, tmp_path)
    whole = score_against(objective_for(model), BATCHES, tmp_path)
    monkeypatch.setattr(comparison_reference, "CHUNK_BYTES", 1)  # sixteen positions, the least there is
    chunked = score_against(objective_for(model), BATCHES, tmp_path)
    assert chunked.divergence_nats == pytest.approx(whole.divergence_nats, rel=1e-4)
    assert chunked.loss_nats == pytest.approx(whole.loss_nats, rel=1e-6)
    assert chunked.agreement == whole.agreement


def test_a_batch_without_labels_counts_for_nothing(tmp_path):
    none = random_batch([12], seed=5)
    none = Batch(none.inputs_BT, none.targets_BT, np.zeros_like(none.mask_BT), none.tokens)
    model = objective_for(tiny_llama(bits=None))
    with_it = write_reference(model, [none, *BATCHES], tmp_path)
    assert with_it.target_tokens == sum(int(batch.mask_BT.sum()) for batch in BATCHES)
    assert score_against(model, [none, *BATCHES], tmp_path).divergence_nats < 1e-9


def test_scoring_leaves_the_model_as_it_was(tmp_path):
    model = tiny_llama(bits=4).train()
    write_reference(objective_for(model), BATCHES, tmp_path)
    assert model.training
    assert {type(m) for _, m in model.named_modules() if hasattr(m, "bits")} == {
        nn.QuantizedLinear,
        nn.QuantizedEmbedding,
    }
