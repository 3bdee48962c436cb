"""A number of bits per weight becomes a scheme for each layer, by what the checkpoint's own weights lose."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.policy import Recipe, recipe_of, spelled
from mlx_qlora.quantization.schemes import Scheme, checked
from mlx_qlora.quantization.sensitivity import LayerWeights, MeasuredLayer, Option, choose, measure
from mlx_qlora.storage import read_json, write_json
from mlx_qlora.weights.plan import Job, plan_quantization
from mlx_qlora.weights.rows import Rows, matrix_shape
from mlx_qlora.weights.source import ModelSource, fingerprint
from mlx_qlora.weights.stream import SHARD_BYTES

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FORMAT_VERSION = 1
"""Of kept measurements; another one is not read."""


@dataclass(frozen=True)
class Settled:
    """A configuration without a target, and how it was found."""

    config: QuantizationConfig
    """With an override for each layer whose scheme is not the model's."""
    chosen: Mapping[str, Option]
    """Path → the format chosen by its measured error."""
    bits_per_weight: float
    """As stored, of the whole model."""

    @property
    def error(self) -> float:
        """Sum of the layers' errors (see `mlx_qlora.quantization.sensitivity`)."""
        return sum(option.error for option in self.chosen.values())


def settle(
    source: ModelSource,
    config: QuantizationConfig,
    inputs: Mapping[str, mx.array] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    *,
    importance: Mapping[str, float] | None = None,
    memory: Path | None = None,
) -> Settled:
    """Choose the scheme of each layer so that the model has ``config.bits_per_weight`` at most.

    Layers that the configuration or the architecture decides about stay as decided. The others choose among
    affine integers of 2 to 8 bits and the model's own scheme. The answer is a function of the checkpoint and
    of the configuration; a second call with it changes nothing.

    Args:
        inputs: Path → inputs of that layer in calibration, (vectors, features); of the others the weights
            are measured.
        importance: Path → importance of that layer, by `importances`; of the others, their squared norm.
        on_bytes: Called with (bytes read, bytes to read).
        memory: Folder where measurements without calibration are kept, so that another target needs none.

    Raises:
        ConfigError: the target is less than what the layers can be brought to.
        WeightsError: the checkpoint is broken.
    """
    target = config.bits_per_weight
    recipe = recipe_of(config.model_copy(update={"bits_per_weight": None}))
    if target is None or recipe is None:
        raise ConfigError("There is no target to reach.", where="quantization.bits_per_weight")
    layers, fixed_bytes, num_parameters = _layers(source, recipe)
    kept = (
        memory / f"{_key(source, recipe)}.json" if memory is not None and not (inputs or importance) else None
    )
    measured = _remembered(kept, layers) if kept is not None else None
    if measured is None:
        measured = list(_measured(layers, inputs or {}, importance or {}, on_bytes))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {layer.path: [option.error for option in layer.options] for layer in measured})
    budget = math.floor(target * num_parameters / 8) - fixed_bytes
    smallest = sum(min(layer.stored_bytes.values()) for layer in layers)
    if smallest > budget:
        least = 8 * (fixed_bytes + smallest) / num_parameters
        nearest = math.ceil(least * 100) / 100
        raise ConfigError(
            f"{target:g} bits per weight cannot be reached: with the smallest schemes the model has "
            f"{least:.3f}. {fixed_bytes} of these {fixed_bytes + smallest} bytes are not up for choice.",
            where="quantization.bits_per_weight",
            run=f"mlx-qlora quantize {source.name} --bits-per-weight {nearest} --output DIR",
        )
    chosen = choose(measured, budget)
    total = fixed_bytes + sum(option.stored_bytes for option in chosen.values())
    named = sorted(chosen, key=len)  # a shorter path is also a part of longer ones; the later override wins
    overrides = (*config.overrides, *((path, spelled(chosen[path].scheme)) for path in named))
    changes = {"bits_per_weight": None, "overrides": overrides}
    return Settled(config.model_copy(update=changes), chosen, 8 * total / num_parameters)


def candidates(scheme: Scheme) -> tuple[Scheme, ...]:
    """What a layer of a model in `scheme` chooses among, itself first."""
    group_size = scheme.group_size if scheme.group_size in GROUP_SIZES else 64
    affine = [checked(Scheme("own", "affine", bits, group_size)) for bits in WIDTHS]
    return tuple(dict.fromkeys([scheme, *affine]))


def _layers(source: ModelSource, recipe: Recipe) -> tuple[list[LayerWeights], int, int]:
    """The layers up for choice, the bytes of all else, and the number of parameters. Reads headers only."""
    plans = {c: _jobs(source, replace(recipe, scheme=c)) for c in candidates(recipe.scheme)}
    untouched = _jobs(source, replace(recipe, skip_modules=("*",), overrides=()))
    layers, fixed_bytes = [], 0
    for name, job in untouched.items():
        jobs = {scheme: plan[name] for scheme, plan in plans.items()}
        stored = {scheme: _bytes(own) for scheme, own in jobs.items() if own.scheme == scheme}
        # What somebody else decides about has one scheme in every plan, and fits at most one of them.
        if len(stored) < 2 or any(own.scheme not in (scheme, None) for scheme, own in jobs.items()):
            fixed_bytes += _bytes(jobs[recipe.scheme])
            continue
        shape = matrix_shape(job.outputs[0].shape)
        layers.append(LayerWeights(name.removesuffix(".weight"), _reader(job), (shape[0], shape[1]), stored))
    return layers, fixed_bytes, sum(math.prod(job.outputs[0].shape) for job in untouched.values())


def _jobs(source: ModelSource, recipe: Recipe) -> dict[str, Job]:
    plan = plan_quantization(source, recipe, (), SHARD_BYTES)
    return {job.name: job for shard in plan.shards for job in shard}


def _bytes(job: Job) -> int:
    return sum(output.num_bytes for output in job.outputs)


def _reader(job: Job) -> Rows:
    def read(first: int, last: int) -> mx.array:
        return job.read(first, last).astype(job.dtype)

    return read


def _measured(
    layers: Sequence[LayerWeights],
    inputs: Mapping[str, mx.array],
    importance: Mapping[str, float],
    on_bytes: Callable[[int, int], None] | None,
) -> Iterator[MeasuredLayer]:
    total, done = sum(math.prod(layer.shape) for layer in layers), 0
    for layer in layers:
        yield measure(layer, inputs.get(layer.path), importance.get(layer.path))
        done += math.prod(layer.shape)
        if on_bytes is not None:
            on_bytes(2 * done, 2 * total)  # as 16-bit weights


def _key(source: ModelSource, recipe: Recipe) -> str:
    text = repr([fingerprint(source.folder), recipe, candidates(recipe.scheme), FORMAT_VERSION])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remembered(file: Path, layers: Sequence[LayerWeights]) -> list[MeasuredLayer] | None:
    """What was measured before; None if there is no such file, or it is not about these layers."""
    try:
        table = read_json(file)
        return [
            MeasuredLayer(
                layer.path,
                tuple(
                    Option(scheme, size, float(error))
                    for (scheme, size), error in zip(
                        layer.stored_bytes.items(), table[layer.path], strict=True
                    )
                ),
            )
            for layer in layers
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
