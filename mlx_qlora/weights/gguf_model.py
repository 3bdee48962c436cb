"""Which GGUF tensor, or which rows of it, each parameter of mlx-lm's model is, and how it will be stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import gguf
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qlora.errors import ModelError, listed
from mlx_qlora.weights.gguf_file import GgufFile, GgufTensor
from mlx_qlora.weights.gguf_rope import ROPE_TENSORS
from mlx_qlora.weights.gguf_tensors import AFFINE, FLOATS, GROUP_SIZE, Type, can_dequantize
from mlx_qlora.weights.plan import Output

REQUANTIZED_BITS = 8
_EXPERTS = {
    "gate_proj": "blk.{}.ffn_gate_exps",
    "up_proj": "blk.{}.ffn_up_exps",
    "down_proj": "blk.{}.ffn_down_exps",
}
_EACH_EXPERT = {
    "gate_proj": "blk.{}.ffn_gate.{}",
    "up_proj": "blk.{}.ffn_up.{}",
    "down_proj": "blk.{}.ffn_down.{}",
}
"""Before experts were stacked, each was a tensor of its own."""

_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class Rows:
    """Rows [first, last) of a GGUF tensor."""

    tensor: GgufTensor
    first: int
    last: int


@dataclass(frozen=True)
class Target:
    """One parameter of the model and where its rows come from, one part after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    bits: int | None
    """Of the affine form it is stored in, group size 32; None for a float that is kept."""
    dtype: str
    """Of the scales, or of the kept float."""
    num_heads: int | None = None
    """Heads whose rows llama.cpp interleaves for its rotary embedding."""
    added: float = 0.0
    """Put to every number: llama.cpp keeps 1 + w for Gemma's norms."""

    @property
    def type(self) -> Type:
        """Its format in the GGUF file."""
        return self.parts[0].tensor.type

    @property
    def is_exact(self) -> bool:
        """Whether every number stays what it was."""
        return self.bits is None or self.type in AFFINE

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum((part.last - part.first) * part.tensor.row_bytes for part in self.parts)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors it becomes: itself, or weight, scales and biases."""
        if self.bits is None:
            return (Output(self.name, self.dtype, self.shape),)
        *rows, width = self.shape
        base = self.name.removesuffix("weight")
        groups = (*rows, width // GROUP_SIZE)
        return (
            Output(self.name, "U32", (*rows, width * self.bits // 32)),
            Output(f"{base}scales", self.dtype, groups),
            Output(f"{base}biases", self.dtype, groups),
        )

    def with_wide_scales(self) -> Target:
        """The same with float32 scales, for numbers beyond float16's."""
        return replace(self, dtype="F32")


def map_tensors(file: GgufFile, model: nn.Module, config: dict[str, Any]) -> list[Target]:
    """Every parameter's target.

    Raises:
        ModelError: tensors are missing, left over, of another shape, or of a format that cannot be read.
    """
    names = _Names(file, model, config)
    targets, problems = [], []
    for name, array in tree_flatten(model.parameters()):
        if name == "lm_head.weight" and names.drops_head():
            continue
        try:
            targets.append(names.target(name, tuple(array.shape)))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    used = {part.tensor.name for target in targets for part in target.parts}
    problems += [
        f"{name[:80]}: the architecture has no such tensor"
        for name in file.tensors
        if name not in used and name not in ROPE_TENSORS and not name.endswith(".attn_rot_embd.weight")
    ]
    if problems:
        raise ModelError(
            f"The GGUF file does not fit its own metadata ({len(problems)} tensors):\n{listed(problems)}",
            where=str(file.path),
            run=f"gguf-dump {file.path}   # what it holds",
        )
    return targets


