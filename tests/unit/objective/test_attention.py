"""objective/attention.py: blocked attention is the plain one, in less memory."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, llama

from mlx_qlora.dataset.batches import Layout, collated
from mlx_qlora.dataset.records import Example
from mlx_qlora.objective import loss
from mlx_qlora.objective.attention import _attention, blocked_attention, covers
from mlx_qlora.objective.loss import Objective, objective_for
from mlx_qlora.objective.segments import SegmentMask
from mlx_qlora.training.recompute import recomputed
from tests.tiny import ARCHITECTURES, VOCAB, random_batch, target_modules, tiny_llama, tiny_model, with_lora
from tests.unit.objective.test_fused import assert_equal, gradients

KEYS = mx.random.split(mx.random.key(5), 6)
COVERED = [name for name in ARCHITECTURES if name != "gemma2"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries, for any length: rows of 39 take three, the last one shorter."""
    monkeypatch.setattr(loss, "blocked_attention", lambda m: blocked_attention(m, block=16, min_tokens=1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", COVERED)
def test_loss_and_every_gradient_equal_the_plain_computation(name, compiled):
    model = with_lora(tiny_model(name), dropout=0.3, target_modules=target_modules(name))
    batch, objective = random_batch([9, 40, 23]), objective_for(model)
    assert objective.is_blocked
    plain = gradients(Objective(model, None), batch, keys=KEYS)
    assert_equal(plain, gradients(objective, batch, compiled=compiled, keys=KEYS))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_with_gradient_checkpointing_the_recomputation_is_blocked_too(name):
    model = with_lora(tiny_model(name), dropout=0.3)
    batch, objective = random_batch([9, 40]), objective_for(model)
    plain = gradients(Objective(model, None), batch, keys=KEYS)
    with recomputed(list(model.layers)):
        assert_equal(plain, gradients(objective, batch, keys=KEYS))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", COVERED)
def test_several_examples_in_one_row_too(name, compiled):
    model = with_lora(tiny_model(name), target_modules=target_modules(name))
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, VOCAB, n).astype(np.int32) for n in (9, 40, 23, 30)]
    examples = [Example(row, np.arange(len(row)) > 2, "made") for row in rows]
    padded = collated([[example] for example in examples], Layout())
    one_row = collated([[e] for e in examples], Layout(may_concatenate=True, linear_cost=1e9))
    assert one_row.inputs_BT.shape == (1, 128)
    assert one_row.longest == 64  # so attention looks back no further than that
    plain = gradients(Objective(model, None), padded)
    assert_equal(plain, gradients(objective_for(model), one_row, compiled=compiled))


def test_an_architecture_with_attention_of_its_own_is_left_alone_and_says_so():
    objective = objective_for(tiny_model("gemma2"))
    assert not objective.is_blocked
    assert any("scores" in note for note in objective.notes)
    assert covers(tiny_llama())


def test_nothing_stays_replaced_even_after_an_error():
    plain, model = base.scaled_dot_product_attention, tiny_llama()

    def fail():
        with blocked_attention(model):
            assert llama.scaled_dot_product_attention is not plain
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert llama.scaled_dot_product_attention is plain


@pytest.mark.parametrize("mask", ["causal", "bool", "window", None, "additive"])
def test_every_kind_of_mask_gives_what_the_plain_function_gives(mask):
    q, k, v = (mx.random.normal((2, heads, 40, 8), key=mx.random.key(heads)) for heads in (4, 2, 2))
    v = v + 1
    positions = mx.arange(40)
    causal = positions[:, None] >= positions[None]
    masks = {
        "causal": "causal",
        "bool": causal & (mx.random.uniform(shape=(40, 40), key=mx.random.key(9)) < 0.7)
        | mx.eye(40, dtype=mx.bool_),
        "window": causal & (positions[:, None] < positions[None] + 5),
        None: None,
        "additive": mx.where(causal, 0.0, -1e9),
    }
    blocked = _attention(base.scaled_dot_product_attention, 16, 1)
    ours = blocked(q, k, v, cache=None, scale=0.3, mask=masks[mask])
    plain = base.scaled_dot_product_attention(q, k, v, cache=None, scale=0.3, mask=masks[mask])
    assert mx.allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_window_narrows_what_is_looked_at_and_changes_no_number():
    segments = mx.array([[0] * 10 + [1] * 12 + [-1] * 10])
    q, k, v = (mx.random.normal((1, 2, 32, 8), key=mx.random.key(i)) for i in range(3))
    blocked = _attention(base.scaled_dot_product_attention, 8, 1)
    wide, narrow = SegmentMask(segments), SegmentMask(segments, window=12)
    assert narrow.first_key(24) == 13
    assert mx.allclose(
        blocked(q, k, v, scale=0.3, mask=wide), blocked(q, k, v, scale=0.3, mask=narrow), atol=1e-6
    )


def test_long_rows_take_a_fraction_of_the_memory():
    model, batch = with_lora(tiny_llama(layers=1)), random_batch([1025])

    def peak(objective):
        gradients(objective, batch)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        gradients(objective, batch)
        return mx.get_peak_memory() - before

    objective = objective_for(model)
    scores = 4 * 4 * 1024**2
    plain = peak(Objective(model, objective.parts))
    assert plain > scores
    assert peak(objective) < 0.5 * plain
