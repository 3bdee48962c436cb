"""dataset/batches.py"""

import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.dataset import Batch, Batches, Example, in_order
from mlx_qlora.dataset.batches import Layout
from mlx_qlora.errors import DataError

quick = settings(max_examples=60, deadline=None)


def examples_of(lengths: list[int]) -> list[Example]:
    """Examples that are told apart by their first token; the mask is different in each."""
    made = []
    for number, length in enumerate(lengths, start=1):
        rng = np.random.default_rng(number)
        tokens = np.concatenate([[number], rng.integers(1000, 9999, length - 1)]).astype(np.int32)
        mask = rng.random(length) < 0.5
        mask[0] = False
        made.append(Example(tokens, mask, f"f:{number}"))
    return made


def content(batch: Batch) -> list[tuple]:
    arrays = (batch.inputs_BT, batch.targets_BT, batch.mask_BT)
    return [(array.shape, array.tobytes()) for array in arrays]


def rows_of(batch: Batch) -> list[int]:
    return batch.inputs_BT[:, 0].tolist()


def epoch_of(batches: Batches, epoch: int) -> list[int]:
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [row for step in steps for batch in batches.step(step) for row in rows_of(batch)]


LENGTHS = st.lists(st.integers(2, 100), min_size=1, max_size=30)
SIZES = {
    "batch_size": st.integers(1, 8),
    "accumulation": st.integers(1, 5),
    "seed": st.integers(0, 2**32 - 1),
}


@quick
@given(lengths=LENGTHS, epoch=st.integers(0, 5), **SIZES)
def test_every_example_comes_exactly_once_in_each_epoch(lengths, epoch, batch_size, accumulation, seed):
    batches = Batches(examples_of(lengths), batch_size, accumulation, seed)
    assert Counter(epoch_of(batches, epoch)) == Counter(range(1, len(lengths) + 1))


@quick
@given(lengths=LENGTHS, step=st.integers(0, 40), **SIZES)
def test_a_step_is_the_same_with_or_without_the_steps_before_it(
    lengths, step, batch_size, accumulation, seed
):
    examples = examples_of(lengths)
    walked = Batches(examples, batch_size, accumulation, seed)
    for before in range(step):
        walked.step(before)
    jumped = Batches(examples, batch_size, accumulation, seed).step(step)
    assert [content(batch) for batch in walked.step(step)] == [content(batch) for batch in jumped]
    walked.step(step + walked.steps_per_epoch)
    assert [content(batch) for batch in walked.step(step)] == [content(batch) for batch in jumped]


