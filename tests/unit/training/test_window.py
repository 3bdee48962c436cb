"""training/window.py: what an epoch costs, beside the batches that a run really has."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.batches import Batches, Layout
from mlx_qlora.dataset.records import Example
from mlx_qlora.training.window import Window, best_window, epoch_cost

LENGTHS = st.lists(st.integers(2, 150), min_size=1, max_size=40)


def batches_of(window: Window) -> list:
    rows = [Example(np.arange(1, n + 1, dtype=np.int32), np.arange(n) > 0, "") for n in window.lengths]
    made = Batches(rows, window.batch_size, 1, window.seed, window.layout)
    return [batch for step in range(made.steps_per_epoch) for batch in made.step(step)]


@settings(deadline=None, max_examples=40)
@given(
    lengths=LENGTHS,
    size=st.integers(1, 4),
    seed=st.integers(0, 9),
    capacity=st.sampled_from([None, None, 150]),
    may_concatenate=st.booleans(),
)
def test_positions_are_those_of_the_batches_a_run_really_has(lengths, size, seed, capacity, may_concatenate):
    # Attention that looks at one position only leaves the positions themselves.
    layout = Layout(may_concatenate, linear_cost=1e9, row_capacity=capacity, is_banded=True)
    window = Window(lengths=tuple(lengths), batch_size=size, layout=layout, seed=seed)
    positions = sum(batch.inputs_BT.size for batch in batches_of(window))
    assert epoch_cost(window) / 1e9 == pytest.approx(positions, rel=1e-5)


PADDED = Layout(linear_cost=12.0 * 64)


def test_a_few_long_rows_in_a_padded_batch_are_worth_cutting():
    window = Window(lengths=(40,) * 99 + (500,), batch_size=4, layout=replace(PADDED, may_concatenate=False))
    found = best_window(window, DataConfig())
    assert found is not None
    assert found.assignment == "data.max_seq_length=64"
    cut = replace(window, lengths=(40,) * 99 + (64,))
    assert found.factor == pytest.approx(epoch_cost(window) / epoch_cost(cut))
    assert "cuts 1.0% of the rows" in found.effect


def test_a_shorter_window_is_not_offered_where_it_would_cut_many_rows():
    window = Window(lengths=(40,) * 90 + (500,) * 10, batch_size=4, layout=PADDED)
    assert best_window(window, DataConfig()) is None


def test_packing_is_offered_where_the_model_can_and_nothing_is_packed_yet():
    window = Window(lengths=(12,) * 64, batch_size=1, layout=replace(PADDED, is_banded=True), may_pack=True)
    found = best_window(window, DataConfig())
    assert found is not None
    assert found.assignment == "data.packing=true"
    assert found.factor > 2
    assert best_window(replace(window, may_pack=False), DataConfig()) is None
    packed = replace(PADDED, row_capacity=511)
    assert best_window(replace(window, layout=packed), DataConfig(packing=True)) is None


def test_no_rows_are_no_window():
    assert best_window(Window(lengths=(), batch_size=1, layout=PADDED), DataConfig()) is None
