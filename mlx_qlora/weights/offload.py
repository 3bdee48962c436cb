"""A base model larger than memory: some layers stay in their files, and are read each time they are called.

As many layers as the budget holds stay in memory, spread evenly. Each of the others is read when its turn
comes, called, evaluated and forgotten, while a thread reads the next one. Nothing else of the model changes,
so its numbers are those of the resident model, bit for bit.

Where the system has memory to spare it keeps the pages of the files, and gives them up when it has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qlora.errors import WeightsError
from mlx_qlora.weights.offload_plan import OffloadPlan, StoredTensor
from mlx_qlora.weights.shards import DTYPES, TensorInfo

Pass = Literal["inference", "forward", "backward"]
"""Inference goes through the layers again and again; a training step goes there and back."""


@dataclass(frozen=True)
class _Ahead:
    """The streamed layer that should come next."""

    place: int
    arrays: list[mx.array]
    """Its weights, kept from the call before, or what they are being read into."""
    reading: Future[None] | None = None


class Offload:
    """The layers of one model that are read when they are called. Use `offloaded` or `start_offload`."""

    def __init__(self, plan: OffloadPlan) -> None:
        self.plan = plan
        self._place = {id(plan.layers[index].module): n for n, index in enumerate(plan.streamed)}
        self._files = _OpenFiles({tensor.info.file for tensor in self.streamed_tensors})
        self._thread = ThreadPoolExecutor(1, "mlx_qlora-offload")
        self._ahead: _Ahead | None = None

    @property
    def streamed(self) -> list[nn.Module]:
        """The layers that are read each time, in the order of a forward pass."""
        return [self.plan.layers[index].module for index in self.plan.streamed]

    @property
    def streamed_tensors(self) -> list[StoredTensor]:
        """Their parameters."""
        return [tensor for index in self.plan.streamed for tensor in self.plan.layers[index].tensors]

    @property
    def resident(self) -> list[nn.Module]:
        """The layers that stay in memory."""
        stay = sorted(set(range(len(self.plan.layers))) - set(self.plan.streamed))
        return [self.plan.layers[index].module for index in stay]

    @contextmanager
    def in_memory(self, layer: nn.Module, within: Pass = "inference") -> Iterator[None]:
        """While this is open a streamed layer has its weights.

        Evaluate what was computed before it closes: an array that still needs the weights keeps them.

        Args:
            within: Tells which layer comes next, to read it already.

        Raises:
            WeightsError: the file was changed since it was opened, or cannot be read.
        """
        place = self._place[id(layer)]
        tensors = self._tensors(place)
        weights = self._taken(place)
        self._read_ahead(place, weights, within)
        for tensor, array in zip(tensors, weights, strict=True):
            tensor.module[tensor.key] = array
        del weights, array
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.module[tensor.key] = tensor.placeholder

    def close(self) -> None:
        """Stop reading: the model is whole again, and whoever evaluates its parameters loads them all."""
        for layer in self.streamed:
            layer.__class__ = whole_class(type(layer))
        self._forget_ahead()
        self._thread.shutdown()
        self._files.close()

    def _tensors(self, place: int) -> tuple[StoredTensor, ...]:
        return self.plan.layers[self.plan.streamed[place]].tensors

    def _taken(self, place: int) -> list[mx.array]:
        """The weights of one layer: kept, read ahead, or read now."""
        if self._ahead is None or self._ahead.place != place:
            self._forget_ahead()
            arrays = _allocated(self._tensors(place))
            self._files.read(self._tensors(place), _buffers(arrays))
            return _cast(arrays, self._tensors(place))
        ahead, self._ahead = self._ahead, None
        if ahead.reading is None:
            return ahead.arrays
        ahead.reading.result()
        return _cast(ahead.arrays, self._tensors(place))

    def _read_ahead(self, place: int, weights: list[mx.array], within: Pass) -> None:
        if self.plan.num_in_flight < 2:
            return
        following, last = place + (-1 if within == "backward" else 1), len(self._place) - 1
        if not 0 <= following <= last:
            # After a forward pass the last layer is the first to go back, and the other way round.
            following = 0 if within == "inference" else place
        if following == place:
            self._ahead = _Ahead(place, weights)
            return
        tensors = self._tensors(following)
        arrays = _allocated(tensors)
        # The thread sees bytes only: it must not come to use MLX, which gives each thread streams of its own.
        reading = self._thread.submit(self._files.read, tensors, _buffers(arrays))
        self._ahead = _Ahead(following, arrays, reading)

    def _forget_ahead(self) -> None:
        if self._ahead is not None and self._ahead.reading is not None:
            self._ahead.reading.cancel()
            wait([self._ahead.reading])  # two readings at once would be one layer too many
        self._ahead = None


def start_offload(model: nn.Module, plan: OffloadPlan) -> Offload:
    """Run `model` as planned from now on: call it, generate with it, evaluate it.

    What stays in memory is loaded here. For gradients see `mlx_qlora.training.offload_gradient`. Whoever
    evaluates the parameters of a layer that stays in its file loads them, and they stay.

    Raises:
        WeightsError: a file cannot be opened.
    """
    offload = Offload(plan)
    for tensor in offload.streamed_tensors:
        tensor.module[tensor.key] = tensor.placeholder
    kept = {id(tensor.placeholder) for tensor in offload.streamed_tensors}
    mx.eval([array for _, array in tree_flatten(model.parameters()) if id(array) not in kept])
    for layer in offload.streamed:
        layer.__class__ = _streamed_class(type(layer), offload)
    return offload


@contextmanager
def offloaded(model: nn.Module, plan: OffloadPlan) -> Iterator[Offload]:
    """`start_offload` for as long as this is open."""
    offload = start_offload(model, plan)
    try:
        yield offload
    finally:
        offload.close()


def whole_class(cls: Any) -> Any:
    """The class of a layer that knows nothing of files."""
    return getattr(cls, "whole_class", cls)


def _streamed_class(cls: type[nn.Module], offload: Offload) -> type[nn.Module]:
    """A subclass of `cls` whose call reads the weights, and is over when it returns."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with offload.in_memory(self):
            outputs = cls.__call__(self, *args, **kwargs)
            mx.eval(outputs)
            return outputs

    return type(f"Streamed{cls.__name__}", (cls,), {"__call__": call, "whole_class": cls})


