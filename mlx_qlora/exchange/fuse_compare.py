"""Three models in one pass: a base, the base with its adapter, and the fused one, as thirds of a batch.

They share every layer that is as it was; in the others each third has a weight of its own. Arrays of a block
are read when it is called and forgotten when it has answered, so a pass takes the memory of one block, of
embedding and head, and of the hidden states; never that of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_qlora.exchange.fuse_base import base_layer
from mlx_qlora.exchange.fuse_weights import (
    Target,
    WeightLoss,
    fused_parts,
    restored_rows,
    row_blocks,
    scales_of,
    weight_loss,
)
from mlx_qlora.exchange.requantize import Parts, restored

OnLoss = Callable[[str, WeightLoss], None]
"""Told the path of a layer and what its format loses."""


class NotComparableError(Exception):
    """This architecture's blocks are not called as others' are; its logits cannot be measured so."""


def compare_in_thirds(model: nn.Module, targets: Mapping[str, Target], on_loss: OnLoss) -> None:
    """Let the layers in `targets` treat the thirds of a batch apart; stacked ones stay as they are."""
    modules = dict(model.named_modules())
    compared = {path: _compared(modules[path], path, target, on_loss) for path, target in targets.items()}
    model.update_modules(tree_unflatten([(p, m) for p, m in compared.items() if m is not None]))


class _Fused:
    """The tensors of a fused layer while they are in use, outside of the module's arrays."""

    def __init__(self, path: str, target: Target, on_loss: OnLoss) -> None:
        self.target = target
        self._path, self._on_loss = path, on_loss
        self._parts: Parts | None = None

    def parts(self, layer: nn.Module) -> Parts:
        """What is stored of the fused layer, made when it is first asked for; its loss is told then."""
        if self._parts is None:
            self._parts = fused_parts(layer, self.target)
            self._on_loss(self._path, weight_loss(layer, self.target, self._parts))
        return self._parts

    def forget(self) -> None:
        """Drop what was made."""
        self._parts = None


class _Compared(nn.Module):
    """A layer in three thirds of its batch: base, adapted, fused."""

    def __init__(self, adapted: nn.Module, fused: _Fused) -> None:
        super().__init__()
        self.adapted = adapted
        self.fused = fused

    def __call__(self, x: mx.array) -> mx.array:
        base, (x0, x1, x2) = base_layer(self.adapted), _thirds(x)
        y2 = self._product(x2, base)
        return mx.concatenate([base(x0), self.adapted(x1), y2 + base["bias"] if "bias" in base else y2])

    def _product(self, x: mx.array, base: nn.Module) -> mx.array:
        parts, scheme = self.fused.parts(base), self.fused.target.scheme
        blocks = []
        for first, last in row_blocks(base):
            blocks.append(x @ restored_rows(parts, scheme, first, last).T)
            mx.eval(blocks[-1])
        return mx.concatenate(blocks, axis=-1)


class _ComparedEmbedding(_Compared):
    """The same of an embedding, which may be the output head too."""

    def __call__(self, x: mx.array) -> mx.array:
        base, (tokens0, tokens1, tokens2) = base_layer(self.adapted), _thirds(x)
        parts, scheme = self.fused.parts(base), self.fused.target.scheme
        rows = tokens2.reshape(-1)
        weight = parts["weight"][rows]
        if scheme is not None:
            weight = restored(scales_of(parts, scheme, rows) | {"weight": weight}, scheme)
        weight = weight.astype(mx.float32).reshape(*tokens2.shape, -1)
        return mx.concatenate([base(tokens0), self.adapted(tokens1), weight])

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of an embedding that is the head too, the thirds of x each by its own model."""
        base, (x0, x1, x2) = base_layer(self.adapted), _thirds(x)
        return mx.concatenate([base.as_linear(x0), self.adapted.as_linear(x1), self._product(x2, base)])


def _compared(module: nn.Module, path: str, target: Target, on_loss: OnLoss) -> nn.Module | None:
    layer = base_layer(module)
    if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        return _ComparedEmbedding(module, _Fused(path, target, on_loss))
    if isinstance(layer, nn.Linear | nn.QuantizedLinear):
        return _Compared(module, _Fused(path, target, on_loss))
    return None


def _thirds(x: mx.array) -> list[mx.array]:
    if x.shape[0] % 3:
        raise NotComparableError("it reshapes the rows of a batch")
    size = x.shape[0] // 3
    return [x[:size], x[size : 2 * size], x[2 * size :]]


Call = Callable[..., Any]


@contextmanager
def blocks_as(
    model: nn.Module, behaviour: Callable[[type[nn.Module], bool, dict[str, mx.array]], Call]
) -> Iterator[dict[str, mx.array]]:
    """Let the model's blocks be called in another way; what they leave behind is in the table given.

    Args:
        behaviour: (class of a block, whether it is the last, the table) → its ``__call__``.
    """
    blocks: list[nn.Module] = list(model.layers)
    if not blocks or len({id(block) for block in blocks}) < len(blocks):
        raise NotComparableError("its blocks are not a list of different ones")
    classes, seen = [type(block) for block in blocks], dict[str, mx.array]()
    for block, cls in zip(blocks, classes, strict=True):
        call = behaviour(cls, block is blocks[-1], seen)
        block.__class__ = type(cls.__name__, (cls,), {"__call__": call})
    try:
        yield seen
    finally:
        for block, cls in zip(blocks, classes, strict=True):
            block.__class__ = cls


def forgetting(cls: type[nn.Module], is_last: bool, seen: dict[str, mx.array]) -> Call:
    """Run the block, then forget its arrays."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "hidden" in seen or self.training:
            raise NotComparableError("a block is called twice, or behind the last one")
        output = cls.__call__(self, *args, **kwargs)
        if not isinstance(output, mx.array):
            raise NotComparableError("its blocks give more than hidden states")
        mx.eval(output)
        self.train()  # marks it as used: its arrays are gone
        forget(self)
        if is_last:
            seen["hidden"] = output
        return output

    return call


def giving(hidden: mx.array) -> Call:
    """A block that gives hidden states known before."""

    def call(_self: nn.Module, *_args: Any, **_kwargs: Any) -> mx.array:
        return hidden

    return call


def forget(module: nn.Module) -> None:
    """Drop all arrays inside of a module, and give their memory back."""
    for _, inner in module.named_modules():
        if isinstance(inner, _Compared):
            inner.fused.forget()
    module.update(tree_map(lambda _: mx.zeros((0,)), module.parameters()))
    mx.clear_cache()


def in_float32(model: nn.Module) -> None:
    """Activations, scales and unquantized weights; nothing is read by it."""

    def cast(array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map(cast, model.parameters()))
