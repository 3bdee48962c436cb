"""What a quantized checkpoint will look like, known from shapes alone: tensors, bytes, shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ModelError, WeightsError, listed
from mlx_qlora.quantization.nf4_layers import stored_shapes, with_codes
from mlx_qlora.quantization.policy import Decision, Recipe, decide_all
from mlx_qlora.quantization.schemes import Scheme
from mlx_qlora.weights.rows import Provenance, Rows, num_rows
from mlx_qlora.weights.shards import DTYPE_BYTES, DTYPE_NAMES, TensorInfo, lazy_tensors, read_checkpoint
from mlx_qlora.weights.source import ModelSource


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that stays unquantized, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Output:
    """One tensor of the new checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Job:
    """One tensor of the old checkpoint and what becomes of it."""

    name: str
    read: Rows
    """In its old type."""
    rows: int
    num_bytes: int
    """In the old checkpoint."""
    dtype: mx.Dtype
    """The type it is cast to before anything else."""
    scheme: Scheme | None
    outputs: tuple[Output, ...]
    """weight, scales and, for affine, biases; weight, absmax and more for NF4; or the tensor itself."""


@dataclass(frozen=True)
class QuantizationPlan:
    """All jobs, spread over shards, with the new config.json."""

    shards: tuple[tuple[Job, ...], ...]
    config: dict[str, Any]
    skipped: tuple[SkippedLayer, ...]
    num_parameters: int

    @property
    def input_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(job.num_bytes for shard in self.shards for job in shard)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(output.num_bytes for shard in self.shards for job in shard for output in job.outputs)

    def shard_name(self, index: int) -> str:
        """File name of a shard, as mlx-lm names it."""
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def digest(self, fingerprint: str) -> str:
        """Changes when anything about the result would."""
        outputs = [[str(output) for job in shard for output in job.outputs] for shard in self.shards]
        text = json.dumps([fingerprint, outputs, self.config], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_quantization(
    source: ModelSource, scheme: Recipe | Scheme, skip_modules: Sequence[str], shard_bytes: int
) -> QuantizationPlan:
    """Decide everything, reading only headers.

    Names and shapes are those of mlx-lm's own model class, its ``sanitize`` applied, so the result is
    tensor for tensor what mlx-lm's conversion writes, where it knows the format.

    Raises:
        ModelError: the configuration does not build a model, or NF4 has no layer for a part of it.
        WeightsError: tensors are missing, left over, or of another shape than the model's.
    """
    model = skeleton(source)
    infos = read_checkpoint(source.folder)
    lazy = _lazy_tensors(infos)
    provenance = Provenance(infos, lazy)
    with provenance.watching_stacks():
        tensors = _sanitized(model, lazy, source)
    _check_tensors(model, tensors, source)
    decisions = decide_all(model, scheme, skip_modules)
    _check_layers(model, decisions, source)
    cast = _cast(model, source.config)
    jobs = [
        _job(name, array, provenance.rows_of(array), cast(name, array), decisions)
        for name, array in sorted(tensors.items())
    ]
    skipped = tuple(SkippedLayer(path, d.reason) for path, d in decisions.items() if d.reason is not None)
    return QuantizationPlan(
        shards=_in_shards(jobs, shard_bytes),
        config=_config(source.config, model, scheme, decisions),
        skipped=skipped,
        num_parameters=sum(array.size for array in tensors.values()),
    )


def skeleton(source: ModelSource) -> nn.Module:
    """The model's module tree; its arrays are lazy and never evaluated.

    Raises:
        ModelError: the configuration lacks something or contradicts itself.
    """
    generator: list[mx.array] = mx.random.state  # type: ignore[assignment]
    state = [mx.array(part) for part in generator]
    try:
        model_class, args_class = _classes(source)
        return model_class(args_class.from_dict(source.config))
    except Exception as error:  # whatever an architecture's constructor makes of a broken configuration
        raise ModelError(
            f"config.json does not describe a {source.config['model_type']} model: {error}",
            where=str(source.folder / "config.json"),
        ) from error
    finally:
        for part, before in zip(generator, state, strict=True):
            part[:] = before


def _classes(source: ModelSource) -> tuple[Any, Any]:
    from mlx_lm.utils import _get_classes

    if source.config.get("model_file") is None:
        return _get_classes(source.config)
    # The model folder's own code: `resolve_model` lets it through only when it is trusted.
    spec = spec_from_file_location("custom_model", source.folder / source.config["model_file"])
    if spec is None or spec.loader is None:
        raise ImportError(f"{source.config['model_file']} is no Python file")
    code = module_from_spec(spec)
    spec.loader.exec_module(code)
    return code.Model, code.ModelArgs


def _lazy_tensors(infos: dict[str, TensorInfo]) -> dict[str, mx.array]:
    lazy: dict[str, mx.array] = {}
    for file in sorted({info.file for info in infos.values()}):
        lazy |= lazy_tensors(file)
    return lazy


def _sanitized(model: nn.Module, lazy: Mapping[str, mx.array], source: ModelSource) -> Mapping[str, mx.array]:
    if not hasattr(model, "sanitize"):
        return lazy
    try:
        return model.sanitize(dict(lazy))
    except Exception as error:  # whatever an architecture makes of a tensor that is missing
        raise WeightsError(
            f"The weights do not fit config.json: {type(error).__name__}: {error}", where=str(source.folder)
        ) from error


def _check_tensors(model: nn.Module, tensors: Mapping[str, mx.array], source: ModelSource) -> None:
    from mlx.utils import tree_flatten

    expected = dict(tree_flatten(model.parameters()))
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: the architecture has no such tensor" for name in tensors if name not in expected]
    problems += [
        f"{name}: {list(array.shape)}, but config.json makes it {list(expected[name].shape)}"
        for name, array in tensors.items()
        if name in expected and array.shape != expected[name].shape
    ]
    if problems:
        raise WeightsError(
            f"The weights do not fit config.json ({len(problems)} tensors):\n{listed(problems)}",
            where=str(source.folder),
        )


def _check_layers(model: nn.Module, decisions: Mapping[str, Decision], source: ModelSource) -> None:
    """Refuse NF4 where there is no layer of ours for it: the stacked experts of a mixture."""
    modules = dict(model.named_modules())
    without = [
        path
        for path, decision in decisions.items()
        if decision.scheme is not None
        and decision.scheme.is_codebook
        and with_codes(modules[path], decision.scheme.group_size, decision.scheme.mode) is None
    ]
    if without:
        kind = type(modules[without[0]]).__name__
        part = without[0].rpartition(".")[0].rpartition(".")[2]
        raise ModelError(
            f"NF4 is for linear layers and embeddings; {len(without)} layers here are others ({kind}):\n"
            f"{listed(without, limit=3)}",
            where=str(source.folder),
            run=f"mlx-qlora train --set quantization.overrides={{{part}: int4}} …   # or another --scheme",
        )


def _cast(model: nn.Module, config: dict[str, Any]) -> Callable[[str, mx.array], mx.Dtype]:
    """The type a tensor is stored in; mlx-lm's rule: the configuration's, unless the model objects."""
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    wanted = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}.get(str(name))
    may_cast = getattr(model, "cast_predicate", lambda _path: True)

    def dtype_of(path: str, array: mx.array) -> mx.Dtype:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return wanted if wanted is not None and is_float and may_cast(path) else array.dtype

    return dtype_of