class _OpenFiles:
    """Weight files that must stay as they are. One that is removed, or replaced, can still be read."""

    def __init__(self, paths: set[Path]) -> None:
        self._descriptors: dict[Path, int] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        try:
            for path in sorted(paths):
                self._descriptors[path] = os.open(path, os.O_RDONLY)
                self._states[path] = _state(self._descriptors[path])
        except OSError as error:
            self.close()
            raise WeightsError(f"Cannot read the weights: {error.strerror}.", where=str(path)) from None

    def read(self, tensors: Sequence[StoredTensor], buffers: Sequence[memoryview]) -> None:
        """Read the bytes of each tensor into a buffer of that size.

        Raises:
            WeightsError: a file is not what it was, or ends too early.
        """
        for (_, _, info, _, _), buffer in zip(tensors, buffers, strict=True):
            try:
                self._read(info, buffer)
            except OSError as error:
                where = str(info.file)
                raise WeightsError(f"Cannot read {info.name}: {error.strerror}.", where=where) from None
        for path in sorted({tensor.info.file for tensor in tensors}):
            if _state(self._descriptors[path]) != self._states[path]:
                raise _changed(path)

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read(self, info: TensorInfo, into: memoryview) -> None:
        done = 0
        while done < info.num_bytes:
            count = os.preadv(self._descriptors[info.file], [into[done:]], info.start + done)
            if count == 0:
                raise _changed(info.file)
            done += count


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> WeightsError:
    return WeightsError(
        "The weight file was changed while the model was running from it; what was computed since is lost.",
        where=str(path),
        run="fetch or quantize the model again; then: mlx-qlora train --resume --adapter-path …",
    )


def _allocated(tensors: Sequence[StoredTensor]) -> list[mx.array]:
    """Memory of MLX's for the bytes of each tensor."""
    arrays = [mx.zeros((tensor.info.num_bytes,), mx.uint8) for tensor in tensors]
    mx.eval(arrays)
    return arrays


def _buffers(arrays: Sequence[mx.array]) -> list[memoryview]:
    """Views of MLX's own memory, to write to: nothing is copied twice."""
    return [np.array(array, copy=False).data for array in arrays]


def _cast(arrays: list[mx.array], tensors: Sequence[StoredTensor]) -> list[mx.array]:
    """Give each array its type, one after the other; `arrays` is emptied, so that nothing is there twice."""
    arrays.reverse()
    made = []
    for tensor in tensors:
        stored = arrays.pop()
        array = stored.view(DTYPES[tensor.info.dtype]).reshape(tensor.info.shape).astype(tensor.dtype)
        del stored
        mx.eval(array)
        made.append(array)
    return made
