"""Where numbers stopped being numbers: the batch, the layer, and what in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.dataset.batches import Batch
from mlx_qlora.objective.loss import Objective, number


def diagnose(objective: Objective, batches: Sequence[Batch]) -> str:
    """One line: which micro-batch of an update gives a loss that is not finite, and where that begins.

    Each is run once more, forwards, without dropout. It is called after an update was skipped, so it may take
    as long as one.
    """
    trained = tree_flatten(objective.model.trainable_parameters())
    bad = [path for path, array in trained if not _is_finite(array)]
    if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        return f"the adapter itself is not finite: {bad[0]}{more}"
    was_training = objective.model.training
    objective.model.eval()
    try:
        for place, batch in enumerate(batches, start=1):
            found = _look(objective, batch)
            if found is not None:
                return f"micro-batch {place} of {len(batches)}{_rows(batch)}: {found}"
    finally:
        objective.model.train(was_training)
    return "the loss is finite, a gradient is not"


def _look(objective: Objective, batch: Batch) -> str | None:
    """What first is not finite in one forward pass; None when the loss is."""
    seen: list[tuple[int, bool, bool]] = []
    with _watched(objective.model.layers, seen), objective.active():
        loss = number(objective.nll(objective.prepared(batch)))
    if math.isfinite(loss):
        return None
    for layer, had_finite_input, has_finite_output in seen:
        if not had_finite_input:
            return "the embedding gives numbers that are not finite" if layer == 0 else _at(layer)
        if not has_finite_output:
            return _at(layer)
    return "all layers are finite; the head's logits, or the loss, are not"


def _at(layer: int) -> str:
    return f"the output of layer {layer} is not finite, its input is"


@contextmanager
def _watched(layers: Sequence[nn.Module], seen: list[tuple[int, bool, bool]]) -> Iterator[None]:
    """Note for each layer that is called whether its input and its output are finite."""
    classes = [type(layer) for layer in layers]
    try:
        for place, (layer, cls) in enumerate(zip(layers, classes, strict=True)):
            layer.__class__ = _watching(cls, place, seen)
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def _watching(cls: type[nn.Module], place: int, seen: list[tuple[int, bool, bool]]) -> type[nn.Module]:
    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        outputs = cls.__call__(self, x, *args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        seen.append((place, _is_finite(x), _is_finite(first)))
        return outputs

    return type(f"Watched{cls.__name__}", (cls,), {"__call__": call})


def _is_finite(array: mx.array) -> bool:
    return bool(mx.isfinite(array).all().item())


def _rows(batch: Batch) -> str:
    numbers = [number for row in batch.examples for number in row]
    shown = ", ".join(str(number) for number in numbers[:6]) + (", …" if len(numbers) > 6 else "")
    return f" (training examples {shown})" if numbers else ""
