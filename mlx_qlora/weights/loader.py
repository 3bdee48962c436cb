"""A frozen base model in memory: as it is stored, or quantized on the way, from the user's cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError, MlxQloraError, ModelError, WeightsError
from mlx_qlora.quantization.nf4_layers import SCALES, NF4Embedding
from mlx_qlora.quantization.policy import Recipe, recipe_of
from mlx_qlora.quantization.schemes import Scheme
from mlx_qlora.storage import cache_root, read_json, remove_folder
from mlx_qlora.weights.bitsandbytes import is_bitsandbytes, load_bitsandbytes
from mlx_qlora.weights.codebook import has_codebooks, load_codebooks
from mlx_qlora.weights.offload import Offload, start_offload
from mlx_qlora.weights.offload_plan import plan_offload, weights_budget_bytes
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.shards import read_checkpoint
from mlx_qlora.weights.source import ModelSource, fingerprint, resolve_model
from mlx_qlora.weights.stream import OnBytes, quantize_checkpoint
from mlx_qlora.weights.target import settle
from mlx_qlora.weights.tokenizer import read_tokenizer
from mlx_qlora.weights.verification import verify_folder


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
    offload: Offload | None = None
    """The layers that stay in their files, when ``model.offload`` is on and there are such."""
    notes: tuple[str, ...] = ()
    """What a person should know about how it was loaded."""


def load_base(
    model: ModelConfig,
    quantization: QuantizationConfig,
    on_bytes: OnBytes | None = None,
    *,
    is_lazy: bool = False,
) -> BaseModel:
    """Load a base model; an unquantized one is quantized first, once, into the user's cache.

    A model that is quantized already is taken as it is, whatever `quantization` says.

    Args:
        is_lazy: Leave weights unread until they are first used: for a process that keeps a part of them.

    Raises:
        MlxQloraError: the model cannot be found, read or quantized.
    """
    if model.path is None:
        raise ConfigError("There is no model.", run="mlx-qlora train --model M …")
    recipe = recipe_of(settled(model, quantization, on_bytes))
    source = resolve_model(model.path, model.revision, model.trust_remote_code, on_bytes=on_bytes)
    if source.is_quantized:
        recipe = None
    folder, identity = source.folder, source_fingerprint(source.folder)
    if recipe is not None:
        folder, notes = _quantized_copy(source, identity, recipe, on_bytes)
    else:
        notes = verify_folder(folder)
    module, tokenizer, config = _load(folder, model.trust_remote_code)
    dtype = _dtype(model.dtype, module)
    _cast(module, dtype)
    offload, said = _offload(module, folder, model) if model.offload else (None, ())
    if offload is None and not is_lazy:
        mx.eval(module.parameters())
    from mlx_lm.utils import get_total_parameters

    return BaseModel(
        module,
        tokenizer,
        config,
        source,
        folder,
        recipe.scheme if recipe is not None else None,
        identity,
        str(dtype).removeprefix("mlx.core."),
        get_total_parameters(module),
        offload,
        (*notes, *said),
    )


def _quantized_copy(
    source: ModelSource, identity: str, recipe: Recipe, on_bytes: OnBytes | None
) -> tuple[Path, tuple[str, ...]]:
    """The folder in the user's cache, made when there is none; a damaged one is made anew, and that is said.

    Returns:
        The folder, and a line for whatever a person should know.
    """
    skip = recipe.skip_modules
    wanted = recipe.scheme if recipe == Recipe(recipe.scheme, skip) else recipe
    folder = cache_folder(source, identity, wanted, skip)
    was_there = folder.exists()
    quantize_checkpoint(source, folder, wanted, skip, on_bytes, replace_damaged=True)
    if not was_there:
        return folder, ()
    try:
        return folder, verify_folder(folder)
    except WeightsError as error:
        remove_folder(folder)
        quantize_checkpoint(source, folder, wanted, skip, on_bytes)
        return folder, (f"made anew in the cache: {error.what}",)


def _offload(module: nn.Module, folder: Path, model: ModelConfig) -> tuple[Offload | None, tuple[str, ...]]:
    plan = plan_offload(module, folder, weights_budget_bytes(model.offload_budget_gib))
    return (start_offload(module, plan) if plan.streamed else None), (plan.note,)


def settled(
    model: ModelConfig, quantization: QuantizationConfig, on_bytes: OnBytes | None = None
) -> QuantizationConfig:
    """`quantization` with a scheme for each layer in place of ``bits_per_weight``, measured once.

    Raises:
        MlxQloraError: the model cannot be found or read, or the target cannot be reached.
    """
    if quantization.bits_per_weight is None or model.path is None:
        return quantization
    source = resolve_model(model.path, model.revision, model.trust_remote_code, on_bytes=on_bytes)
    if source.is_quantized:
        return quantization.model_copy(update={"bits_per_weight": None})
    return settle(source, quantization, on_bytes=on_bytes, memory=cache_root() / "measured").config


def source_fingerprint(folder: Path) -> str:
    """Of the unquantized weights: recorded by us when we quantized them, else of the files here."""
    try:
        recorded = read_json(folder / MANIFEST)["source_fingerprint"]
        read_checkpoint(folder)
        return str(recorded)
    except (OSError, ValueError, KeyError, TypeError):
        return fingerprint(folder)


def cache_folder(
    source: ModelSource, identity: str, scheme: Recipe | Scheme, skip_modules: tuple[str, ...]
) -> Path:
    """Where the quantized copy of a model is kept: by name, revision, weights and scheme."""
    key = repr([source.name, source.revision, identity, scheme, sorted(skip_modules)])
    short = hashlib.sha256(key.encode()).hexdigest()[:12]
    name = source.name.rsplit("/", 1)[-1] if Path(source.name).is_absolute() else source.name
    return cache_root() / f"{name.replace('/', '--')}-{scheme.name}-g{scheme.group_size}-{short}"


def _load(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, Any, dict[str, Any]]:
    from mlx_lm.utils import load_config, load_model

    read_checkpoint(folder)  # MLX must not meet a broken file
    try:
        config = load_config(folder)
        if has_codebooks(config):
            module = load_codebooks(ModelSource(folder, str(folder), None, config))
        elif is_bitsandbytes(config):
            module = load_bitsandbytes(ModelSource(folder, str(folder), None, config))
        else:
            module, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except MlxQloraError:
        raise
    except Exception as error:  # whatever mlx-lm makes of a configuration it does not expect
        raise ModelError(
            f"mlx-lm cannot load the model: {type(error).__name__}: {error}", where=str(folder)
        ) from error
    return module, read_tokenizer(folder, config.get("eos_token_id")), config


def _dtype(wanted: str, module: nn.Module) -> mx.Dtype:
    if wanted != "auto":
        return getattr(mx, wanted)
    if mx.default_device() == mx.cpu:
        return mx.float32
    from mlx.utils import tree_flatten

    arrays = [array for path, array in tree_flatten(module.parameters()) if not _is_scale(path)]
    floats = [array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    return max(set(floats), key=floats.count) if floats else mx.float32


def _cast(module: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating tensors, scales included but NF4's, unless the model keeps one in a type of its own."""
    may_cast = getattr(module, "cast_predicate", lambda _path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if is_float and may_cast(path) and not _is_scale(path) else array

    module.update(tree_map_with_path(cast, module.parameters()))
    for _, layer in module.named_modules():
        if isinstance(layer, NF4Embedding):
            layer.dtype = dtype


def _is_scale(path: str) -> bool:
    """Whether this is a parameter of an NF4 layer beside its weight: exact only as it is stored."""
    return path.rpartition(".")[2] in SCALES
