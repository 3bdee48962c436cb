"""An adapter as a GGUF LoRA, for llama.cpp's ``--lora``.

llama.cpp computes y = W x + (alpha / rank) · B A x with A (rank, in) and B (out, rank): ours, transposed.
Keys: ggml-org/llama.cpp, src/llama-adapter.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import AdapterError, ConfigError, MlxQloraError, listed
from mlx_qlora.exchange.gguf_blocks import encode
from mlx_qlora.exchange.gguf_export import checked_output, publish
from mlx_qlora.exchange.gguf_layout import Layout, interleaved, layout_of
from mlx_qlora.exchange.gguf_plan import AUTO, asked_type
from mlx_qlora.exchange.gguf_writer import GgufEntry, encode_header, padded, write_data
from mlx_qlora.lora.adapter import CONFIG, WEIGHTS, read_adapter_info
from mlx_qlora.lora.layers import linear_shape
from mlx_qlora.storage import read_json
from mlx_qlora.weights.gguf_tensors import FLOATS, Type
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.shards import read_tensors
from mlx_qlora.weights.source import ModelSource, resolve_model


@dataclass(frozen=True)
class GgufAdapter:
    """A GGUF LoRA."""

    path: Path
    architecture: str
    base_model: str
    rank: int
    alpha: float
    """As llama.cpp reads it: the scale times the rank."""
    layers: int
    """Linear layers with an update."""
    bytes: int
    gguf_type: str
    notes: tuple[str, ...]


def export_gguf_adapter(
    adapter_path: Path,
    output: Path,
    *,
    model: str | None = None,
    type_name: str = AUTO,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> GgufAdapter:
    """Write an adapter, ours or mlx-lm's, as a GGUF LoRA; its base's weights are not needed.

    Args:
        model: The base; the one the adapter remembers if not given.
        type_name: f32, which ``auto`` is, f16 or bf16.

    Raises:
        AdapterError: it is broken, or of a kind that llama.cpp does not have, such as DoRA.
        ModelError: its base cannot be found, or cannot be exported.
        StorageError: the disk has no room, or `output` is there already.
    """
    output, type_ = checked_output(output), asked_type(type_name)
    type_ = Type.F32 if type_ is None else type_
    if type_ not in FLOATS:
        raise ConfigError(f"An adapter is written as f32, f16 or bf16, not as {type_name}.")
    folder = adapter_path.expanduser()
    settings, notes = _settings(folder, model)
    source = _base(folder, model, revision, trust_remote_code)
    layout = layout_of(source)
    rank, scale = _rank_and_scale(settings, folder)
    tensors = _converted(_read(folder), layout, source, rank, folder)
    metadata = {
        "general.architecture": layout.architecture,
        "general.type": "adapter",
        "general.name": name or folder.resolve().name,
        "general.base_model.count": 1,
        "general.base_model.0.name": source.name.rstrip("/").rpartition("/")[2],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(scale * rank),
    }
    entries = [GgufEntry(name, type_, array.shape) for name, array in tensors.items()]
    header = encode_header(metadata, entries)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for entry in entries:
            write_data(file, entry, iter([encode(tensors[entry.name], type_).tobytes()]))

    publish(output, len(header) + sum(padded(entry.num_bytes) for entry in entries), write)
    return GgufAdapter(
        path=output,
        architecture=layout.architecture,
        base_model=source.name,
        rank=rank,
        alpha=float(np.float32(scale * rank)),
        layers=len(tensors) // 2,
        bytes=output.stat().st_size,
        gguf_type=type_.name,
        notes=tuple(notes),
    )


def _settings(folder: Path, model: str | None) -> tuple[Mapping[str, Any], list[str]]:
    """adapter_config.json, and what of it a GGUF LoRA has no place for."""
    notes = []
    if model is None:
        info = read_adapter_info(folder)
        if info.quantization.scheme != "none":
            scheme = info.quantization.scheme
            notes.append(f"it was trained on the base in {scheme}: quantize the base so and export that")
        if info.system_prompt:
            notes.append(
                f"the system prompt is not in the file; give it to llama.cpp: {info.system_prompt!r}"
            )
    try:
        settings = read_json(folder / CONFIG)
        kind = settings.get("fine_tune_type", "lora")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"The adapter's configuration cannot be read: {error}", where=str(folder / CONFIG)
        ) from None
    if kind == "dora":
        raise _dora(folder)
    if kind != "lora":
        raise AdapterError(f"llama.cpp has adapters of low rank only, not {kind!r}.", where=str(folder))
    return settings, notes


def _dora(folder: Path) -> AdapterError:
    return AdapterError(
        "llama.cpp has no DoRA: it cannot give a weight's rows their trained lengths.",
        where=str(folder),
        run=f"mlx-qlora fuse --adapter-path {folder} --output FUSED; mlx-qlora export-gguf FUSED --output …",
    )


def _base(folder: Path, model: str | None, revision: str | None, trust_remote_code: bool) -> ModelSource:
    if model is None:
        base = read_adapter_info(folder).model
        model, revision = str(base.path), revision or base.revision
        trust_remote_code = trust_remote_code or base.trust_remote_code
    return resolve_model(model, revision, trust_remote_code, needs_weights=False)


def _rank_and_scale(settings: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    try:
        own = settings["lora_parameters"]
        rank, scale = int(own["rank"]), float(own["scale"])
    except (KeyError, TypeError, ValueError):
        rank, scale = 0, 0.0
    if rank < 1 or not np.isfinite(scale) or scale == 0:
        # llama.cpp takes alpha 0 for "no alpha" and applies the update unscaled.
        raise AdapterError(
            f"The adapter's rank and scale cannot be used: {rank}, {scale}.", where=str(folder / CONFIG)
        )
    return rank, scale


def _read(folder: Path) -> dict[str, mx.array]:
    try:
        return read_tensors(folder / WEIGHTS)
    except (MlxQloraError, OSError) as error:
        what = error.what if isinstance(error, MlxQloraError) else str(error)
        raise AdapterError(f"The adapter does not load: {what}", where=str(folder / WEIGHTS)) from None


def _converted(
    tensors: Mapping[str, mx.array], layout: Layout, source: ModelSource, rank: int, folder: Path
) -> dict[str, np.ndarray]:
    """A (rank, in) and B (out, rank), float32, by llama.cpp's names."""
    modules: dict[str, nn.Module] = dict(skeleton(source).named_modules())
    if any(name.endswith(".m") for name in tensors):
        raise _dora(folder)
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    converted, problems = {}, []
    for path in paths:
        try:
            a, b = _pair(tensors, path, modules.get(path), rank)
            name = layout.name_of(f"{path}.weight")
            if rows := layout.rows_per_head(f"{path}.weight", len(b)):
                b = b[interleaved(len(b), rows)]
            converted[f"{name}.lora_a"], converted[f"{name}.lora_b"] = a, b
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems or not converted:
        raise AdapterError(
            f"The adapter cannot be a GGUF LoRA:\n{listed(problems or ['it has no tensors'])}",
            where=str(folder / WEIGHTS),
        )
    return converted


def _pair(
    tensors: Mapping[str, mx.array], path: str, layer: nn.Module | None, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Raises ValueError where they do not belong to a linear layer of the base."""
    leaves = {name.rpartition(".")[2] for name in tensors if name.rpartition(".")[0] == path}
    if leaves != {"lora_a", "lora_b"}:
        raise ValueError(f"it has {', '.join(sorted(leaves))}, not lora_a and lora_b")
    if not isinstance(layer, nn.Linear):
        kind = "no layer of the base" if layer is None else f"a layer of the kind {type(layer).__name__}"
        raise ValueError(f"it is {kind}; llama.cpp adapts linear ones")
    a, b = (np.array(tensors[f"{path}.{leaf}"].astype(mx.float32)).T for leaf in ("lora_a", "lora_b"))
    in_features, out_features = linear_shape(layer)
    if a.shape != (rank, in_features) or b.shape != (out_features, rank):
        raise ValueError(
            f"A {a.T.shape} and B {b.T.shape} do not fit {in_features} → {out_features} and rank {rank}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("it holds numbers that are not finite")
    return a, b
