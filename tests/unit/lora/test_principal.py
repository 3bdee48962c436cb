"""lora/principal.py"""

import mlx.core as mx
import pytest

from mlx_qlora.lora.principal import principal


def matrix(rows: int, columns: int, *, decay: float) -> mx.array:
    """Random, with singular values that fall as exp(−decay · index)."""
    side = min(rows, columns)
    one, other = mx.random.split(mx.random.key(rows + columns))
    u = mx.linalg.qr(mx.random.normal((rows, side), key=one), stream=mx.cpu)[0]
    v = mx.linalg.qr(mx.random.normal((columns, side), key=other), stream=mx.cpu)[0]
    return (u * mx.exp(-decay * mx.arange(side))) @ v.T


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (60, 600), (600, 60), (400, 300), (300, 400)])
def test_values_and_vectors_are_the_largest_of_the_full_decomposition(shape):
    wide = matrix(*shape, decay=0.05)
    u, s, vt = principal(wide, 8, mx.random.key(0))
    assert (u.shape, s.shape, vt.shape) == ((shape[0], 8), (8,), (8, shape[1]))
    assert mx.allclose(s, mx.exp(-0.05 * mx.arange(8)), rtol=1e-4)
    assert mx.allclose(u.T @ u, mx.eye(8), atol=1e-4)
    assert mx.allclose(vt @ vt.T, mx.eye(8), atol=1e-4)
    assert mx.allclose(u.T @ wide @ vt.T, mx.diag(s), atol=1e-4)


@pytest.mark.parametrize("shape", [(350, 300), (300, 350)])
def test_of_a_flat_spectrum_nearly_as_much_is_taken_as_there_is(shape):
    """What quantization loses is close to noise: no direction stands out, and many are nearly as good."""
    noise = mx.random.normal(shape, key=mx.random.key(5))
    u, s, vt = principal(noise, 16, mx.random.key(0))
    best = mx.square(mx.linalg.svd(noise, compute_uv=False, stream=mx.cpu)[:16]).sum().item()
    total = mx.square(noise).sum().item()
    taken = total - mx.square(noise - (u * s) @ vt).sum().item()
    assert 0.97 * best < taken <= best * 1.001


def test_it_is_a_function_of_the_key():
    wide = mx.random.normal((400, 300), key=mx.random.key(5))
    first, again, other = (principal(wide, 4, mx.random.key(k))[0] for k in (0, 0, 1))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)


def test_a_matrix_of_zeros_has_zeros():
    _, s, _ = principal(mx.zeros((40, 30)), 4, mx.random.key(0))
    assert mx.array_equal(s, mx.zeros(4))
