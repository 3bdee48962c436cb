"""lora/pissa.py"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.lora.merge import merged_weight
from mlx_qlora.lora.pissa import PiSSALinear, plain_update


def layer(*, bits: int | None = None) -> PiSSALinear:
    linear = nn.Linear(64, 128, bias=False).freeze()
    linear = nn.QuantizedLinear.from_linear(linear, 64, bits) if bits else linear
    pissa = PiSSALinear(linear, rank=4, scale=2.0, dropout=0.0, key=mx.random.key(1))
    one, other = mx.random.split(mx.random.key(2))
    pissa.begin_with(100 * mx.random.normal((64, 4), key=one), 100 * mx.random.normal((4, 128), key=other))
    return pissa


def moved(pissa: PiSSALinear) -> PiSSALinear:
    pissa.lora_a = pissa.lora_a + 0.1 * mx.random.normal((64, 4), key=mx.random.key(3))
    pissa.lora_b = pissa.lora_b + 0.1 * mx.random.normal((4, 128), key=mx.random.key(4))
    return pissa


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_where_it_begins_the_function_is_exactly_that_of_the_base(bits, dtype):
    pissa, x = layer(bits=bits), mx.random.normal((5, 64), key=mx.random.key(0)).astype(dtype)
    assert mx.array_equal(pissa(x), pissa.linear(x))


def test_the_update_is_what_the_product_has_moved_by():
    pissa, x = moved(layer()), mx.random.normal((5, 64), key=mx.random.key(0))
    difference = pissa.lora_a @ pissa.lora_b - pissa.initial_a @ pissa.initial_b
    wanted = x @ (pissa.linear.weight + pissa.scale * difference.T).T
    assert mx.allclose(pissa(x), wanted, rtol=1e-3, atol=0.2)
    assert mx.allclose(x @ merged_weight(pissa, pissa.linear.weight).T, wanted, rtol=1e-3, atol=0.2)
    assert mx.abs(wanted - pissa.linear(x)).max().item() > 10


def test_only_the_moving_matrices_are_trained():
    assert {name for name, _ in tree_flatten(layer().trainable_parameters())} == {"lora_a", "lora_b"}


def test_gradients_are_those_of_the_product():
    pissa, x = moved(layer()), mx.random.normal((5, 64), key=mx.random.key(0))

    def ours(trained):
        pissa.update(trained)
        return mx.sin(pissa(x) / 100).sum()

    def products(trained):
        delta = pissa.scale * (
            trained["lora_a"] @ trained["lora_b"] - mx.stop_gradient(pissa.initial_a @ pissa.initial_b)
        )
        return mx.sin((pissa.linear(x) + x @ delta) / 100).sum()

    trained = {name: pissa[name] for name in ("lora_a", "lora_b")}
    got, wanted = mx.grad(ours)(trained), mx.grad(products)(trained)
    for name, gradient in wanted.items():
        assert mx.allclose(got[name], gradient, atol=1e-2 * mx.abs(gradient).max().item()), name


def test_the_plain_update_has_twice_the_rank():
    pissa = moved(layer())
    a, b = plain_update(pissa.lora_a, pissa.lora_b, pissa.initial_a, pissa.initial_b)
    assert (a.shape, b.shape) == ((64, 8), (8, 128))
    assert mx.allclose(pissa.scale * (a @ b).T, pissa.delta(), atol=1e-5)
