"""The base that an adapter was trained on, found again, and its weights without having them all in memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError, MlxQloraError, ModelError
from mlx_qlora.exchange.requantize import restored
from mlx_qlora.lora.adapter import AdapterInfo, load_adapter
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear
from mlx_qlora.lora.merge import merged_weight
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.policy import Recipe, recipe_of
from mlx_qlora.quantization.schemes import Scheme
from mlx_qlora.weights.bitsandbytes import is_bitsandbytes, load_bitsandbytes
from mlx_qlora.weights.codebook import has_codebooks, load_codebooks
from mlx_qlora.weights.loader import cache_folder, settled, source_fingerprint
from mlx_qlora.weights.shards import read_checkpoint
from mlx_qlora.weights.source import ModelSource, resolve_model
from mlx_qlora.weights.stream import OnBytes, quantize_checkpoint

Adapted = LoRALinear | LoRAEmbedding


@dataclass(frozen=True)
class FuseBase:
    """Where the weights are that an adapter is fused into."""

    source: ModelSource
    """What was asked for."""
    folder: Path
    """What the adapter was trained on: the source itself, or its quantized copy."""
    fingerprint: str
    """Of the unquantized weights."""
    trust_remote_code: bool = False

    def model(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model as it is stored, no array read yet, and its config.json.

        Raises:
            WeightsError: the files are broken.
            ModelError: they are not those that config.json describes.
        """
        return lazy_model(self.folder, trust_remote_code=self.trust_remote_code)

    def adapted_model(self, adapter_path: Path, info: AdapterInfo) -> tuple[nn.Module, dict[str, Any]]:
        """The same with the adapter's layers, of which alone the arrays are in memory.

        Raises:
            AdapterError: it belongs to another base, or does not fit.
        """
        model, config = self.model()
        load_adapter(model, adapter_path, info, fingerprint=self.fingerprint)
        return model.eval(), config


def find_base(
    model: ModelConfig, quantization: QuantizationConfig, on_bytes: OnBytes | None = None
) -> FuseBase:
    """The base of a run; quantized now, in the user's cache, where the run had it so and it is gone.

    Raises:
        MlxQloraError: the model cannot be found, read or quantized.
    """
    if model.path is None:
        raise ConfigError("There is no model to fuse into.", run="mlx-qlora fuse --model M …")
    recipe = recipe_of(settled(model, quantization, on_bytes))
    source = resolve_model(model.path, model.revision, model.trust_remote_code)
    folder, identity = source.folder, source_fingerprint(source.folder)
    if recipe is not None and not source.is_quantized:
        skip = recipe.skip_modules
        wanted = recipe.scheme if recipe == Recipe(recipe.scheme, skip) else recipe
        folder = cache_folder(source, identity, wanted, skip)
        quantize_checkpoint(source, folder, wanted, skip, on_bytes, replace_damaged=True)
    return FuseBase(source, folder, identity, model.trust_remote_code)


def lazy_model(folder: Path, *, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """A model of any format we run, in evaluation mode, no array read yet, and its config.json.

    Raises:
        WeightsError, ModelError: as for `FuseBase.model`.
    """
    from mlx_lm.utils import load_config, load_model

    read_checkpoint(folder)  # MLX must not meet a broken file
    try:
        config = load_config(folder)
        if has_codebooks(config):
            return load_codebooks(ModelSource(folder, str(folder), None, config)).eval(), config
        if is_bitsandbytes(config):
            return load_bitsandbytes(ModelSource(folder, str(folder), None, config)).eval(), config
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        return model.eval(), config
    except MlxQloraError:
        raise
    except Exception as error:  # whatever mlx-lm makes of a configuration it does not expect
        raise ModelError(
            f"mlx-lm cannot load the model: {type(error).__name__}: {error}", where=str(folder)
        ) from error


def base_layer(module: nn.Module) -> nn.Module:
    """The frozen layer inside an adapted one; any other module itself."""
    if isinstance(module, LoRAEmbedding):
        return module.embedding
    return module.linear if isinstance(module, LoRALinear) else module


def stored_scheme(layer: Any) -> Scheme | None:
    """How the weight of a layer is stored; None where it is not quantized."""
    if "scales" not in layer and "absmax" not in layer:
        return None
    name = f"int{layer.bits}" if layer.mode == "affine" else layer.mode
    return Scheme(name, layer.mode, layer.bits, layer.group_size)


def matrix_shape(layer: Any) -> tuple[int, int]:
    """(rows, width) of a layer's weight unpacked; of stacked ones, the rows of all."""
    weight = layer["weight"]
    scheme = stored_scheme(layer)
    width = weight.shape[-1] if scheme is None else weight.shape[-1] * 32 // scheme.bits
    return weight.size // weight.shape[-1], width


def unpacked_rows(layer: Any, first: int, last: int) -> mx.array:
    """Rows [first, last) of a layer's weight in float32, exactly what the stored numbers mean."""
    scheme = stored_scheme(layer)
    weight = layer["weight"]
    rows = weight.reshape(-1, weight.shape[-1])[first:last]
    if scheme is None:
        return rows.astype(mx.float32)
    if scheme.mode in nf4.MODES:
        absmax = nf4.absmax_of(layer, layer["absmax"][first:last], slice(first, last))
        return nf4.unpack_words(rows, absmax, scheme.mode, mx.float32)
    shared = {leaf: layer[leaf] for leaf in ("scales", "biases") if layer.get(leaf) is not None}
    parts = {leaf: array.reshape(-1, array.shape[-1])[first:last] for leaf, array in shared.items()}
    return restored({"weight": rows, **parts}, scheme, layer.get("global_scale"))


class Update:
    """What an adapter makes of a weight, some rows at a time; it keeps its matrices, not the base."""

    def __init__(self, layer: Adapted) -> None:
        self._layer = copy.copy(layer)
        self._is_embedding = isinstance(layer, LoRAEmbedding)
        for name in ("linear", "embedding"):
            self._layer.pop(name, None)
        self._layer.__dict__.pop("lengths", None)  # of DoRA; a graph that would keep the base in memory

    @cached_property
    def basis(self) -> mx.array:
        """(width, rank), orthonormal: the directions in which rows are changed, but for DoRA's lengths."""
        ending = "_b" if self._is_embedding else "_a"
        factors = [np.array(a.astype(mx.float32)) for name, a in self._layer.items() if name.endswith(ending)]
        directions = np.concatenate([f.T if self._is_embedding else f for f in factors], axis=1)
        return mx.array(np.linalg.qr(directions.astype(np.float64))[0].astype(np.float32))

    def __call__(self, rows: mx.array, first: int, last: int) -> mx.array:
        """Rows [first, last) of the fused weight from those of the base, (rows, width), float32."""
        part = copy.copy(self._layer)
        for name, array in self._layer.items():
            if not isinstance(array, mx.array):
                continue
            if array.ndim == 1:
                part[name] = array[first:last]  # a number for each row
            elif self._is_embedding:
                part[name] = array[first:last] if name.endswith("_a") else array
            else:
                part[name] = array[:, first:last] if name.endswith("_b") else array
        return merged_weight(part, rows)


def updates_of(model: nn.Module) -> dict[str, Update]:
    """Path → update of the adapted layers."""
    return {
        path: Update(module)
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear | LoRAEmbedding)
    }
