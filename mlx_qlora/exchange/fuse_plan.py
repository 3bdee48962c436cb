"""What a fused model will look like: the format of each layer, known before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError, listed
from mlx_qlora.exchange.fuse_base import base_layer, matrix_shape, stored_scheme, updates_of
from mlx_qlora.exchange.fuse_weights import Target, fused_parts, is_as_stored
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear
from mlx_qlora.quantization.nf4_layers import stored_shapes, with_codes
from mlx_qlora.quantization.policy import Recipe, decide_all, read_scheme, recipe_of
from mlx_qlora.quantization.schemes import Scheme
from mlx_qlora.weights.plan import Job, Output, QuantizationPlan, skeleton
from mlx_qlora.weights.rows import Provenance, Rows, num_rows
from mlx_qlora.weights.shards import DTYPE_NAMES, DTYPES
from mlx_qlora.weights.source import ModelSource

_FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True, kw_only=True)
class FuseFormat:
    """How the fused model is to be stored; as its base is, if nothing is said."""

    dequantize: bool = False
    """Unquantized, as W + Δ in float32 rounded once."""
    dtype: str | None = None
    """Of unquantized weights: bfloat16, float16 or float32; None is the model's own."""
    quantization: QuantizationConfig | None = None
    """Another scheme for the whole model."""
    adapted_scheme: str | None = None
    """Another one for the layers that have an update: int8, int6-g32, none."""
    compensate: bool = True
    """Choose codes and scales so that the update is kept (see `mlx_qlora.exchange.requantize`)."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _FLOATS:
            raise ConfigError(f"A dtype is {', '.join(_FLOATS)}, not {self.dtype}.", where="--dtype")
        if self.dequantize and (self.quantization is not None or self.adapted_scheme is not None):
            raise ConfigError(
                "A dequantized model has no scheme.", where="--dequantize", run="mlx-qlora fuse --help"
            )


def plan_targets(model: nn.Module, config: dict[str, Any], form: FuseFormat) -> dict[str, Target]:
    """Path → what becomes of each layer with a weight, adapted or not.

    Args:
        model: Base with its adapter; its arrays are not read.
        config: The base's config.json.

    Raises:
        ConfigError: a scheme does not exist, or is none that is written.
    """
    layers, updates = layers_of(model), updates_of(model)
    dtype = output_dtype(model, config, form)
    schemes = {path: stored_scheme(layer) for path, layer in layers.items()}
    if form.dequantize:
        schemes = dict.fromkeys(layers)
    elif form.quantization is not None:
        schemes |= _decided(config, recipe_of(form.quantization), layers)
    if form.adapted_scheme is not None:
        scheme = read_scheme(form.adapted_scheme, "--adapted-scheme")
        decided = _decided(config, None if scheme is None else Recipe(scheme), layers)
        schemes |= {path: decided[path] for path in updates}
    targets = {
        path: Target(
            schemes[path], _dtype(layer, schemes[path], dtype, form), updates.get(path), form.compensate
        )
        for path, layer in layers.items()
    }
    _check_written(targets, layers)
    return targets


def changed(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Those of `targets` that are not copied bit for bit."""
    layers = layers_of(model)
    return {path: target for path, target in targets.items() if not is_as_stored(layers[path], target)}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path → layer with a weight that is or could be quantized; of an adapted one the base."""
    modules = dict(model.named_modules())
    adapted = {path for path, module in modules.items() if isinstance(module, LoRALinear | LoRAEmbedding)}
    return {
        path: layer
        for path, module in modules.items()
        if path.rpartition(".")[0] not in adapted
        and (
            hasattr(layer := base_layer(module), "to_quantized")
            or ("weight" in layer and stored_scheme(layer))
        )
    }


def output_dtype(model: nn.Module, config: Mapping[str, Any], form: FuseFormat) -> mx.Dtype:
    """Of weights that are stored unquantized and were not before."""
    text = config.get("text_config") or {}
    named = form.dtype or config.get("torch_dtype") or config.get("dtype") or text.get("dtype")
    if (dtype := _FLOATS.get(str(named))) is not None:
        return dtype
    floats = [a.dtype for n, a in tree_flatten(model.parameters()) if n.endswith("norm.weight")]
    return max(set(floats), key=floats.count) if floats else mx.bfloat16


def plan_writing(
    model: nn.Module,
    config: dict[str, Any],
    targets: Mapping[str, Target],
    form: FuseFormat,
    shard_bytes: int,
) -> QuantizationPlan:
    """All tensors that are written, as jobs that make one layer at a time; `model` must not be kept.

    Tensors have mlx-lm's names, which for architectures without stacked experts are transformers'.
    """
    dtype = output_dtype(model, config, form) if form.dequantize or form.dtype else None
    may_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _path: True)
    layers, remade = layers_of(model), changed(model, targets)
    jobs: dict[str, Job] = {}
    for path, target in remade.items():
        pending = _PendingLayer(layers[path], target)
        for output in stored_outputs(path, layers[path], target):
            jobs[output.name] = _job(output, pending.reader(output.name.rpartition(".")[2]))
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        for wrapper in (".linear", ".embedding"):
            if path.removesuffix(wrapper) in remade:
                path = path.removesuffix(wrapper)
        if path in remade and (leaf != "bias" or f"{path}.bias" in jobs):
            continue
        name = f"{path}.{leaf}"
        is_float = mx.issubdtype(array.dtype, mx.floating) and path not in _quantized(targets)
        if dtype is not None and is_float and may_cast(name):
            array = array.astype(dtype)
        output = Output(name, DTYPE_NAMES[array.dtype], tuple(array.shape))
        jobs[name] = _job(output, Provenance({}, {}).rows_of(array))
    ordered = [jobs[name] for name in sorted(jobs)]
    num_parameters = sum(math.prod(matrix_shape(layer)) for layer in layers.values())
    num_parameters += sum(math.prod(j.outputs[0].shape) for n, j in jobs.items() if _is_plain(n, layers))
    return QuantizationPlan(
        _in_shards(ordered, shard_bytes), _config(config, targets, dtype), (), num_parameters
    )


def stored_outputs(path: str, layer: nn.Module, target: Target) -> list[Output]:
    """The tensors that `fused_parts` will give, by shape and type."""
    rows, width = matrix_shape(layer)
    leading, scheme = layer["weight"].shape[:-1], target.scheme
    if scheme is None:
        return [Output(f"{path}.weight", DTYPE_NAMES[target.dtype], (*leading, width))]
    if scheme.is_codebook:
        shapes = stored_shapes(rows, width, scheme.group_size, scheme.mode)
        return [Output(f"{path}.{leaf}", DTYPE_NAMES[t], shape) for leaf, (shape, t) in shapes.items()]
    shared = (*leading, width // scheme.group_size)
    packed = Output(f"{path}.weight", "U32", (*leading, width * scheme.bits // 32))
    if scheme.mode != "affine":
        return [packed, Output(f"{path}.scales", "U8", shared)]
    dtype = DTYPE_NAMES[target.dtype]
    return [packed, *(Output(f"{path}.{leaf}", dtype, shared) for leaf in ("scales", "biases"))]


class _PendingLayer:
    """A fused layer that is made when the first of its tensors is asked for, and forgotten after the last."""

    def __init__(self, layer: nn.Module, target: Target) -> None:
        self._layer: nn.Module | None = layer
        self._target = target
        self._parts: dict[str, mx.array] = {}

    def reader(self, leaf: str) -> Rows:
        """Reads rows of one stored array; the layer is fused when the first are asked for."""

        def read(first: int, last: int) -> mx.array:
            if self._layer is not None:
                self._parts = fused_parts(self._layer, self._target)
                self._layer = None
            array = self._parts[leaf]
            matrix = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array
            if last >= num_rows(array.shape):
                del self._parts[leaf]
                mx.clear_cache()
            return matrix[first:last] if matrix.ndim else matrix

        return read


def _job(output: Output, read: Rows) -> Job:
    return Job(
        output.name, read, num_rows(output.shape), output.num_bytes, DTYPES[output.dtype], None, (output,)
    )


def _decided(
    config: dict[str, Any], recipe: Recipe | None, layers: Mapping[str, nn.Module]
) -> dict[str, Scheme | None]:
    """The scheme of each layer by the rules of ``mlx-qlora quantize``."""
    if recipe is None:
        return dict.fromkeys(layers)
    decisions = decide_all(skeleton(ModelSource(Path(), "", None, config)), recipe)
    return {path: decisions[path].scheme if path in decisions else None for path in layers}


def _dtype(layer: Any, scheme: Scheme | None, output: mx.Dtype, form: FuseFormat) -> mx.Dtype:
    is_kept = not form.dequantize and form.dtype is None
    if scheme is not None and scheme.mode == "affine":
        scales = layer.get("scales")
        return scales.dtype if scales is not None and scales.dtype != mx.uint8 else output
    weight: mx.array = layer["weight"]
    return weight.dtype if is_kept and stored_scheme(layer) is None else output


def _check_written(targets: Mapping[str, Target], layers: Mapping[str, nn.Module]) -> None:
    fp4 = [p for p, t in targets.items() if t.update and t.scheme and t.scheme.mode.startswith("fp4")]
    if fp4:
        raise ConfigError(
            f"bitsandbytes' fp4 is read and never written; {len(fp4)} layers with an update have it:\n"
            f"{listed(fp4, limit=3)}",
            run="mlx-qlora fuse … --scheme nf4   # or --dequantize",
        )
    without = [
        path
        for path, target in targets.items()
        if target.scheme is not None
        and target.scheme.is_codebook
        and layers[path]["weight"].ndim != 2
        and with_codes(layers[path], target.scheme.group_size, target.scheme.mode) is None
    ]
    if without:
        raise ConfigError(
            f"NF4 is for linear layers and embeddings; these are others:\n{listed(without, limit=3)}",
            run="mlx-qlora fuse … --bits 8",
        )


def _quantized(targets: Mapping[str, Target]) -> set[str]:
    return {path for path, target in targets.items() if target.scheme is not None}


def _is_plain(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor is a parameter of its own, and not what is stored of a layer's weight."""
    path, _, leaf = name.rpartition(".")
    return path not in layers or leaf == "bias"


def _config(config: dict[str, Any], targets: Mapping[str, Target], dtype: mx.Dtype | None) -> dict[str, Any]:
    """The base's config.json with the quantization that the layers have now."""
    kept = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    if dtype is not None:
        kept["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
        kept |= {"dtype": kept["torch_dtype"]} if "dtype" in config else {}
    schemes = {path: t.scheme for path, t in targets.items() if t.scheme is not None}
    if schemes:
        most = Counter(schemes.values()).most_common(1)[0][0]
        quantization: dict[str, Any] = dict(most.config())
        quantization |= {path: scheme.config() for path, scheme in schemes.items() if scheme != most}
        kept |= {"quantization": quantization, "quantization_config": quantization}
    return dict(sorted(kept.items()))


def _in_shards(jobs: list[Job], shard_bytes: int) -> tuple[tuple[Job, ...], ...]:
    shards: list[list[Job]] = []
    room = 0
    for job in jobs:
        if not shards or job.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(job)
        room -= job.num_bytes
    return tuple(map(tuple, shards))
