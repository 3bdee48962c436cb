"""Gradient checkpointing of single layers: keep a layer's input, recompute the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

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
        arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]

        def layer_call(trained: Any, arrays: list[mx.array], keys: list[mx.array]) -> Any:
            given = iter(arrays)
            swap = lambda a: next(given) if isinstance(a, mx.array) else a  # noqa: E731
            self.update(trained)
            for layer, key in zip(dropping, keys, strict=True):
                layer.randomness.key = mx.stop_gradient(key)
            return cls.__call__(self, *map(swap, args), **{k: swap(v) for k, v in kwargs.items()})

        keys = [key for layer in dropping if (key := layer.randomness.key) is not None]
        try:
            return mx.checkpoint(layer_call)(trained, arrays, keys)
        finally:
            self.update(trained)
            for layer, key in zip(dropping, keys, strict=True):
                layer.randomness.key = key

    return type(f"Recomputed{cls.__name__}", (cls,), {"__call__": call})
