"""What must hold before an adapter goes from one format to the other; every reason against it is listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.errors import AdapterError, listed
from mlx_qlora.exchange.peft_config import PeftConfig
from mlx_qlora.exchange.peft_tensors import (
    FLOATS,
    BaseShapes,
    are_equal,
    copied_from_base,
    duplicates,
    non_finite,
    our_name,
    shape_problems,
)
from mlx_qlora.lora.adapter import AdapterInfo
from mlx_qlora.weights.loader import source_fingerprint
from mlx_qlora.weights.shards import TensorInfo, read_checkpoint
from mlx_qlora.weights.source import ModelSource


def without_copies(
    infos: Mapping[str, TensorInfo], source: ModelSource
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of the update alone, and notes on what was left out; a copy that was trained stays."""
    base = read_checkpoint(source.folder)
    kept, dropped = {}, []
    for name, info in infos.items():
        original = copied_from_base(name, base) if our_name(name) is None else None
        if original is not None and are_equal(info, base[original]):
            dropped.append(original)
        else:
            kept[name] = info
    notes = [f"left out, as the base has it too: {name}" for name in dropped]
    return kept, notes


def check_tensors(
    infos: Mapping[str, TensorInfo], config: PeftConfig, shapes: BaseShapes, *, where: str
) -> None:
    """Raise AdapterError unless these are the tensors that `config` speaks of, of the base's shapes."""
    names = {name: ours for name in infos if (ours := our_name(name)) is not None}
    problems = [
        f"{name}: no tensor of a low-rank update; PEFT stored a layer that was trained as a whole"
        for name in infos
        if name not in names
    ]
    problems += [f"{name}: twice, under two names" for name in duplicates(names)]
    problems += [
        f"{name}: stored as {info.dtype}, not as {', '.join(FLOATS)}"
        for name, info in infos.items()
        if info.dtype not in FLOATS
    ]
    sizes = {names[name]: tuple(reversed(info.shape)) for name, info in infos.items() if name in names}
    problems += shape_problems(sizes, shapes, rank=config.r, has_lengths=config.use_dora)
    there, named = layer_paths(sizes), config.named_paths(shapes.paths)
    if named is not None:
        problems += [f"{path}: named in target_modules, but without tensors" for path in set(named) - there]
        problems += [f"{path}: has tensors, but target_modules leave it out" for path in there - set(named)]
    if not names:
        problems.append("there is no tensor of a low-rank update")
    _raise_if(problems, "The PEFT adapter does not fit the base model", where)


def check_ours(
    tensors: Mapping[str, mx.array], info: AdapterInfo, source: ModelSource, shapes: BaseShapes, *, where: str
) -> None:
    """Raise AdapterError unless these tensors of ours fit the base, and PEFT has the same names for them."""
    sizes = {name: tuple(array.shape) for name, array in tensors.items()}
    problems = shape_problems(sizes, shapes, rank=info.lora.rank, has_lengths=info.lora.variant == "dora")
    if not source.is_quantized and any(source.folder.glob("model*.safetensors")):
        published = read_checkpoint(source.folder)
        problems += [
            f"{path}: the published checkpoint has no {path}.weight, so PEFT knows this layer by another name"
            for path in sorted(layer_paths(tensors))
            if f"{path}.weight" not in published
        ]
    _raise_if(problems, "The adapter cannot be written for PEFT", where)


def check_base(source: ModelSource, info: AdapterInfo, adapter: Path, output: Path, *, force: bool) -> None:
    """Raise AdapterError unless PEFT can load this base, and it has the weights trained on."""
    command = f"mlx-qlora export-peft {adapter} --output {output} --model"
    if source.config.get("quantization"):
        raise AdapterError(
            f"{source.name} is quantized in MLX's format, which PEFT does not load; name the 16-bit model.",
            run=f"{command} OWNER/NAME",
        )
    has_weights = any(source.folder.glob("model*.safetensors"))
    if has_weights and not force and source_fingerprint(source.folder) != info.fingerprint:
        raise AdapterError(
            f"{adapter} was trained on {info.model.path}, and {source.name} has other weights.",
            run=f"{command} {source.name} --force   # if it is the 16-bit model of a quantized one",
        )


def check_finite(tensors: Mapping[str, mx.array], folder: Path) -> None:
    """Raise AdapterError where a tensor holds what is no number."""
    problems = [f"{name}: holds what is no number (NaN or infinity)" for name in non_finite(tensors)]
    _raise_if(problems, "The adapter is damaged", str(folder))


def _raise_if(problems: list[str], what: str, where: str) -> None:
    if problems:
        raise AdapterError(f"{what} ({len(problems)} reasons):\n{listed(sorted(problems))}", where=where)


def layer_paths(names: Mapping[str, Any]) -> set[str]:
    """The layers that tensors of these names belong to."""
    return {name.rpartition(".")[0] for name in names}
