"""A model's parameters as they lie in its files, read some rows at a time and forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qlora.errors import MlxQloraError, ModelError, WeightsError, listed
from mlx_qlora.quantization import nf4
from mlx_qlora.weights.bitsandbytes import is_bitsandbytes, load_bitsandbytes
from mlx_qlora.weights.gguf_tensors import Type
from mlx_qlora.weights.plan import _lazy_tensors, _sanitized, skeleton
from mlx_qlora.weights.rows import Provenance, Rows, num_rows
from mlx_qlora.weights.shards import DTYPE_NAMES, read_checkpoint
from mlx_qlora.weights.source import ModelSource

_LEAVES = ("scales", "biases", "absmax", "nested_absmax", "offset")
_FLOAT_TYPES = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}


@dataclass(frozen=True)
class Packing:
    """How a quantized parameter is stored; config.json's words."""

    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True)
class Parameter:
    """One parameter; its rows are read when they are asked for."""

    name: str
    """mlx-lm's."""
    shape: tuple[int, ...]
    """Of the numbers, not of the words they are packed in."""
    dtype: str
    """As safetensors spells it; of a quantized one that of its scales."""
    packing: Packing | None
    num_bytes: int
    """To be read."""
    readers: Mapping[str, Rows]
    """weight, and scales and biases or absmax, each by rows."""
    nested: Mapping[str, mx.array]
    """What double quantization keeps for the whole weight."""

    @property
    def rows(self) -> int:
        """All axes but the last; of a vector its elements."""
        return num_rows(self.shape)

    @property
    def float_type(self) -> Type | None:
        """The GGUF type that keeps an unquantized parameter as it is."""
        return None if self.packing else _FLOAT_TYPES.get(self.dtype)

    @property
    def is_affine(self) -> bool:
        """Whether it is codes, scales and biases."""
        return self.packing is not None and self.packing.mode == "affine"

    @property
    def stored(self) -> str:
        """In words."""
        if self.packing is None:
            return self.dtype
        bits = f" {self.packing.bits}-bit" if self.is_affine else ""
        scales = f", {self.dtype} scales" if self.is_affine else ""
        return f"{self.packing.mode}{bits}, groups of {self.packing.group_size}{scales}"

    def values(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) in float32; of codes, scale · code + bias of the stored numbers."""
        if self.packing is None:
            return _float32(self.readers["weight"](first, last))
        if self.is_affine:
            codes = self.codes(first, last)
            scales, biases = self.scales(first, last)
            grouped = codes.reshape(*scales.shape, -1)
            return (grouped * scales[..., None] + biases[..., None]).reshape(codes.shape)
        weight = self.readers["weight"](first, last)
        if self.packing.mode in nf4.MODES:
            layer = {"weight": mx.zeros((self.rows, 0)), **self.nested}
            absmax = nf4.absmax_of(layer, self.readers["absmax"](first, last), slice(first, last))
            return _float32(nf4.unpack_words(weight, absmax, self.packing.mode, mx.float32))
        stored = self.readers["scales"](first, last)
        size, bits, mode = self.packing.group_size, self.packing.bits, self.packing.mode
        return _float32(mx.dequantize(weight, stored, None, size, bits, mode))

    def codes(self, first: int, last: int) -> np.ndarray:
        """Of an affine (or mxfp4) parameter: uint8 of (rows, width)."""
        if self.packing is None:
            raise TypeError(f"{self.name} has no codes")
        words = np.array(self.readers["weight"](first, last))
        return unpack(words, self.packing.bits)

    def scales(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of an affine parameter: scales and biases, float32 of (rows, groups)."""
        return (
            _float32(self.readers["scales"](first, last)),
            _float32(self.readers["biases"](first, last)),
        )

    def exponents(self, first: int, last: int) -> np.ndarray:
        """Of an mxfp4 parameter: the stored scales, uint8 of (rows, groups)."""
        return np.array(self.readers["scales"](first, last))


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """MLX's words (rows, width · bits / 32) as codes (rows, width): one stream of bits, lowest first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if bits == 4:
        return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    each = np.unpackbits(raw, axis=-1, bitorder="little").reshape(len(raw), -1, bits)
    return np.packbits(each, axis=-1, bitorder="little").reshape(len(raw), -1)


def parameters(source: ModelSource) -> Iterator[Parameter]:
    """Every parameter of the model, in the order of names; what was read of one is dropped with it.

    Raises:
        WeightsError: tensors are missing, left over, or of another shape than the model's.
        ModelError: the model cannot be read.
    """
    if is_bitsandbytes(source.config) or _is_foreign(source.config):
        tensors, packings = _loaded(source)
        provenance = Provenance({}, {})
    else:
        infos = read_checkpoint(source.folder)
        lazy = _lazy_tensors(infos)
        model, provenance = skeleton(source), Provenance(infos, lazy)
        with provenance.watching_stacks():
            tensors = dict(_sanitized(model, lazy, source))
        del lazy
        packings = _packings(tensors, source.config)
        _check(model, tensors, packings, source)
    for name in sorted(name for name in tensors if name.rpartition(".")[2] not in _LEAVES):
        yield _parameter(name, tensors, packings, provenance)


def _parameter(
    name: str, tensors: dict[str, mx.array], packings: Mapping[str, Packing], provenance: Provenance
) -> Parameter:
    path, _, leaf = name.rpartition(".")
    packing = packings.get(path) if leaf == "weight" else None
    names = [f"{path}.{part}" for part in _LEAVES] if packing else []
    parts = {"weight": tensors.pop(name)}
    parts |= {part.rpartition(".")[2]: tensors.pop(part) for part in names if part in tensors}
    nested: dict[str, mx.array] = {
        part: parts.pop(part) for part in ("nested_absmax", "offset") if part in parts
    }
    return Parameter(
        name=name,
        shape=_shape(parts["weight"], packing),
        dtype=DTYPE_NAMES[parts["scales" if "scales" in parts else "weight"].dtype],
        packing=packing,
        num_bytes=sum(part.nbytes for part in parts.values()),
        readers={part: _remembering(provenance.rows_of(array)) for part, array in parts.items()},
        nested=nested,
    )


def _remembering(read: Rows) -> Rows:
    """The rows read last are given again without being read again: what holds an array lets go at its end."""
    kept: dict[tuple[int, int], mx.array] = {}

    def again(first: int, last: int) -> mx.array:
        if (first, last) not in kept:
            kept.clear()
            kept[first, last] = read(first, last)
        return kept[first, last]

    return again


def _shape(weight: mx.array, packing: Packing | None) -> tuple[int, ...]:
    shape = tuple(weight.shape)
    return shape if packing is None else (*shape[:-1], shape[-1] * 32 // packing.bits)


def _float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def _is_foreign(config: Mapping[str, Any]) -> bool:
    """Quantized by another tool: mlx-lm knows what to make of it, or says that it does not."""
    return not config.get("quantization") and bool(config.get("quantization_config"))


def _loaded(source: ModelSource) -> tuple[dict[str, mx.array], dict[str, Packing]]:
    """Through the loader that knows the format: tensors not read yet, and the quantized layers."""
    try:
        if is_bitsandbytes(source.config):
            model = load_bitsandbytes(source)
        else:
            from mlx_lm.utils import load_model

            model, _ = load_model(source.folder, lazy=True)
    except MlxQloraError:
        raise
    except Exception as error:  # whatever mlx-lm makes of a format it does not expect
        raise ModelError(
            f"mlx-lm cannot load the model: {type(error).__name__}: {error}", where=str(source.folder)
        ) from error
    packings = {
        path: Packing(module.group_size, module.bits, getattr(module, "mode", "affine"))
        for path, module in model.named_modules()
        if hasattr(module, "group_size") and hasattr(module, "bits")
    }
    return dict(tree_flatten(model.parameters())), packings


def _packings(tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, Packing]:
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping):
        return {}
    packings = {}
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf in ("scales", "absmax"):
            own = quantization.get(path)
            said = own if isinstance(own, Mapping) else quantization
            mode = str(said.get("mode", "affine"))
            packings[path] = Packing(int(said["group_size"]), int(said.get("bits", 4)), mode)
    return packings


def _check(
    model: nn.Module,
    tensors: Mapping[str, mx.array],
    packings: Mapping[str, Packing],
    source: ModelSource,
) -> None:
    expected: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        packing = packings.get(path)
        if packing is not None and leaf in _LEAVES:
            problem = _group_problem(leaf, array, expected.get(f"{path}.weight"), packing)
        elif name not in expected:
            problem = "the architecture has no such tensor"
        else:
            shape = _shape(array, packing if leaf == "weight" else None)
            wanted = tuple(expected[name].shape)
            problem = "" if shape == wanted else f"{list(shape)}, but config.json makes it {list(wanted)}"
            is_packed = packing is not None and leaf == "weight"
            if not problem and not is_packed and DTYPE_NAMES[array.dtype] not in _FLOAT_TYPES:
                problem = f"of type {DTYPE_NAMES[array.dtype]}"
        problems += [f"{name}: {problem}"] if problem else []
    if problems:
        raise WeightsError(
            f"The weights do not fit config.json ({len(problems)} tensors):\n{listed(problems)}",
            where=str(source.folder),
        )


def _group_problem(leaf: str, array: mx.array, weight: mx.array | None, packing: Packing) -> str:
    if weight is None:
        return "there is no such layer"
    groups = (*weight.shape[:-1], weight.shape[-1] // packing.group_size)
    if leaf in ("scales", "biases", "absmax") and math.prod(array.shape) != math.prod(groups):
        return f"{list(array.shape)}, but config.json makes it {list(groups)}"
    return ""