class _Names:
    """mlx-lm's parameter names as GGUF's."""

    def __init__(self, file: GgufFile, model: nn.Module, config: dict[str, Any]) -> None:
        self.file, self.config = file, config
        self.architecture = str(file.metadata["general.architecture"])
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(kinds[self.architecture], config["num_hidden_layers"])
        self.modules = dict(model.named_modules())

    def drops_head(self) -> bool:
        """Gemma 3 is built with a head and loses it when its checkpoint has none."""
        return self.config["model_type"] == "gemma3_text" and self.config["tie_word_embeddings"]

    def target(self, name: str, shape: tuple[int, ...]) -> Target:
        """Raises ValueError where there is none."""
        parts = self._parts(name, shape)
        self._check(parts, shape)
        bits, dtype = self._storage(name, parts)
        path, _, leaf = name.rpartition(".")
        is_norm = self.architecture.startswith("gemma") and path.endswith("norm")
        is_permuted = self.architecture == "llama" and path.endswith(_PERMUTED)
        key = "num_attention_heads" if path.endswith("q_proj") else "num_key_value_heads"
        heads = self.config[key] if is_permuted and leaf in ("weight", "bias") else None
        if heads and shape[0] % (2 * heads):
            raise ValueError(f"{shape[0]} rows are no whole number of {heads} heads")
        if is_norm:
            bits, dtype = None, "F32"
        return Target(name, shape, parts, bits, dtype, heads, -1.0 if is_norm else 0.0)

    def _parts(self, name: str, shape: tuple[int, ...]) -> tuple[Rows, ...]:
        path, _, leaf = name.rpartition(".")
        layer = path.split(".")[2] if path.startswith("model.layers.") else ""
        if ".switch_mlp." in path:
            return self._experts(layer, path.rpartition(".")[2], leaf, shape)
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError("GGUF has no name for it")
        if found not in self.file.tensors:
            fused = f"blk.{layer}.attn_qkv.{leaf}"
            if path.endswith(("q_proj", "k_proj", "v_proj")) and fused in self.file.tensors:
                return self._slice_of(fused, path, leaf)
            if name == "lm_head.weight":  # llama.cpp then uses the embedding's
                found = "token_embd.weight"
        tensor = self._tensor(found)
        return (Rows(tensor, 0, tensor.rows),)

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self.file.tensors:
            raise ValueError(f"{name} is missing")
        return self.file.tensors[name]

    def _experts(self, layer: str, projection: str, leaf: str, shape: tuple[int, ...]) -> tuple[Rows, ...]:
        stacked = f"{_EXPERTS[projection].format(layer)}.{leaf}"
        first = f"{_EACH_EXPERT[projection].format(layer, 0)}.{leaf}"
        if stacked in self.file.tensors or first not in self.file.tensors:
            tensor = self._tensor(stacked)
            return (Rows(tensor, 0, tensor.rows),)
        names = [f"{_EACH_EXPERT[projection].format(layer, expert)}.{leaf}" for expert in range(shape[0])]
        tensors = [self._tensor(name) for name in names]
        return tuple(Rows(tensor, 0, tensor.rows) for tensor in tensors)

    def _slice_of(self, fused: str, path: str, leaf: str) -> tuple[Rows, ...]:
        """Query, key and value rows lie one after another."""
        tensor, width = self._tensor(fused), self.config["head_dim"]
        queries, keys = (self.config[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
        ends = np.cumsum([0, queries, keys, keys]).tolist()
        index = ("q_proj", "k_proj", "v_proj").index(path.rpartition(".")[2])
        if leaf == "bias":
            # A vector is one row in the file; its elements are rows in the model.
            tensor = replace(tensor, shape=(*tensor.shape, 1)) if tensor.type in FLOATS else tensor
        if tensor.rows != ends[-1]:
            raise ValueError(f"{fused} has {tensor.rows} rows, not {ends[-1]}")
        return (Rows(tensor, ends[index], ends[index + 1]),)

    def _check(self, parts: tuple[Rows, ...], shape: tuple[int, ...]) -> None:
        types = sorted({part.tensor.type.name for part in parts})
        if len(types) > 1:
            raise ValueError(f"its parts are of several types: {', '.join(types)}")
        if not can_dequantize(parts[0].tensor.type):
            raise ValueError(f"of type {types[0]}, which cannot be read")
        if not _fits(parts, shape):
            shapes = [list(part.tensor.shape) for part in parts[:2]]
            raise ValueError(f"{shapes[0]} in the file, {list(shape)} in the model")

    def _storage(self, name: str, parts: tuple[Rows, ...]) -> tuple[int | None, str]:
        type_ = parts[0].tensor.type
        if type_ in FLOATS:
            return None, FLOATS[type_]
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not hasattr(self.modules.get(path), "to_quantized"):
            return None, "F32"
        affine = AFFINE.get(type_)
        return (affine.bits, affine.scale_dtype) if affine else (REQUANTIZED_BITS, "F16")


def _fits(parts: tuple[Rows, ...], shape: tuple[int, ...]) -> bool:
    """Whether the parts, one after another, are that shape; GGUF drops axes of one."""
    part = parts[0]
    if len(parts) == 1 and part.last - part.first == part.tensor.rows:
        return _squeezed(part.tensor.shape) == _squeezed(shape)
    if len(parts) == 1:  # some rows of a fused tensor
        width = math.prod(shape[1:])
        return (part.last - part.first, part.tensor.shape[-1]) == (shape[0], width)
    return len(parts) == shape[0] and all(part.tensor.shape == shape[1:] for part in parts)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