@quick
@given(lengths=LENGTHS, **SIZES)
def test_a_step_has_full_micro_batches_except_the_epochs_last(lengths, batch_size, accumulation, seed):
    batches = Batches(examples_of(lengths), batch_size, accumulation, seed)
    sizes = [
        [len(batch.inputs_BT) for batch in batches.step(step)] for step in range(batches.steps_per_epoch)
    ]
    flat = list(chain.from_iterable(sizes))
    assert flat == [batch_size] * (len(lengths) // batch_size) + (
        [r] if (r := len(lengths) % batch_size) else []
    )
    assert [len(step) for step in sizes[:-1]] == [accumulation] * (len(sizes) - 1)
    assert 1 <= len(sizes[-1]) <= accumulation
    assert batches.micro_batches_per_epoch == len(flat)


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    examples = examples_of([5] * 64)
    orders = [
        tuple(epoch_of(Batches(examples, 4, 2, seed), epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 9
    assert tuple(range(1, 65)) not in orders


@quick
@given(lengths=st.lists(st.integers(2, 200), min_size=1, max_size=5))
def test_a_batch_holds_its_examples_shifted_by_one_and_nothing_else(lengths):
    examples = examples_of(lengths)
    (batch,) = Batches(examples, len(examples), 1, 0).step(0)
    longest = max(lengths) - 1
    assert batch.inputs_BT.shape == batch.targets_BT.shape == batch.mask_BT.shape
    width = batch.inputs_BT.shape[1]
    assert width % 32 == 0
    assert longest <= width < longest + 32
    assert (batch.inputs_BT.dtype, batch.targets_BT.dtype, batch.mask_BT.dtype) == (np.int32, np.int32, bool)
    for row, number in enumerate(rows_of(batch)):
        example = examples[number - 1]
        last = len(example.tokens) - 1
        assert batch.inputs_BT[row, :last].tolist() == example.tokens[:-1].tolist()
        assert batch.targets_BT[row, :last].tolist() == example.tokens[1:].tolist()
        assert batch.mask_BT[row, :last].tolist() == example.targets_mask[1:].tolist()
        assert not batch.mask_BT[row, last:].any()
    assert batch.tokens == sum(lengths)
    assert batch.target_tokens == sum(int(example.targets_mask.sum()) for example in examples)


@quick
@given(
    lengths=LENGTHS,
    epoch=st.integers(0, 2),
    layout=st.sampled_from(
        [
            Layout(),
            Layout(may_concatenate=True, linear_cost=1e9),
            Layout(may_concatenate=True, row_capacity=128),
        ]
    ),
    is_halved=st.booleans(),
    **SIZES,
)
def test_a_batch_says_which_examples_stand_in_its_rows_and_in_which_order(
    lengths, epoch, layout, is_halved, batch_size, accumulation, seed
):
    examples = examples_of(lengths)
    batches = Batches(examples, batch_size, accumulation, seed, layout)
    batches = (batches.halved() or batches) if is_halved else batches
    for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
        for batch in batches.step(step):
            for row, numbers in zip(batch.inputs_BT, batch.examples, strict=True):
                expected = np.concatenate([examples[number].tokens[:-1] for number in numbers])
                assert row[: len(expected)].tolist() == expected.tolist()
                assert not row[len(expected) :].any()


@quick
@given(lengths=st.lists(st.integers(2, 100), max_size=30), batch_size=st.integers(1, 8))
def test_validation_sees_every_example_once_the_short_ones_together(lengths, batch_size):
    batches = list(in_order(examples_of(lengths), batch_size))
    assert Counter(row for batch in batches for row in rows_of(batch)) == Counter(range(1, len(lengths) + 1))
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    longest = [max(lengths[row - 1] for row in rows_of(batch)) for batch in batches]
    shortest = [min(lengths[row - 1] for row in rows_of(batch)) for batch in batches]
    assert all(long <= short for (long, _), (_, short) in pairwise(zip(longest, shortest, strict=True)))
    assert all(len(batch.inputs_BT) == batch_size for batch in batches[:-1])


def test_no_examples_are_refused_in_training_and_are_nothing_in_validation():
    with pytest.raises(DataError, match="no row to train on"):
        Batches([], 2, 2, 0)
    assert list(in_order([], 2)) == []


def test_the_room_is_imported_without_transformers_and_mlx_lm():
    heavy = ["transformers", "mlx_lm", "tokenizers", "huggingface_hub"]
    check = f"import sys, mlx_qlora.dataset; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


RANKS = st.integers(1, 6)


def rows_in(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in rows_of(batch)]


@quick
@given(lengths=LENGTHS, ranks=RANKS, step=st.integers(0, 20), **SIZES)
def test_the_shares_of_all_ranks_are_the_update_without_loss_or_repetition(
    lengths, ranks, step, batch_size, accumulation, seed
):
    batches = Batches(examples_of(lengths), batch_size, accumulation, seed)
    shares = [batches.shared(rank, ranks).step(step) for rank in range(ranks)]
    assert Counter(chain(*map(rows_in, shares))) == Counter(rows_in(batches.step(step)))
    assert sum(b.target_tokens for s in shares for b in s) == sum(b.target_tokens for b in batches.step(step))
    assert all(1 <= len(batch.inputs_BT) <= batch_size for share in shares for batch in share)


@quick
@given(lengths=LENGTHS, ranks=RANKS, step=st.integers(0, 20), **SIZES)
def test_no_rank_has_more_than_its_part_and_one_row(lengths, ranks, step, batch_size, accumulation, seed):
    batches = Batches(examples_of(lengths), batch_size, accumulation, seed)
    whole = sum(batch.tokens for batch in batches.step(step))
    loads = [sum(b.tokens for b in batches.shared(rank, ranks).step(step)) for rank in range(ranks)]
    assert max(loads) <= whole / ranks + max(lengths)


@quick
@given(lengths=LENGTHS, ranks=RANKS, step=st.integers(0, 20), **SIZES)
def test_a_halved_share_has_the_rows_of_the_whole_one(lengths, ranks, step, batch_size, accumulation, seed):
    part = Batches(examples_of(lengths), 2 * batch_size, accumulation, seed).shared(ranks - 1, ranks)
    assert rows_in(part.halved().step(step)) == rows_in(part.step(step))


def test_an_update_with_fewer_rows_than_ranks_leaves_some_without_any():
    batches = Batches(examples_of([9, 9, 9]), 2, 1, seed=0)
    assert [len(rows_in(batches.shared(rank, 4).step(1))) for rank in range(4)] == [1, 0, 0, 0]


def test_packed_rows_are_shared_whole():
    layout = Layout(may_concatenate=True, row_capacity=60)
    batches = Batches(examples_of([12, 30, 25, 40, 8, 50, 17]), 2, 2, 0, layout)
    shares = [batches.shared(rank, 3).step(0) for rank in range(3)]
    whole = sorted(row for batch in batches.step(0) for row in batch.examples)
    assert sorted(row for share in shares for batch in share for row in batch.examples) == whole
