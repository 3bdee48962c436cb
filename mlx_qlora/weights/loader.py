"""A frozen base model in memory: as it is stored, or quantized on the way, from the user's cache."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.quantization.schemes import Scheme, resolve
from mlx_qlora.storage import read_json
from mlx_qlora.weights.shards import read_checkpoint
from mlx_qlora.weights.source import ModelSource, fingerprint, resolve_model
from mlx_qlora.weights.stream import MANIFEST, OnBytes, quantize_checkpoint


@dataclass(frozen=True)
class BaseModel:
    """A base model in memory, with where it came from."""

    model: nn.Module
    tokenizer: Any
    """mlx-lm's TokenizerWrapper."""
    config: dict[str, Any]
    source: ModelSource
    """What was asked for."""
    folder: Path
    """What was loaded: the source itself, or its quantized copy."""
    scheme: Scheme | None
    """The format it was quantized to here; None when it was loaded as it is stored."""
    fingerprint: str
    """Of the unquantized weights, where they are known."""
    dtype: str
    """Type of activations."""
    num_parameters: int


def load_base(
    model: ModelConfig, quantization: QuantizationConfig, on_bytes: OnBytes | None = None
) -> BaseModel:
    """Load a base model; an unquantized one is quantized first, once, into the user's cache.

    A model that is quantized already is taken as it is, whatever `quantization` says.

    Raises:
        MlxQloraError: the model cannot be found, read or quantized.
    """
    if model.path is None:
        raise ConfigError("There is no model.", run="mlx-qlora train --model M …")
    scheme = resolve(quantization)
    source = resolve_model(model.path, model.revision, model.trust_remote_code)
    if source.is_quantized:
        scheme = None
    folder, identity = source.folder, source_fingerprint(source.folder)
    if scheme is not None:
        folder = cache_folder(source, identity, scheme, quantization.skip_modules)
        quantize_checkpoint(source, folder, scheme, quantization.skip_modules, on_bytes, replace_damaged=True)
    module, tokenizer, config = _load(folder, model.trust_remote_code)
    dtype = _dtype(model.dtype, module)
    _cast(module, dtype)
    mx.eval(module.parameters())
    from mlx_lm.utils import get_total_parameters

    return BaseModel(
        module,
        tokenizer,
        config,
        source,
        folder,
        scheme,
        identity,
        str(dtype).removeprefix("mlx.core."),
        get_total_parameters(module),
    )


def source_fingerprint(folder: Path) -> str:
    """Of the unquantized weights: recorded by us when we quantized them, else of the files here."""
    try:
        recorded = read_json(folder / MANIFEST)["source_fingerprint"]
        read_checkpoint(folder)
        return str(recorded)
    except (OSError, ValueError, KeyError, TypeError):
        return fingerprint(folder)


def cache_folder(source: ModelSource, identity: str, scheme: Scheme, skip_modules: tuple[str, ...]) -> Path:
    """Where the quantized copy of a model is kept: by name, revision, weights and scheme."""
    key = repr([source.name, source.revision, identity, scheme, sorted(skip_modules)])
    short = hashlib.sha256(key.encode()).hexdigest()[:12]
    name = source.name.rsplit("/", 1)[-1] if Path(source.name).is_absolute() else source.name
    return cache_root() / f"{name.replace('/', '--')}-{scheme.name}-g{scheme.group_size}-{short}"


def cache_root() -> Path:
    """``$MLX_QLORA_CACHE``, or the platform's folder for things that can be made again."""
    if explicit := os.environ.get("MLX_QLORA_CACHE"):
        return Path(explicit)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_qlora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_qlora"


def _load(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, Any, dict[str, Any]]:
    from mlx_lm.utils import load_model, load_tokenizer

    read_checkpoint(folder)  # MLX must not meet a broken file
    try:
        module, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever mlx-lm makes of a configuration it does not expect
        raise ModelError(
            f"mlx-lm cannot load the model: {type(error).__name__}: {error}", where=str(folder)
        ) from error
    try:
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"The model's tokenizer cannot be loaded: {error}", where=str(folder)) from error
    return module, tokenizer, config


def _dtype(wanted: str, module: nn.Module) -> mx.Dtype:
    if wanted != "auto":
        return getattr(mx, wanted)
    if mx.default_device() == mx.cpu:
        return mx.float32
    from mlx.utils import tree_flatten

    floats = [a.dtype for _, a in tree_flatten(module.parameters()) if mx.issubdtype(a.dtype, mx.floating)]
    return max(set(floats), key=floats.count) if floats else mx.float32


def _cast(module: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating tensors, scales included, unless the model keeps one in a type of its own."""
    may_cast = getattr(module, "cast_predicate", lambda _path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if is_float and may_cast(path) else array

    module.update(tree_map_with_path(cast, module.parameters()))
