"""Which layers of a base model stay in their files, so that the others fit the memory there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.errors import MemoryBudgetError, ModelError, listed
from mlx_qlora.memory.monitor import GIB, device_limit_bytes, footprint_bytes
from mlx_qlora.weights.shards import DTYPES, TensorInfo, lazy_tensors, read_checkpoint

MIB = 1024**2

WEIGHTS_SHARE = 0.6
"""The rest is for activations, the cache of keys and values, adapters and the optimizer."""


class StoredTensor(NamedTuple):
    """One parameter of a layer, and where its bytes are."""

    module: nn.Module
    """What holds it; low-rank layers may be put around it."""
    key: str
    info: TensorInfo
    dtype: mx.Dtype
    """The type it is computed in."""
    placeholder: mx.array
    """Stands in between two calls: the right shape and type, and the right values for whoever reads them."""


@dataclass(frozen=True)
class StoredLayer:
    """One decoder layer, as it is in its files."""

    module: nn.Module
    tensors: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """In memory, in the types it is computed in."""
        return sum(tensor.placeholder.nbytes for tensor in self.tensors)

    @property
    def reading_bytes(self) -> int:
        """The most it takes while it is read and cast."""
        stored = sum(tensor.info.num_bytes for tensor in self.tensors)
        cast = [t.info.num_bytes for t in self.tensors if DTYPES[t.info.dtype] != t.dtype]
        return max(self.num_bytes, stored) + max(cast, default=0)


@dataclass(frozen=True)
class OffloadPlan:
    """Which layers stay in their files."""

    layers: tuple[StoredLayer, ...]
    """All of them."""
    streamed: tuple[int, ...]
    """Those that are read each time, by their place; none when everything fits."""
    num_in_flight: int
    """Streamed layers in memory at once: 2 where the next is read during a call, else 1."""
    outside_bytes: int
    """Embeddings, final norm, head: always in memory."""
    budget_bytes: int

    @property
    def resident_bytes(self) -> int:
        """What stays in memory."""
        stay = set(range(len(self.layers))) - set(self.streamed)
        return self.outside_bytes + sum(self.layers[index].num_bytes for index in stay)

    @property
    def streamed_bytes(self) -> int:
        """What is read from the files in one pass over the model."""
        return sum(t.info.num_bytes for index in self.streamed for t in self.layers[index].tensors)

    @property
    def peak_bytes(self) -> int:
        """The most the weights take at once."""
        return self.resident_bytes + _in_flight_bytes(self.layers, self.streamed, self.num_in_flight)

    @property
    def smallest_budget_bytes(self) -> int:
        """With every layer in its file."""
        return self.outside_bytes + _in_flight_bytes(self.layers, range(len(self.layers)), 1)

    @property
    def note(self) -> str:
        """What a person should know."""
        if not self.streamed:
            return f"offload: all {len(self.layers)} layers fit in memory; none is left in its file"
        return (
            f"offload: {len(self.streamed)} of {len(self.layers)} layers stay in their files; "
            f"a pass over the model reads {_mib(self.streamed_bytes)}, "
            f"and the weights take {_mib(self.peak_bytes)} of memory"
        )


def weights_budget_bytes(budget_gib: float | None) -> int:
    """What weights may take: as given, else 60 % of what this process could still get."""
    if budget_gib is not None:
        return round(budget_gib * GIB)
    return max(0, round(WEIGHTS_SHARE * (device_limit_bytes() - footprint_bytes())))


def plan_offload(model: nn.Module, folder: Path, budget_bytes: int) -> OffloadPlan:
    """Choose the layers that stay in their files, so that the weights take at most `budget_bytes`.

    Args:
        model: As loaded from `folder` and cast, evaluated or not, without low-rank layers.
        budget_bytes: For weights alone; activations, caches and adapters come on top.

    Raises:
        MemoryBudgetError: not even one layer at a time fits; the smallest budget is named.
        ModelError: the layers are not stored in the form they are computed in.
        WeightsError: the files are broken.
    """
    layers = _stored_layers(model, folder)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    outside = total - sum(layer.num_bytes for layer in layers)
    everything = OffloadPlan(layers, (), 2, outside, budget_bytes)
    if everything.peak_bytes <= budget_bytes:
        return everything
    for num_in_flight in (2, 1):
        for num_streamed in range(1, len(layers) + 1):
            streamed = _spread(num_streamed, len(layers))
            plan = OffloadPlan(layers, streamed, num_in_flight, outside, budget_bytes)
            if plan.peak_bytes <= budget_bytes:
                return plan
    smallest = everything.smallest_budget_bytes
    key = f"model.offload_budget_gib={math.ceil(smallest / GIB * 1000) / 1000:g}"
    raise MemoryBudgetError(
        f"The weights may take {budget_bytes / MIB:,.1f} MiB. Embeddings, head and one layer at a time "
        f"take {_mib(smallest)}.",
        where=str(folder),
        run=f"mlx-qlora train … --set {key}   # or a scheme of fewer bits",
    )


def _stored_layers(model: nn.Module, folder: Path) -> tuple[StoredLayer, ...]:
    infos, placeholders = _stored_as_used(model, folder)
    paths = {id(module): path for path, module in model.named_modules()}
    layers, problems = [], list[str]()
    for layer in model.layers:
        tensors = []
        for inner, module in layer.named_modules():
            at = ".".join(filter(None, [paths[id(layer)], inner]))
            for key, array in module.items():
                if not isinstance(array, mx.array) or key.startswith("_"):
                    continue  # such as a rotary embedding's frequencies: computed, not stored
                path = f"{at}.{key}"
                info = infos.get(path)
                if info is None or info.shape != array.shape:
                    problems.append(path)
                    continue
                lazy = placeholders[path].astype(array.dtype)
                tensors.append(StoredTensor(module, key, info, array.dtype, lazy))
        layers.append(StoredLayer(layer, tuple(tensors)))
    if problems or not layers:
        raise ModelError(
            f"{len(problems)} tensor(s) are not stored in the form they are computed in, so layers cannot be "
            f"read one by one:\n{listed(problems, limit=5)}",
            where=str(folder),
            run=f"mlx-qlora quantize {folder} --output FOLDER   # then use FOLDER with --offload",
        )
    return tuple(layers)


def _stored_as_used(
    model: nn.Module, folder: Path
) -> tuple[Mapping[str, TensorInfo], Mapping[str, mx.array]]:
    """By path in the model: where a tensor is, and the tensor, not read yet. Renamed ones are found too.

    mlx-lm's architectures rename, split and stack tensors in `sanitize`. A tensor that comes out as the same
    object went through unchanged.
    """
    infos = read_checkpoint(folder)
    stored: dict[str, mx.array] = {}
    for file in sorted({info.file for info in infos.values()}):
        stored |= lazy_tensors(file)
    names = {id(array): name for name, array in stored.items()}
    used = model.sanitize(dict(stored)) if hasattr(model, "sanitize") else stored
    unchanged = {path: array for path, array in used.items() if id(array) in names}
    return {path: infos[names[id(array)]] for path, array in unchanged.items()}, unchanged


def _in_flight_bytes(layers: Sequence[StoredLayer], streamed: Sequence[int], num_in_flight: int) -> int:
    """What streamed layers take at most: one or two of the largest."""
    return num_in_flight * max((layers[index].reading_bytes for index in streamed), default=0)


def _spread(num_streamed: int, num_layers: int) -> tuple[int, ...]:
    """So many places among the layers, evenly: the calls between two of them give time to read."""
    return tuple(n * num_layers // num_streamed for n in range(num_streamed))


def _mib(num_bytes: int) -> str:
    """Rounded up: what is named as the smallest budget must be one."""
    tenths = math.ceil(num_bytes * 10 / MIB)
    return f"{tenths / 10:,.1f} MiB" if tenths < 1000 else f"{math.ceil(tenths / 10):,} MiB"
