"""dataset/packing.py, and what batches make of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.dataset.batches import Batches, Layout
from mlx_qlora.dataset.packing import pack, padded_length
from mlx_qlora.dataset.records import Example

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=80)


@given(lengths=LENGTHS)
def test_every_item_is_in_one_bin_and_no_bin_overflows(lengths):
    bins = pack(lengths, 64)
    assert sorted(item for row in bins for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 64 for row in bins)


@given(lengths=LENGTHS)
def test_no_two_bins_could_be_one(lengths):
    loads = sorted(sum(lengths[item] for item in row) for row in pack(lengths, 64))
    assert len(loads) < 2 or loads[0] + loads[1] > 64


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_the_number_of_bins_does_not_depend_on_the_order(lengths, seed):
    shuffled = np.random.default_rng(seed).permutation(lengths).tolist()
    assert len(pack(shuffled, 64)) == len(pack(lengths, 64))


def test_an_item_longer_than_a_bin_stands_alone():
    assert sorted(map(sorted, pack([100, 3, 4], 64))) == [[0], [1, 2]]


@given(length=st.integers(1, 5000))
def test_a_width_holds_its_row_with_little_to_spare(length):
    width = padded_length(length)
    assert width >= length
    assert width % 32 == 0
    assert width - length < max(32, length / 8)


def test_there_are_few_widths():
    assert len({padded_length(length) for length in range(1, 2049)}) == 32


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40),
    batch_size=st.integers(1, 3),
    capacity=st.sampled_from([None, 29, 64]),
    concatenate=st.booleans(),
)
def test_every_example_is_seen_once_an_epoch_in_any_layout(lengths, batch_size, capacity, concatenate):
    rows = [np.full(length, 1 + i, np.int32) for i, length in enumerate(lengths)]
    examples = [Example(row, np.arange(len(row)) > 0, "made") for row in rows]
    layout = Layout(may_concatenate=concatenate, linear_cost=1e6, row_capacity=capacity)
    batches = Batches(examples, batch_size, 2, 7, layout)
    for epoch in range(2):
        seen: dict[int, int] = {}
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        for batch in (batch for step in steps for batch in batches.step(step)):
            numbers, counts = np.unique(batch.targets_BT[batch.mask_BT], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                assert number not in seen
                seen[number] = count
        assert seen == {1 + i: length - 1 for i, length in enumerate(lengths)}


def test_packed_rows_are_fewer_and_fuller():
    rows = [np.ones(n, np.int32) for n in [20, 12, 30, 3, 9, 8, 25, 14]]
    examples = [Example(row, np.arange(len(row)) > 0, "made") for row in rows]
    packed = Batches(examples, 1, 1, 0, Layout(row_capacity=63))
    assert packed.steps_per_epoch == 2
    assert {batch.inputs_BT.shape for step in range(2) for batch in packed.step(step)} == {(1, 64)}