def _job(name: str, array: mx.array, read: Rows, dtype: mx.Dtype, decisions: dict[str, Decision]) -> Job:
    path, _, leaf = name.rpartition(".")
    decision = decisions.get(path) if leaf == "weight" else None
    scheme = decision.scheme if decision else None
    return Job(
        name=name,
        read=read,
        rows=num_rows(array.shape),
        num_bytes=array.nbytes,
        dtype=dtype,
        scheme=scheme,
        outputs=_outputs(name, tuple(array.shape), dtype, scheme),
    )


def _outputs(name: str, shape: tuple[int, ...], dtype: mx.Dtype, scheme: Scheme | None) -> tuple[Output, ...]:
    if scheme is None:
        return (Output(name, DTYPE_NAMES[dtype], shape),)
    *rows, width = shape
    base = name.removesuffix(".weight")
    if scheme.is_codebook:
        stored = stored_shapes(num_rows(shape), width, scheme.group_size, scheme.mode)
        return tuple(Output(f"{base}.{leaf}", DTYPE_NAMES[t], own) for leaf, (own, t) in stored.items())
    packed = Output(name, "U32", (*rows, width * scheme.bits // 32))
    scales_shape = (*rows, width // scheme.group_size)
    if scheme.mode != "affine":
        return packed, Output(f"{base}.scales", "U8", scales_shape)
    shared = DTYPE_NAMES[dtype]
    return (
        packed,
        Output(f"{base}.scales", shared, scales_shape),
        Output(f"{base}.biases", shared, scales_shape),
    )


def _in_shards(jobs: list[Job], shard_bytes: int) -> tuple[tuple[Job, ...], ...]:
    shards: list[list[Job]] = []
    room = 0
    for job in jobs:
        size = sum(output.num_bytes for output in job.outputs)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(job)
        room -= size
    return tuple(map(tuple, shards))


def _config(
    config: dict[str, Any], model: nn.Module, scheme: Recipe | Scheme, decisions: dict[str, Decision]
) -> dict[str, Any]:
    """The new config.json. mlx-lm's rule: what vision needs goes, unless the model keeps its tower."""
    quantization: dict[str, Any] = dict(scheme.config())
    for path, decision in decisions.items():
        if decision.own is not None:
            quantization[path] = dict(decision.own)
    unused = (
        {"_name_or_path"}
        if "vision_tower" in getattr(model, "model", {})
        else {"_name_or_path", "vision_config"}
    )
    kept = {key: value for key, value in config.items() if key not in unused}
    return dict(sorted({**kept, "quantization": quantization, "quantization_config": quantization}.items()))
