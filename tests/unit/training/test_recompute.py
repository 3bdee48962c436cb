"""training/recompute.py: what it keeps. Its mathematics: test_step.py, test_attention.py, test_dense.py."""

import gc

import mlx.core as mx
import pytest

from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.training.recompute import checkpointed

WIDTH = 512
WIDE_BYTES = 4 * WIDTH**2


def layer(arrays):
    """A small state in, a small state out, a wide array between."""
    state, weight = arrays
    return mx.sin(state[:, None] * weight[None, :]).mean(axis=1) + state


def gradient_peak_bytes(num_layers, checkpoint):
    """The most a gradient takes, in bytes, where MLX is told not to run ahead."""
    weights = [mx.random.normal((WIDTH,), key=mx.random.key(i)) for i in range(num_layers)]
    state = mx.random.normal((WIDTH,), key=mx.random.key(99))
    mx.eval(weights, state)

    def total(weights):
        hidden = state
        for weight in weights:
            hidden = checkpoint(layer, [hidden, weight])
        return hidden.sum()

    with memory_limits(1):
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        gradients = mx.grad(total)(weights)
        mx.eval(gradients)
        return mx.get_peak_memory() - before, gradients


def by_mlx(function, arrays):
    return mx.checkpoint(lambda *arrays: function(list(arrays)))(*arrays)


@pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="a GPU's queue decides by itself what it runs ahead"
)
def test_the_wide_array_of_one_layer_at_a_time_is_there():
    few, many = (gradient_peak_bytes(n, checkpointed)[0] for n in (2, 12))
    assert many - few < 4 * WIDE_BYTES  # 0 on a quiet machine
    few, many = (gradient_peak_bytes(n, by_mlx)[0] for n in (2, 12))
    assert many - few > 9 * WIDE_BYTES  # where this fails MLX has become better, and ours may go


def test_the_gradients_are_those_of_the_plain_computation():
    _, own = gradient_peak_bytes(3, checkpointed)
    _, plain = gradient_peak_bytes(3, lambda function, arrays: function(arrays))
    for one, other in zip(own, plain, strict=True):
        assert mx.allclose(one, other, rtol=1e-6, atol=0)


def test_outputs_and_inputs_of_any_number_and_kind():
    index, x = mx.array([2, 0]), mx.array([1.0, 2.0, 3.0])

    def picked(arrays):
        return arrays[0][arrays[1]], arrays[0] * 2

    def both(x):
        first, second = checkpointed(picked, [x, index])
        return first.sum() + (second**2).sum()

    assert mx.grad(both)(x).tolist() == [1 + 8, 16, 1 + 24]
