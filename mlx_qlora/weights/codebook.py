"""Folders with NF4 layers, which mlx-lm does not know, loaded into its architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ModelError
from mlx_qlora.quantization.nf4 import MODES
from mlx_qlora.quantization.nf4_layers import quantize_layers
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.shards import lazy_tensors, read_checkpoint
from mlx_qlora.weights.source import ModelSource


def has_codebooks(config: Mapping[str, Any]) -> bool:
    """Whether a layer of the model that config.json describes is stored as NF4, by ourselves."""
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping):
        return False
    entries = [quantization, *(entry for entry in quantization.values() if isinstance(entry, Mapping))]
    return any(entry.get("mode") in MODES for entry in entries)


def load_codebooks(source: ModelSource) -> nn.Module:
    """The model in a folder that has NF4 layers, its arrays not read yet.

    Raises:
        ModelError: the tensors are not those that config.json describes.
    """
    infos = read_checkpoint(source.folder)
    model = skeleton(source)
    quantization = source.config["quantization"]

    def settings_of(path: str, _module: nn.Module) -> Mapping[str, Any] | None:
        own = quantization.get(path)
        is_quantized = f"{path}.absmax" in infos or f"{path}.scales" in infos
        return (own if isinstance(own, Mapping) else quantization) if is_quantized else None

    quantize_layers(model, settings_of)
    tensors: dict[str, mx.array] = {}
    for file in sorted({info.file for info in infos.values()}):
        tensors |= lazy_tensors(file)
    return load_tensors(model, tensors, source)


def load_tensors(model: nn.Module, tensors: Mapping[str, mx.array], source: ModelSource) -> nn.Module:
    """`model` in evaluation mode with these tensors, all of them.

    Raises:
        ModelError: names or shapes differ.
    """
    try:
        model.eval()
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"The weights do not fit config.json: {error}", where=str(source.folder)) from error
    return model
