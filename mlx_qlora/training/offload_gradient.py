"""Gradients where layers stay in their files: going backwards, each is read and computed again.

Every layer, and the loss, is computed, evaluated and forgotten on its own. What lies between them, and what
MLX traces, are the layers' inputs and the gradients of these.

While a gradient is being traced, MLX keeps whatever is computed from a traced array until the trace is over,
evaluated or not. So the pieces are given copies that nobody traces, and take their own gradients in a thread
of their own: tracing is a matter of the thread that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qlora.training.layer_function import Function, layer_function
from mlx_qlora.weights.offload import Offload, Pass, whole_class

Made = TypeVar("Made")


class PiecewiseGradient:
    """Takes the gradients of a step piece by piece. Use `offloaded_gradients`."""

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._streamed = {id(layer) for layer in offload.streamed}
        self._thread = ThreadPoolExecutor(1, "mlx_qlora-gradient")

    def layer(self, layer: nn.Module, function: Function, arrays: list[mx.array]) -> Any:
        """`function(arrays)`, a call of `layer`; computed a second time for its gradient."""

        @mx.custom_function
        def forward(arrays: list[mx.array]) -> Any:
            own = Untraced.of(arrays)
            with self._in_memory(layer, "forward"):
                outputs = function(own.arrays())
                mx.eval(outputs)
            return outputs

        @forward.vjp
        def backward(primals: list[mx.array], cotangents: Any, _outputs: Any) -> list[mx.array]:
            own, wanted = Untraced.of(primals), Untraced.of(_flat(cotangents))

            def grads() -> list[mx.array]:
                with self._in_memory(layer, "backward"):
                    return _gradients(function, own.arrays(), wanted.arrays())[1]

            return self._apart(grads)

        return forward(arrays)

    def loss(self, head: nn.Module, loss_of: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
        """`loss_of(*arrays)`, a number, its gradient taken at once.

        Args:
            head: Whose trained parameters it depends on.
        """
        with layer_function(head, lambda _head, *given: loss_of(*given), arrays, {}) as (function, given):
            return self._number(function, given)

    def close(self) -> None:
        """End the thread."""
        # MLX aborts the process at its exit when a thread has ended and its streams have not.
        self._thread.submit(mx.clear_streams).result()
        self._thread.shutdown()

    def _number(self, function: Function, arrays: list[mx.array]) -> Any:
        @mx.custom_function
        def forward(arrays: list[mx.array]) -> tuple[mx.array, ...]:
            own = Untraced.of(arrays)
            (value,), grads = self._apart(lambda: _gradients(function, own.arrays(), [mx.array(1.0)]))
            return value, *grads

        @forward.vjp
        def backward(_primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
            return [grad * cotangents[0].astype(grad.dtype) for grad in outputs[1:]]

        made: Any = forward(arrays)
        return made[0]

    def _in_memory(self, layer: nn.Module, within: Pass) -> AbstractContextManager[None]:
        return self._offload.in_memory(layer, within) if id(layer) in self._streamed else nullcontext()

    def _apart(self, task: Callable[[], Made]) -> Made:
        device = mx.default_device()

        def on_device() -> Made:
            with mx.stream(device):
                return task()

        return self._thread.submit(on_device).result()


@contextmanager
def offloaded_gradients(offload: Offload) -> Iterator[PiecewiseGradient]:
    """Let the layers of an offloaded model take their gradients piece by piece while this is open.

    In training mode only. All layers are recomputed in the backward pass, those in memory too. A step cannot
    be compiled: a piece is over when its call returns.
    """
    gradient = PiecewiseGradient(offload)
    layers = [stored.module for stored in offload.plan.layers]
    classes = [type(layer) for layer in layers]
    try:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = _piecewise_class(cls, gradient)
        yield gradient
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls
        gradient.close()


@dataclass(frozen=True)
class Untraced:
    """Copies of arrays, evaluated, that no transformation knows of."""

    plain: list[mx.array]
    """Without bfloat16, which NumPy does not know."""
    dtypes: list[mx.Dtype]

    @classmethod
    def of(cls, arrays: Sequence[mx.array]) -> Untraced:
        """Evaluate the arrays and copy them."""
        plain = [a.view(mx.uint16) if a.dtype == mx.bfloat16 else a for a in arrays]
        mx.eval(plain)
        return cls([mx.array(np.array(a, copy=False)) for a in plain], [a.dtype for a in arrays])

    def arrays(self) -> list[mx.array]:
        """The copies, in their types; for the thread that asks.

        In a backward pass MLX lets nothing forget what it was made of, and a view made in one thread cannot
        be looked through in another.
        """
        pairs = zip(self.plain, self.dtypes, strict=True)
        return [array.view(dtype) if array.dtype != dtype else array for array, dtype in pairs]


def _piecewise_class(cls: Any, gradient: PiecewiseGradient) -> type[nn.Module]:
    whole = whole_class(cls)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return cls.__call__(self, *args, **kwargs)
        with layer_function(self, whole.__call__, args, kwargs) as (function, arrays):
            return gradient.layer(self, function, arrays)

    return type(f"Piecewise{cls.__name__}", (cls,), {"__call__": call})


def _gradients(
    function: Function, arrays: list[mx.array], cotangents: list[mx.array]
) -> tuple[list[mx.array], list[mx.array]]:
    """The outputs, and a gradient for each array (zeros for integers), evaluated."""
    floating = [i for i, a in enumerate(arrays) if mx.issubdtype(a.dtype, mx.floating)]

    def of_floating(*values: mx.array) -> list[mx.array]:
        replaced = dict(zip(floating, values, strict=True))
        return _flat(function([replaced.get(i, a) for i, a in enumerate(arrays)]))

    outputs, grads = mx.vjp(of_floating, [arrays[i] for i in floating], cotangents)
    by_index = dict(zip(floating, grads, strict=True))
    grads = [by_index.get(i, mx.zeros_like(a)) for i, a in enumerate(arrays)]
    mx.eval(outputs, grads)
    return outputs, grads


def _flat(tree: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(tree)] or [tree]
