"""training/optimizer.py"""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.config import TrainingConfig
from mlx_qlora.training.optimizer import (
    build_optimizer,
    clipped,
    global_norm,
    learning_rate_at,
    warmup_length,
)


def rates(total: int, **config: object) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **config)
    return [learning_rate_at(step, total, config) for step in range(1, total + 1)]


def test_warm_up_rises_linearly_and_reaches_the_peak_at_its_last_update():
    assert rates(10, warmup_steps=4, lr_schedule="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_without_warm_up_the_first_update_is_at_the_peak():
    assert rates(4, warmup_steps=0, lr_schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_a_falling_schedule_would_reach_zero_one_update_after_the_last():
    for schedule in ("linear", "cosine"):
        config = TrainingConfig(learning_rate=1.0, warmup_steps=3, lr_schedule=schedule)
        assert learning_rate_at(20, 20, config) > 0
        assert learning_rate_at(21, 20, config) == pytest.approx(0, abs=1e-12)


def test_cosine_is_at_half_in_the_middle():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=1, lr_schedule="cosine")
    assert learning_rate_at(6, 10, config) == pytest.approx(0.5)


def test_a_run_shorter_than_its_warm_up_uses_a_tenth_of_its_steps():
    assert warmup_length(TrainingConfig(warmup_steps=100), 40) == 4
    assert warmup_length(TrainingConfig(warmup_steps=100), 101) == 100
    assert max(rates(40, warmup_steps=100)) == 1.0


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 500),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_every_rate_is_positive_never_above_the_peak_and_falls_only_after_warm_up(total, warmup, schedule):
    values = rates(total, warmup_steps=warmup, lr_schedule=schedule)
    assert all(0 < value <= 1 for value in values)
    peak = max(warmup_length(TrainingConfig(warmup_steps=warmup), total), 1)
    assert values[:peak] == sorted(values[:peak])
    assert values[peak - 1 :] == sorted(values[peak - 1 :], reverse=True)


def test_clipping_keeps_the_direction_and_bounds_the_norm():
    grads = {"a": mx.array([3.0, 0.0]), "b": {"c": mx.array([[4.0]])}}
    norm = global_norm(grads)
    assert norm.item() == pytest.approx(5)
    small = clipped(grads, norm, 1.0)
    assert global_norm(small).item() == pytest.approx(1)
    assert small["a"][0].item() / small["b"]["c"][0, 0].item() == pytest.approx(3 / 4)
    assert clipped(grads, norm, None) is grads
    assert mx.array_equal(clipped(grads, norm, 10.0)["a"], grads["a"])


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_the_first_adam_update_is_one_learning_rate_long(name):
    optimizer = build_optimizer(TrainingConfig(optimizer=name, learning_rate=0.1, weight_decay=0.0))
    weights = optimizer.apply_gradients({"w": mx.array([0.01, -5.0])}, {"w": mx.zeros(2)})
    assert mx.allclose(weights["w"], mx.array([-0.1, 0.1]), atol=1e-6)


OPTIMIZERS = ["adamw", "adam", "sgd", "adafactor", "lion"]
NAMES = ("q.lora_a", "q.lora_b", "v.lora_a", "v.lora_b", "v.m")


def after_updates(optimizer, *, first: int = 0, last: int = 3, weights=None):
    """A model's trained tensors after some updates with gradients that are functions of their number."""
    flat = {name: mx.random.normal((4, 4), key=mx.random.key(i)) for i, name in enumerate(NAMES)}
    weights = weights or tree_unflatten(list(flat.items()))
    for step in range(first, last):
        key = mx.random.key(100 + step)
        grads = {
            name: mx.random.normal((4, 4), key=mx.random.split(key, 9)[i]) for i, name in enumerate(NAMES)
        }
        optimizer.learning_rate = 0.01 / (step + 1)
        weights = optimizer.apply_gradients(tree_unflatten(list(grads.items())), weights)
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_lora_plus_the_update_of_b_is_that_many_times_as_long_and_no_other_changes(name):
    one = TrainingConfig(optimizer=name)
    sixteen = TrainingConfig(optimizer=name, lora_plus_ratio=16)
    before = dict(tree_flatten(after_updates(None, last=0)))
    plain = dict(tree_flatten(after_updates(build_optimizer(one), last=1)))
    plus = dict(tree_flatten(after_updates(build_optimizer(sixteen), last=1)))
    for path, array in before.items():
        ratio = 16 if path.endswith("lora_b") else 1
        wanted = ratio * (plain[path] - array)
        assert mx.allclose(plus[path] - array, wanted, rtol=1e-4, atol=1e-5), path


def test_a_ratio_of_one_is_the_plain_optimizer():
    assert type(build_optimizer(TrainingConfig())).__name__ == "AdamW"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_lora_plus_goes_through_a_checkpoint_and_on_exactly(name):
    config = TrainingConfig(optimizer=name, lora_plus_ratio=8, weight_decay=0.1 if name != "adam" else 0)
    whole = dict(tree_flatten(after_updates(build_optimizer(config), last=5)))
    first = build_optimizer(config)
    half = after_updates(first, last=2)
    stored = [(path, mx.array(array)) for path, array in tree_flatten(first.state)]
    second = build_optimizer(config)
    second.init(half)
    assert {path for path, _ in tree_flatten(second.state)} == {path for path, _ in stored}
    second.state = tree_unflatten(stored)
    resumed = dict(tree_flatten(after_updates(second, first=2, last=5, weights=half)))
    assert all(mx.array_equal(whole[path], resumed[path]) for path in whole)


def test_lora_plus_says_the_rate_of_all_but_b():
    optimizer = build_optimizer(TrainingConfig(lora_plus_ratio=16))
    optimizer.learning_rate = 0.5
    assert optimizer.learning_rate.item() == 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_square(name):
    optimizer = build_optimizer(TrainingConfig(optimizer=name, learning_rate=0.05))
    weights = {"w": mx.full((4, 4), 2.0)}
    for _ in range(20):
        weights = optimizer.apply_gradients({"w": 2 * weights["w"]}, weights)
    assert mx.abs(weights["w"]).max().item() < 1.5
