"""A low-rank update's tensors under PEFT's names and under ours, checked against a base model's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.lora.attach import adaptable_paths
from mlx_qlora.lora.embedding import embedding_shape
from mlx_qlora.lora.layers import linear_shape
from mlx_qlora.weights.shards import TensorInfo, read_rows

PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LINEAR = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
_EMBEDDING = {"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
_LEAVES = {**_LINEAR, **_EMBEDDING, "lora_magnitude_vector.weight": "m"}
_PEFT_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+?)\.({'|'.join(map(re.escape, _LEAVES))})")
_COPY = re.compile(rf"{re.escape(_PREFIX)}(.+?)(?:\.base_layer)?\.weight")
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class BaseShapes:
    """The layers of a base model that can have an update: path → (in, out), or (vocabulary, features)."""

    linears: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    num_layers: int
    """Blocks."""

    @property
    def paths(self) -> list[str]:
        """Of all of them, in the model's order."""
        return [*self.embeddings, *self.linears]

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the output head too."""
        return not any(path.rpartition(".")[2] in ("lm_head", "output") for path in self.linears)


def base_shapes(model: nn.Module) -> BaseShapes:
    """The shapes of a model, or of a skeleton whose arrays were never evaluated."""
    modules = dict(model.named_modules())
    linears, embeddings = adaptable_paths(model)
    return BaseShapes(
        {path: linear_shape(modules[path]) for path in linears},
        {path: embedding_shape(modules[path]) for path in embeddings},
        len(model.layers),
    )


def our_name(peft_name: str) -> str | None:
    """``base_model.model.P.lora_A.weight`` → ``P.lora_a``; None when it is no tensor of a low-rank update."""
    match = _PEFT_NAME.fullmatch(peft_name)
    return f"{match[1]}.{_LEAVES[match[2]]}" if match else None


def peft_name(name: str, shapes: BaseShapes) -> str:
    """``P.lora_a`` → ``base_model.model.P.lora_A.weight``, or PEFT's own name for an embedding's."""
    path, _, leaf = name.rpartition(".")
    leaves = _EMBEDDING if path in shapes.embeddings else _LINEAR
    return f"{_PREFIX}{path}.{next(theirs for theirs, ours in leaves.items() if ours == leaf)}"


def turned(name: str, array: mx.array) -> mx.array:
    """From one layout to the other: matrices are transposed, lengths stay."""
    return array if name.endswith(".m") else mx.contiguous(array.T)


def copied_from_base(name: str, infos: Mapping[str, TensorInfo]) -> str | None:
    """The base tensor that an entry of PEFT's file is named after: it stores whole embeddings beside their
    update unless told not to."""
    match = _COPY.fullmatch(name)
    return f"{match[1]}.weight" if match and f"{match[1]}.weight" in infos else None


def are_equal(one: TensorInfo, other: TensorInfo, *, block_bytes: int = 32 * 1024**2) -> bool:
    """Whether two stored tensors hold the same numbers; some rows of each are in memory at a time."""
    if one.shape != other.shape:
        return False
    num_rows = one.shape[0]
    size = max(1, block_bytes * num_rows // max(one.num_bytes, 1))
    return all(
        mx.array_equal(read_rows(one, first, last), read_rows(other, first, last)).item()
        for first, last in ((start, min(start + size, num_rows)) for start in range(0, num_rows, size))
    )


def shape_problems(
    stored: Mapping[str, tuple[int, ...]], shapes: BaseShapes, *, rank: int, has_lengths: bool
) -> list[str]:
    """What is wrong with an update's tensors: ``name: why``.

    Args:
        stored: Our name → shape in our layout.
        has_lengths: DoRA: each layer has an ``m``.
    """
    problems: list[str] = []
    paths = {name.rpartition(".")[0]: None for name in stored}
    for path in paths:
        if path in shapes.embeddings:
            problems += _embedding_problems(path, shapes, has_lengths=has_lengths)
        elif path not in shapes.linears:
            problems.append(f"{path}: the base model has no linear layer of that name")
            continue
        rows, columns = (shapes.embeddings if path in shapes.embeddings else shapes.linears)[path]
        wanted: dict[str, tuple[int, ...]] = {"lora_a": (rows, rank), "lora_b": (rank, columns)}
        if has_lengths:
            wanted["m"] = (columns,)
        there = {name.rpartition(".")[2]: shape for name, shape in stored.items() if _is_of(name, path)}
        problems += [f"{path}.{leaf}: missing" for leaf in wanted if leaf not in there]
        problems += [f"{path}.{leaf}: not of this kind of adapter" for leaf in there if leaf not in wanted]
        problems += [
            f"{path}.{leaf}: {there[leaf]}, but the base model and the rank make it {shape}"
            for leaf, shape in wanted.items()
            if leaf in there and there[leaf] != shape
        ]
    return problems


def non_finite(tensors: Mapping[str, mx.array]) -> list[str]:
    """Names of the tensors that hold something that is no number."""
    return [name for name, array in tensors.items() if not mx.all(mx.isfinite(array)).item()]


def duplicates(ours: Mapping[str, str]) -> list[str]:
    """Of PEFT name → our name: the PEFT names that mean the same as one before them."""
    first = {own: name for name, own in reversed(list(ours.items()))}
    return [name for name, own in ours.items() if first[own] != name]


def _is_of(name: str, path: str) -> bool:
    return name.rpartition(".")[0] == path


def _embedding_problems(path: str, shapes: BaseShapes, *, has_lengths: bool) -> list[str]:
    if has_lengths:
        return [f"{path}: DoRA of an embedding is another thing in PEFT (lengths of columns) than in MLX"]
    if shapes.is_tied:
        return [f"{path}: the embedding is the output head too; PEFT updates the one, MLX both"]
    return []
