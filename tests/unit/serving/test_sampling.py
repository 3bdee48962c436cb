"""Each row draws by its own settings, from a key of its own."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_qlora.serving.jobs import Job
from mlx_qlora.serving.sampling import Drawing, draw, logits_processors, thresholds


def drawing(seed: int = 0, *, temperature: float = 1.0, **kind: float) -> Drawing:
    return Drawing(
        **{"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": seed, **kind}
    )


def logprobs_of(seed: int, rows: int = 1, size: int = 40, spread: float = 2.0) -> mx.array:
    logits = mx.random.normal((rows, size), key=mx.random.key(seed)) * spread
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    others=st.lists(st.integers(0, 2**32), max_size=4),
    place=st.integers(0, 4),
    num_before=st.integers(0, 50),
)
def test_a_draw_depends_on_seed_and_position_and_not_on_the_other_rows(seed, others, place, num_before):
    alone = drawing(seed)
    alone.num_drawn = num_before
    expected = draw(logprobs_of(1), [alone]).item()
    rows = [drawing(other) for other in others]
    place = min(place, len(rows))
    again = drawing(seed)
    again.num_drawn = num_before
    rows.insert(place, again)
    logprobs = logprobs_of(7, len(rows))
    logprobs[place] = logprobs_of(1)[0]
    assert draw(logprobs, rows)[place].item() == expected
    assert {row.num_drawn for row in rows if row is not again} <= {1}
    assert again.num_drawn == num_before + 1


def test_each_position_of_a_seed_has_a_key_of_its_own():
    keys = set()
    for seed in range(20):
        row = drawing(seed)
        for position in range(20):
            row.num_drawn = position
            keys.add(tuple(row.next_key()))
    assert len(keys) == 400


def test_draws_follow_the_distribution():
    logprobs = logprobs_of(3, size=6, spread=1.0)
    rows, counts = [drawing(seed, temperature=0.7) for seed in range(500)], np.zeros(6)
    for _ in range(8):
        counts += np.bincount(np.array(draw(mx.repeat(logprobs, 500, axis=0), rows)), minlength=6)
    expected = np.array(mx.softmax(logprobs[0] / 0.7)) * 4000
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 20.5  # the 99.9th percentile for five degrees of freedom


def test_temperature_zero_takes_the_likeliest_whatever_the_other_rows_do():
    logprobs = logprobs_of(5, rows=3)
    rows = [drawing(1), drawing(2, temperature=0.0), drawing(3, temperature=100.0)]
    assert draw(logprobs, rows)[1].item() == mx.argmax(logprobs[1]).item()


def test_a_tiny_temperature_takes_the_likeliest_too():
    logprobs = logprobs_of(5, rows=2)
    tokens = draw(logprobs, [drawing(1, temperature=1e-30), drawing(2, temperature=1e-6)])
    assert tokens.tolist() == mx.argmax(logprobs, axis=-1).tolist()


@pytest.fixture(scope="module")
def uncompiled():
    """mlx-lm compiles its filters anew for each value, which takes seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("uncompiled")
@settings(max_examples=40, deadline=None)
@given(
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    top_k=st.one_of(st.just(0), st.integers(1, 60)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    seed=st.integers(0, 50),
)
def test_the_same_tokens_are_left_out_as_in_mlx_lm(top_p, top_k, min_p, seed):
    logprobs = logprobs_of(seed)
    theirs = logprobs
    if top_p < 1:
        theirs = apply_top_p(theirs, top_p)
    if min_p > 0:
        theirs = apply_min_p(theirs, min_p)
    if 0 < top_k < logprobs.shape[-1]:  # theirs refuses more than there are
        theirs = apply_top_k(theirs, top_k)
    floor = thresholds(logprobs, [drawing(top_p=top_p, top_k=top_k, min_p=min_p)])
    ours, kept = np.array(logprobs >= floor)[0], np.array(theirs > -mx.inf)[0]
    edge = np.isclose(np.array(logprobs)[0], floor.item(), atol=1e-6)  # a sum that rounds either way
    assert np.array_equal(ours[~edge], kept[~edge])
    assert ours.any()


def test_each_row_is_filtered_by_its_own_settings():
    logprobs = mx.repeat(logprobs_of(2), 4, axis=0)
    rows = [drawing(top_k=1), drawing(), drawing(top_p=1e-9), drawing(min_p=1.0)]
    kept = (logprobs >= thresholds(logprobs, rows)).sum(axis=-1).tolist()
    assert kept == [1, 40, 1, 1]


def penalized(context: list[int], num_prompt: int, **kind: object) -> np.ndarray:
    job = Job(adapter=None, tokens=[1] * num_prompt, max_tokens=1, **kind)
    logits = mx.array([[2.0, -2.0, 1.0, 0.5]])
    for process in logits_processors(job):
        logits = process(mx.array(context), logits)
    return np.array(logits)[0]


def test_repetition_counts_the_prompt_and_goes_by_the_sign():
    assert penalized([0, 1], 1, repetition_penalty=2.0).tolist() == [1.0, -4.0, 1.0, 0.5]


def test_presence_and_frequency_count_only_what_was_generated():
    changed = penalized([0, 2, 2, 3], 1, presence_penalty=0.25, frequency_penalty=1.0)
    assert changed.tolist() == [2.0, -2.0, 1.0 - 2.25, 0.5 - 1.25]
    assert penalized([0], 1, presence_penalty=1.0).tolist() == [2.0, -2.0, 1.0, 0.5]


def test_bias_is_added_to_the_tokens_it_names():
    assert penalized([0], 1, logit_bias={1: 100.0, 3: -0.5}).tolist() == [2.0, 98.0, 1.0, 0.0]


def test_a_job_without_penalties_has_no_processors():
    assert logits_processors(Job(adapter=None, tokens=[1], max_tokens=1, temperature=0.7, top_p=0.5)) == []


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**200])
def test_any_whole_number_is_a_seed(seed):
    words = drawing(seed).next_key()
    assert all(0 <= word < 2**32 for word in words)
    assert math.isfinite(draw(logprobs_of(1), [drawing(seed)]).item())
