"""objective/segments.py: examples in one row are as good as alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.batches import Layout, collated
from mlx_qlora.dataset.records import Example
from mlx_qlora.errors import ConfigError
from mlx_qlora.objective.loss import Objective, objective_for
from mlx_qlora.objective.segments import RowCache, keeps_examples_apart
from tests.tiny import ARCHITECTURES, VOCAB, target_modules, tiny_llama, tiny_model, with_lora
from tests.unit.objective.test_fused import assert_equal, gradients

ONE_ROW = Layout(may_concatenate=True, linear_cost=1e9)


def examples(*lengths: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, VOCAB, length).astype(np.int32) for length in lengths]
    return [Example(row, np.arange(len(row)) > 2, "made") for row in rows]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_every_gradient_are_those_of_padded_rows(name):
    model = with_lora(tiny_model(name), target_modules=target_modules(name))
    rows = [[example] for example in examples(9, 40, 23)]  # longer than mistral's window of 8
    padded, end_to_end = collated(rows, Layout()), collated(rows, ONE_ROW)
    assert padded.inputs_BT.shape == (3, 64)
    assert end_to_end.inputs_BT.shape == (1, 96)
    assert_equal(gradients(Objective(model, None), padded), gradients(objective_for(model), end_to_end))


def test_packed_rows_with_several_examples_each_too():
    model = with_lora(tiny_model("mistral"))
    parts = examples(9, 12, 30, 8, 20)
    packed = collated([parts[:2], parts[2:]], Layout())
    assert packed.inputs_BT.shape == (2, 64)
    padded = collated([[part] for part in parts], Layout())
    assert_equal(gradients(Objective(model, None), padded), gradients(objective_for(model), packed))


def test_a_mask_lets_positions_see_their_own_example_up_to_themselves():
    mask = RowCache(mx.array([[0, 0, 1, 1, -1]])).make_mask(5)
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert mask[0, 0].astype(mx.int32).tolist() == expected


def test_a_window_bounds_how_far_back_a_position_sees():
    mask = RowCache(mx.zeros((1, 6), mx.int32)).make_mask(6, window_size=2)
    assert mask[0, 0].sum(axis=-1).tolist() == [1, 2, 2, 2, 2, 2]


def test_a_model_with_learned_positions_is_found_out_and_padded_instead():
    from mlx_lm.models import gpt2

    args = gpt2.ModelArgs(
        model_type="gpt2", n_ctx=64, n_embd=64, n_head=4, n_layer=2, n_positions=64,
        layer_norm_epsilon=1e-5, vocab_size=VOCAB,
    )  # fmt: skip
    model = gpt2.Model(args)
    assert not keeps_examples_apart(model)
    objective = objective_for(model)
    assert any("padded" in note for note in objective.notes)
    assert not objective.layout(DataConfig()).may_concatenate
    with pytest.raises(ConfigError, match="packed"):
        objective.layout(DataConfig(packing=True))


def test_a_model_that_leaks_across_examples_is_found_out():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()
            self.layers = self.inner.layers

        def __call__(self, tokens, cache=None):
            return mx.cumsum(self.inner(tokens, cache=cache), axis=1)

    assert not keeps_examples_apart(Leaky())


def test_end_to_end_is_chosen_only_where_it_is_cheaper():
    layout = Layout(may_concatenate=True, linear_cost=100.0)
    assert layout.concatenates([200, 10, 12, 9])
    assert not layout.concatenates([64, 64, 64, 64])
    assert not layout.concatenates([512, 400])  # attention over one long row would cost more
    assert not Layout(may_concatenate=False, linear_cost=1e9).concatenates([200, 10])
    assert not Layout(may_concatenate=True, linear_cost=1e9, longest_row=96).concatenates([60, 60])
    assert Layout(may_concatenate=True, linear_cost=100.0, is_banded=True).concatenates([512, 400])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_several_rows_of_several_examples_are_tried_before_packing(name):
    """gemma2's own attention would read the second row's mask as its second head's."""
    objective = objective_for(tiny_model(name))
    assert objective.keeps_examples_apart
    if name == "gemma2":
        with pytest.raises(ConfigError, match="cannot be packed"):
            objective.layout(DataConfig(packing=True))
    else:
        assert objective.layout(DataConfig(packing=True)).row_capacity
