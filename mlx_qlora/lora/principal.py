"""The largest singular values and vectors of a matrix, without a full decomposition of a large one."""

from __future__ import annotations

import mlx.core as mx

EXACT_SIDE = 256
"""A matrix whose shorter side is at most this is decomposed as a whole."""
OVERSAMPLING = 16
"""Directions carried along beyond those wanted."""
NUM_ITERATIONS = 8
"""Products with the matrix and its transpose: each sharpens the directions by the ratio of their values."""


def principal(matrix: mx.array, rank: int, key: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """U (out, rank), S (rank,) and Vᵀ (rank, in), float32, with U S Vᵀ nearest to `matrix` of that rank.

    Exact for small matrices; of large ones a randomized subspace iteration, which is a function of `key`.

    Args:
        matrix: (out, in), float32; `rank` is at most its shorter side.

    Source: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    basis = _range(matrix, rank + OVERSAMPLING, key)
    # basisᵀ · matrix is wide: its R is decomposed in its stead, or MLX would make a square Vᵀ of its width.
    rows, r = mx.linalg.qr(matrix.T @ basis, stream=mx.cpu)
    u, s, vt = mx.linalg.svd(r.T, stream=mx.cpu)
    return (basis @ u)[:, :rank], s[:rank], (vt @ rows.T)[:rank]


def _range(matrix: mx.array, num_directions: int, key: mx.array) -> mx.array:
    """Orthonormal columns, (out, directions), that hold what is largest in `matrix`, or all of it."""
    num_rows, width = matrix.shape
    enough = max(EXACT_SIDE, num_directions)
    if num_rows <= enough:
        return mx.eye(num_rows)
    if width <= enough:
        return _orthonormal(matrix)
    basis = _orthonormal(matrix @ mx.random.normal((width, num_directions), key=key))
    for _ in range(NUM_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
        mx.eval(basis)
    return basis


def _orthonormal(columns: mx.array) -> mx.array:
    return mx.linalg.qr(columns, stream=mx.cpu)[0]
