"""Rows of a tensor from wherever they are, so that a large one never has to be in memory as a whole."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_qlora.weights.shards import DTYPES, TensorInfo, read_rows

Rows = Callable[[int, int], mx.array]
"""Rows [first, last) of a tensor seen as a matrix: every axis but the last counts rows."""


@dataclass(frozen=True)
class _Known:
    array: mx.array
    """Kept, so that no other array gets its id."""
    graph: str
    parts: tuple[TensorInfo, ...]


class Provenance:
    """Which lazy arrays hold exactly the bytes of a file, or a stack of such, after ``sanitize``.

    An array that was computed or changed in place is neither: `rows_of` then evaluates it.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], lazy: Mapping[str, mx.array]) -> None:
        self._known: dict[int, _Known] = {}
        for name, array in lazy.items():
            if infos[name].shape and infos[name].dtype in DTYPES:
                self._remember(array, (infos[name],))

    @contextmanager
    def watching_stacks(self) -> Iterator[None]:
        """Remember what is stacked within: the experts of a mixture, 16 GB for one layer of the largest.

        MLX evaluates a stack as a whole even for one row of it.
        """
        stack = mx.stack

        def watched(arrays: Any, axis: int = 0, **options: Any) -> mx.array:
            arrays = list(arrays)
            stacked = stack(arrays, axis, **options)
            parts = [self._parts_of(array) for array in arrays]
            if (
                axis == 0
                and all(len(own) == 1 for own in parts)
                and len({own[0].dtype for own in parts}) == 1
            ):
                self._remember(stacked, tuple(own[0] for own in parts))
            return stacked

        with patch.object(mx, "stack", watched):
            yield

    def rows_of(self, array: mx.array) -> Rows:
        """A reader that keeps alive nothing but, for a computed array, that array until its last rows."""
        parts = self._parts_of(array)
        return _rows_in_files(parts, array.shape) if parts else _rows_in_memory(array)

    def _remember(self, array: mx.array, parts: tuple[TensorInfo, ...]) -> None:
        self._known[id(array)] = _Known(array, graph_of(array), parts)

    def _parts_of(self, array: mx.array) -> tuple[TensorInfo, ...]:
        known = self._known.get(id(array))
        # `a += 1` leaves the same Python object with another graph.
        return known.parts if known is not None and known.graph == graph_of(array) else ()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with all axes but the last made one; of a vector or a scalar, itself."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape


def num_rows(shape: tuple[int, ...]) -> int:
    """Rows of the matrix; a vector has a row per element, a scalar one."""
    return matrix_shape(shape)[0] if shape else 1


def _rows_in_files(parts: tuple[TensorInfo, ...], shape: tuple[int, ...]) -> Rows:
    rows_each = num_rows(shape) // len(parts)
    matrices = [replace(part, shape=(rows_each, *matrix_shape(shape)[1:])) for part in parts]

    def read(first: int, last: int) -> mx.array:
        pieces = []
        while first < last:
            part, start = divmod(first, rows_each)
            stop = min(start + last - first, rows_each)
            pieces.append(read_rows(matrices[part], start, stop))
            first += stop - start
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    return read


def _rows_in_memory(array: mx.array) -> Rows:
    held = [array.reshape(matrix_shape(array.shape))]
    count = num_rows(array.shape)

    def read(first: int, last: int) -> mx.array:
        whole = held.pop() if last >= count else held[0]
        return whole[first:last] if whole.ndim else whole

    return read


def graph_of(array: mx.array) -> str:
    """What an array would be computed from; another text once it was changed in place."""
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return text.getvalue()
