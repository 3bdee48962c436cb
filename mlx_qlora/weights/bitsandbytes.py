"""Checkpoints that transformers and bitsandbytes quantized: read as they are, and written.

Of a 4-bit weight the file holds its codes under the weight's own name, and beside it ``.absmax``,
``.quant_map``, with double quantization ``.nested_absmax`` and ``.nested_quant_map``, and as JSON in bytes
``.quant_state.bitsandbytes__nf4`` or ``__fp4``. Of an 8-bit one: int8 rows, and the largest magnitude of each
row as ``SCB``. Source: the checkpoints that transformers 5 and bitsandbytes 0.50 write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_qlora.errors import WeightsError, listed
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.nf4_layers import SCALES, with_codes
from mlx_qlora.quantization.schemes import NESTED_BLOCK
from mlx_qlora.weights.codebook import load_tensors
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.rows import graph_of
from mlx_qlora.weights.shards import lazy_tensors, read_checkpoint
from mlx_qlora.weights.source import ModelSource

STATE = ".quant_state.bitsandbytes__"
FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_WORD = 8
"""Weights in a word; a row is whole words, and so is a block."""


@dataclass(frozen=True)
class FourBits:
    """One 4-bit weight of a checkpoint."""

    packed: mx.array
    """uint8, two codes a byte."""
    absmax: mx.array
    """(blocks,) float32, or their uint8 codes."""
    double: tuple[mx.array, mx.array] | None
    """nested_absmax and offset of double quantization."""
    shape: tuple[int, ...]
    block: int
    codes: str
    """nf4 or fp4."""
    dtype: mx.Dtype
    """Of the weight before."""

    def dense(self) -> mx.array:
        """The weight unpacked, as bitsandbytes unpacks it."""
        return nf4.dequantize(self.packed, self._plain_absmax(), self.shape, self.codes).astype(self.dtype)

    def layer(self, module: nn.Module) -> tuple[nn.Module, dict[str, mx.array]] | None:
        """A layer in the place of `module`, with its tensors; None where rows cannot be packed.

        A block that spans rows is stored as several, of a size that divides a row, with the same absmax.
        """
        num_rows, width = self.shape
        group_size = math.gcd(self.block, width)
        mode = f"{self.codes}-dq" if self.double is not None and group_size == self.block else self.codes
        layer = with_codes(module, group_size, mode) if group_size % _WORD == 0 else None
        if layer is None:
            return None
        words = nf4.pack_words(self.packed, num_rows)
        if nf4.is_double(mode):
            codes = self.absmax.reshape(num_rows, -1)
            scales: tuple[mx.array, ...] = (codes, *(self.double or ()))
        else:
            repeated = mx.repeat(self._plain_absmax(), self.block // group_size)
            scales = (repeated[: num_rows * width // group_size].reshape(num_rows, -1),)
        return layer, {"weight": words, **dict(zip(SCALES, scales, strict=False))}

    def _plain_absmax(self) -> mx.array:
        return self.absmax if self.double is None else nf4.dequantize_absmax(self.absmax, *self.double)


@dataclass(frozen=True)
class EightBits:
    """One 8-bit weight of a checkpoint: value = code · row's magnitude / 127."""

    codes: mx.array
    """(out, in) int8."""
    row_absmax: mx.array
    """(out,) float32."""
    dtype: mx.Dtype

    def dense(self) -> mx.array:
        """The weight unpacked."""
        return (self.codes.astype(mx.float32) * (self.row_absmax / 127)[:, None]).astype(self.dtype)

    def layer(self, module: nn.Module) -> tuple[nn.Module, dict[str, mx.array]] | None:
        """The same numbers as MLX's affine 8 bits: one scale for all groups of a row, and codes from 0."""
        num_rows, width = self.codes.shape
        group_size = next((size for size in (128, 64, 32) if width % size == 0), None)
        if group_size is None or not isinstance(module, nn.Linear):
            return None
        scales = mx.broadcast_to((self.row_absmax / 127)[:, None], (num_rows, width // group_size))
        words = (self.codes.view(mx.uint8) ^ 128).view(mx.uint32)
        return module.to_quantized(group_size, 8), {
            "weight": words,
            "scales": scales,
            "biases": -128 * scales,
        }


Quantized = FourBits | EightBits


def is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of a model that bitsandbytes quantized."""
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "bitsandbytes"


def load_bitsandbytes(source: ModelSource) -> nn.Module:
    """The model with bitsandbytes' own codes and scales in layers of ours.

    A weight that the architecture computes others from (splits, stacks), or whose rows are no whole words, is
    unpacked.

    Raises:
        WeightsError: a weight's parts are missing or do not fit each other; all are listed.
        ModelError: the tensors are not those that config.json describes.
    """
    quantized, plain = read_quantized(source)
    dense = {name: weight.dense() for name, weight in quantized.items()}
    origin = {id(array): (quantized[name], graph_of(array)) for name, array in dense.items()}
    model = skeleton(source)
    tensors: Mapping[str, mx.array] = {**plain, **dense}
    if hasattr(model, "sanitize"):
        tensors = model.sanitize(dict(tensors))
    modules, layers, stored = dict(model.named_modules()), list[tuple[str, nn.Module]](), {}
    for name, array in tensors.items():
        path = name.removesuffix(".weight")
        weight, graph = origin.get(id(array), (None, ""))
        is_same = weight is not None and graph == graph_of(array) and path in modules
        made = weight.layer(modules[path]) if weight is not None and is_same else None
        if made is None:
            stored[name] = array
            continue
        layers.append((path, made[0]))
        stored |= {f"{path}.{leaf}": part for leaf, part in made[1].items()}
    model.update_modules(tree_unflatten(layers))
    return load_tensors(model, stored, source)


def read_quantized(source: ModelSource) -> tuple[dict[str, Quantized], dict[str, mx.array]]:
    """The quantized weights of a checkpoint by name, and its other tensors; nothing large is read yet.

    Raises:
        WeightsError: as for `load_bitsandbytes`.
    """
    infos = read_checkpoint(source.folder)
    tensors: dict[str, mx.array] = {}
    for file in sorted({info.file for info in infos.values()}):
        tensors |= lazy_tensors(file)
    default = FLOATS.get(str(source.config.get("torch_dtype") or source.config.get("dtype")), mx.float16)
    quantized: dict[str, Quantized] = {}
    problems = []
    for marker in [name for name in tensors if STATE in name or name.endswith(".SCB")]:
        name = marker.partition(STATE)[0] if STATE in marker else marker.removesuffix("SCB") + "weight"
        try:
            if STATE in marker:
                quantized[name] = _four_bits(tensors, name, marker)
            else:
                quantized[name] = _eight_bits(tensors, name, marker, default)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            problems.append(f"{name}: {what}")
    if problems:
        raise WeightsError(
            f"{len(problems)} weights are not as bitsandbytes stores them:\n{listed(problems)}",
            where=str(source.folder),
        )
    return quantized, tensors


def _four_bits(tensors: dict[str, mx.array], name: str, marker: str) -> FourBits:
    """Take a weight's parts out of `tensors`."""
    state = json.loads(bytes(np.array(tensors.pop(marker))))
    codes = marker.rpartition(STATE)[2]
    if codes not in nf4.CODES or state["quant_type"] != codes:
        raise ValueError(f"codes of the kind {codes!r}; known are {', '.join(nf4.CODES)}")
    shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"a weight of the shape {list(shape)}")
    if block < 32 or block & (block - 1):
        raise ValueError(f"blocks of {block}; they are a power of two")
    packed = tensors.pop(name).reshape(-1).view(mx.uint8)
    parts = {leaf: tensors.pop(f"{name}.{leaf}") for leaf in _PARTS if f"{name}.{leaf}" in tensors}
    count, blocks = math.prod(shape), -(-math.prod(shape) // block)
    _check_size("the weight", packed, -(-count // 2))
    _check_size("absmax", parts["absmax"], blocks)
    if not np.array_equal(np.array(parts["quant_map"]), np.array(nf4.CODES[codes], np.float32)):
        raise ValueError(f"its quant_map is not that of {codes}")
    absmax, double = _scales(parts, state, blocks)
    return FourBits(packed, absmax, double, shape, block, codes, FLOATS[state["dtype"]])


def _scales(
    parts: Mapping[str, mx.array], state: Mapping[str, Any], blocks: int
) -> tuple[mx.array, tuple[mx.array, mx.array] | None]:
    """absmax, and what double quantization needs, if it is as we store it; else absmax in float32."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax.astype(mx.float32), None
    offset, block = mx.array(float(state["nested_offset"])), int(state["nested_blocksize"])
    nested, table = parts["nested_absmax"], parts["nested_quant_map"]
    _check_size("nested_absmax", nested, -(-blocks // block))
    _check_size("nested_quant_map", table, 256)
    if absmax.dtype != mx.uint8:
        raise ValueError(f"absmax of the type {absmax.dtype} with double quantization")
    if block == NESTED_BLOCK and np.array_equal(np.array(table), np.array(nf4.dynamic_map())):
        return absmax, (nested, offset)
    return table[absmax] * nested[mx.arange(blocks) // block] + offset, None


def _eight_bits(tensors: dict[str, mx.array], name: str, marker: str, dtype: mx.Dtype) -> EightBits:
    row_absmax, codes = tensors.pop(marker), tensors.pop(name)
    layout = tensors.pop(name.removesuffix("weight") + "weight_format", None)
    if layout is not None and layout.item() != 0:
        raise ValueError(f"rows in the layout {layout.item()} of a GPU; only plain rows are read")
    if codes.dtype != mx.int8 or codes.ndim != 2:
        raise ValueError(f"{codes.dtype} of {list(codes.shape)}, no int8 matrix")
    _check_size("SCB", row_absmax, codes.shape[0])
    return EightBits(codes, row_absmax.astype(mx.float32), dtype)


def _check_size(what: str, array: mx.array, expected: int) -> None:
    if array.size != expected:
        raise ValueError(f"{what} has {array.size} elements, not {expected}")
