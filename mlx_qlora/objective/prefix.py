"""The layers below the first trained one: what they give never changes, so it is computed once and put back.

No architecture is rewritten. While a context is open, layers are called in another way: a frozen one hands
its input on, and the last of them answers with the hidden states it is given. Embeddings, masks and
positions stay the model's own work.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.dataset.batches import Batch

TRIED_TOKENS = [[1, 2, 3, 5, 4, 3, 2]]


@dataclass(frozen=True)
class NoPrefix:
    """Why nothing can be computed once."""

    reason: str


@dataclass(frozen=True)
class FrozenPrefix:
    """The first layers of a model, none of which is trained."""

    model: nn.Module
    num_layers: int
    """Frozen layers below the first trained one; at least 1."""

    def hidden(self, tokens_BT: mx.array) -> mx.array:
        """What the last frozen layer gives, (B, T, D); no layer above it is run.

        Raises:
            TypeError: that layer gives something else than one array.
        """
        layers, kept = self.model.layers, _Passing()
        last = layers[self.num_layers - 1]
        above = [(layer, _skipped) for layer in layers[self.num_layers :]]
        with _called_as([(last, _kept), *above], kept):
            self.model(tokens_BT)
        if not isinstance(kept.hidden_BTD, mx.array) or kept.hidden_BTD.shape[:2] != tokens_BT.shape:
            raise TypeError("the layer gives no hidden states of its own")
        return kept.hidden_BTD

    @contextmanager
    def given(self, hidden_BTD: mx.array) -> Iterator[None]:
        """While this is open the frozen layers do not run: `hidden_BTD` is what comes out of them.

        Open it around the model's forward pass; gradients and recomputation of the layers above need it no
        more.
        """
        *below, last = self.model.layers[: self.num_layers]
        with _called_as([*((layer, _skipped) for layer in below), (last, _given)], _Passing(hidden_BTD)):
            yield


@dataclass(frozen=True)
class StoredPrefix:
    """A prefix whose hidden states are kept somewhere."""

    layers: FrozenPrefix
    dtype: mx.Dtype
    """Of the hidden states when they are computed."""
    gathered: Callable[[Batch], mx.array]
    """Of a batch that says which examples it holds, (B, T, D), in the type they are kept in."""

    @contextmanager
    def given(self, hidden_BTD: mx.array) -> Iterator[None]:
        """`FrozenPrefix.given`, in the type the layers above expect."""
        with self.layers.given(hidden_BTD.astype(self.dtype)):
            yield


def frozen_prefix(model: nn.Module) -> FrozenPrefix | NoPrefix:
    """The part of `model` that a cache can stand in for, its low-rank layers attached already.

    Whether an architecture takes it is not looked up but tried on a few tokens: the logits with the hidden
    states put back must be the model's own. Whatever reaches past the layers' first argument (a skip
    connection, keys shared between layers) shows there.
    """
    layers = list(getattr(model, "layers", ()))
    trained = [bool(tree_flatten(layer.trainable_parameters())) for layer in layers]
    num_frozen = trained.index(True) if True in trained else len(layers)
    if num_frozen == 0:
        return NoPrefix("the first layer is trained: there is nothing to cache (see lora.num_layers)")
    if _trains_elsewhere(model, layers):
        return NoPrefix("weights outside of the layers are trained: nothing is cached")
    prefix = FrozenPrefix(model, num_frozen)
    was_training = model.training
    model.eval()
    try:
        if _gives_the_same(prefix):
            return prefix
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        pass  # an architecture whose layers are called in another way
    finally:
        model.train(was_training)
    return NoPrefix("this architecture's layers cannot be cut apart: nothing is cached")


def _gives_the_same(prefix: FrozenPrefix) -> bool:
    tokens, model = mx.array(TRIED_TOKENS), prefix.model
    wanted, hidden = model(tokens), prefix.hidden(tokens)
    with prefix.given(hidden):
        given = model(tokens)
    model.train()  # a frozen layer with a dropout of its own must be run each time
    return _agree(given, wanted) and _agree(prefix.hidden(tokens), hidden)


def _agree(one: mx.array, other: mx.array) -> bool:
    difference = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max()
    size = mx.abs(other.astype(mx.float32)).max()
    # The same operations on the same numbers: anything left out changes far more than this.
    return bool((difference <= 1e-3 * size).item())


def _trains_elsewhere(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Whether something is trained that is neither in a layer nor behind all of them."""
    head = getattr(model, "lm_head", None)
    known = [*layers, head] if isinstance(head, nn.Module) else list(layers)
    num_known = sum(len(tree_flatten(part.trainable_parameters())) for part in known)
    return num_known != len(tree_flatten(model.trainable_parameters()))


@dataclass
class _Passing:
    """Hidden states on their way in or out. Outside of the module's arrays: no parameter, no state."""

    hidden_BTD: Any = None


_Call = Callable[..., Any]


@contextmanager
def _called_as(swaps: Iterable[tuple[nn.Module, _Call]], passing: _Passing) -> Iterator[None]:
    """Let each layer's call be another function while this is open."""
    swaps = list(swaps)
    classes = [type(layer) for layer, _ in swaps]
    try:
        for (layer, call), cls in zip(swaps, classes, strict=True):
            layer.__class__ = _calling(cls, call)  # type: ignore[arg-type]  # a class is hashable
            layer.passing = passing
        yield
    finally:
        for (layer, _), cls in zip(swaps, classes, strict=True):
            layer.__class__ = cls
            vars(layer).pop("passing", None)


@cache
def _calling(cls: type[nn.Module], call: _Call) -> type[nn.Module]:
    """A subclass of `cls` with this call; one for each pair, since a step asks for it."""
    return type(f"{call.__name__.strip('_').title()}{cls.__name__}", (cls,), {"__call__": call})


def _skipped(_layer: nn.Module, x: Any, *_args: Any, **_kwargs: Any) -> Any:
    return x


def _given(layer: Any, *_args: Any, **_kwargs: Any) -> Any:
    return layer.passing.hidden_BTD


def _kept(layer: Any, *args: Any, **kwargs: Any) -> Any:
    layer.passing.hidden_BTD = super(type(layer), layer).__call__(*args, **kwargs)
    return layer.passing.hidden_BTD
