"""A layer's call as a function of arrays, so that it can be run a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.lora.layers import lora_layers

Function = Callable[[list[mx.array]], Any]


@contextmanager
def layer_function(
    layer: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Function, list[mx.array]]]:
    """`call(layer, *args, **kwargs)` as (function, arrays); the layer is as it was when this closes.

    Whatever the gradient or the randomness depends on is among the arrays: trained parameters, array inputs
    and dropout keys. So the function sees the same arrays, and the same masks, each time it is run.
    """
    dropping = [low_rank for low_rank in lora_layers(layer) if low_rank.randomness.key is not None]
    trained: Any = layer.trainable_parameters()
    flat = tree_flatten(trained)
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
    keys = [key for low_rank in dropping if (key := low_rank.randomness.key) is not None]

    def put(values: list[mx.array], masks: list[mx.array]) -> None:
        layer.update(tree_unflatten([(name, v) for (name, _), v in zip(flat, values, strict=True)]))
        for low_rank, key in zip(dropping, masks, strict=True):
            low_rank.randomness.key = key

    def function(arrays: list[mx.array]) -> Any:
        values, rest = arrays[: len(flat)], arrays[len(flat) :]
        inputs = iter(rest[: len(given)])
        swap = lambda a: next(inputs) if isinstance(a, mx.array) else a  # noqa: E731
        put(values, [mx.stop_gradient(key) for key in rest[len(given) :]])
        try:
            return call(layer, *map(swap, args), **{name: swap(a) for name, a in kwargs.items()})
        finally:
            put([a for _, a in flat], keys)

    yield function, [*(a for _, a in flat), *given, *keys]
