"""Gradient checkpointing of single layers: keep a layer's input, recompute the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.lora.layers import lora_layers


@contextmanager
def recomputed(layers: list[nn.Module], *, enabled: bool = True) -> Iterator[None]:
    """Checkpoint these layer instances, and only these, while the context is open.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    classes = [type(layer) for layer in layers]
    if enabled:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = _recomputed_class(cls)
    try:
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def _recomputed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` whose call is one checkpoint.

    Whatever the gradient or the randomness depends on enters as an argument of the checkpointed
    function: trained parameters, array inputs and dropout keys. So the recomputation sees the same
    arrays, and the same masks, as the forward pass.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return cls.__call__(self, *args, **kwargs)
        dropping = [layer for layer in lora_layers(self) if layer.randomness.key is not None]
        trained = self.trainable_parameters()
        names = [name for name, _ in tree_flatten(trained)]
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
        keys = [key for layer in dropping if (key := layer.randomness.key) is not None]

        def layer_call(arrays: list[mx.array]) -> Any:
            values, inputs = arrays[: len(names)], iter(arrays[len(names) : len(names) + len(given)])
            swap = lambda a: next(inputs) if isinstance(a, mx.array) else a  # noqa: E731
            self.update(tree_unflatten(list(zip(names, values, strict=True))))
            for layer, key in zip(dropping, arrays[len(names) + len(given) :], strict=True):
                layer.randomness.key = mx.stop_gradient(key)
            return cls.__call__(self, *map(swap, args), **{k: swap(v) for k, v in kwargs.items()})

        try:
            return checkpointed(layer_call, [*(a for _, a in tree_flatten(trained)), *given, *keys])
        finally:
            self.update(trained)
            for layer, key in zip(dropping, keys, strict=True):
                layer.randomness.key = key

    return type(f"Recomputed{cls.__name__}", (cls,), {"__call__": call})


def checkpointed(function: Callable[[list[mx.array]], Any], arrays: list[mx.array]) -> Any:
    """`function(arrays)`, run a second time for its gradient, once that is asked for and not earlier.

    mx.checkpoint lets the second run begin when the first is over. MLX then recomputes layers long before
    their turn, and holds what it should have thrown away.
    """

    @mx.custom_function
    def forward(arrays: list[mx.array]) -> Any:
        return function(arrays)

    @forward.vjp
    def backward(primals: list[mx.array], cotangents: Any, _outputs: Any) -> list[mx.array]:
        wanted = [cotangent for _, cotangent in tree_flatten(cotangents)] or [cotangents]
        again = mx.depends(primals, wanted)
        floating = [i for i, a in enumerate(again) if mx.issubdtype(a.dtype, mx.floating)]

        def of_floating(*values: mx.array) -> list[mx.array]:
            replaced = dict(zip(floating, values, strict=True))
            outputs = function([replaced.get(i, a) for i, a in enumerate(again)])
            return [array for _, array in tree_flatten(outputs)] or [outputs]

        _, grads = mx.vjp(of_floating, [again[i] for i in floating], wanted)
        # Without this the gradients of trained parameters wait until all layers are through, and what they
        # are made of waits with them.
        grads = mx.depends(grads, grads)
        by_index = dict(zip(floating, grads, strict=True))
        return [by_index.get(i, mx.zeros_like(a)) for i, a in enumerate(primals)]

    return forward(arrays)
