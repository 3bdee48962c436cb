"""Where the low-rank matrices begin, when that depends on the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.adapter import evaluate_adapter
from mlx_qlora.lora.attach import attach
from mlx_qlora.lora.dora import DoRALinear
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear
from mlx_qlora.lora.pissa import PiSSALinear
from mlx_qlora.lora.principal import principal
from mlx_qlora.quantization.dense import is_quantized, unpacked
from mlx_qlora.quantization.policy import Recipe
from mlx_qlora.quantization.schemes import SCHEMES
from mlx_qlora.weights.loader import BaseModel
from mlx_qlora.weights.plan import Job, plan_quantization
from mlx_qlora.weights.stream import SHARD_BYTES

OnBytes = Callable[[int, int], None]


def attach_initialised(
    base: BaseModel,
    config: LoraConfig,
    seed: int,
    on_bytes: OnBytes | None = None,
    *,
    is_restored: bool = False,
) -> list[str]:
    """`attach`, and then what ``lora.init`` asks for; all that belongs to the new layers is computed.

    - default: B is zero, and the model computes what its base does.
    - pissa: A B is the best approximation of the weight itself, as the base holds it, and is subtracted
      again: the model computes what its base does, and training turns its principal directions.
    - loftq: A B is the best approximation of W − Q, what quantizing the 16-bit weight W has lost. The base is
      shared between adapters, so Q stays: one iteration of the paper. A layer that lost nothing begins as by
      default.

    Args:
        on_bytes: Called with (bytes of weights done, bytes to do) where weights are decomposed.
        is_restored: A checkpoint's tensors will be put in: no weight is decomposed.

    Returns:
        The paths of the layers that were changed.

    Raises:
        ConfigError: as for `attach`; the rank is above a layer's size; or loftq, and there are no 16-bit
            weights or nothing is quantized.
        WeightsError: the 16-bit weights cannot be read.

    Sources: PiSSA: Meng et al. 2024, arXiv:2404.02948. LoftQ: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    if config.init == "loftq":
        _check_source(base)
    paths = attach(base.model, config, seed)
    if config.init != "default" and not is_restored:
        _decompose(base, config, paths, mx.random.key(seed), on_bytes)
    evaluate_adapter(base.model)
    return paths


def _decompose(
    base: BaseModel, config: LoraConfig, paths: list[str], key: mx.array, on_bytes: OnBytes | None
) -> None:
    modules = dict(base.model.named_modules())
    layers = [modules[path] for path in paths]
    _check_rank(config.rank, zip(paths, layers, strict=True))
    jobs = _jobs(base) if config.init == "loftq" else {}
    sizes = [2 * _frozen(layer).weight.shape[0] * _width(layer) for layer in layers]  # as 16-bit weights
    for index, (path, layer) in enumerate(zip(paths, layers, strict=True)):
        matrix = _lost(layer, jobs[f"{path}.weight"]) if config.init == "loftq" else _weight(layer)
        if mx.any(matrix != 0).item():
            _begin(layer, matrix, config.rank, mx.random.split(key, len(layers))[index])
        if on_bytes is not None:
            on_bytes(sum(sizes[: index + 1]), sum(sizes))


def _begin(layer: nn.Module, matrix: mx.array, rank: int, key: mx.array) -> None:
    """Let scale · A B be the best approximation of `matrix`, (out, in), of that rank."""
    u, s, vt = principal(matrix, rank, key)
    root = mx.sqrt(s / layer.scale)
    a, b = vt.T * root, root[:, None] * u.T
    if isinstance(layer, LoRAEmbedding):
        a, b = u * root, root[:, None] * vt
    if isinstance(layer, PiSSALinear):
        layer.begin_with(a, b)
    else:
        layer.lora_a, layer.lora_b = a, b
    if isinstance(layer, DoRALinear):
        layer.m = layer.adapted_lengths()
    mx.eval(layer.trainable_parameters())  # one layer's matrices at a time


def _lost(layer: nn.Module, job: Job) -> mx.array:
    """W − Q, (out, in), float32: what the layer's frozen weight lost in being quantized."""
    return job.read(0, job.rows).astype(job.dtype).astype(mx.float32) - _weight(layer)


def _weight(layer: nn.Module) -> mx.array:
    """The frozen weight as it is multiplied with, (out, in), float32."""
    return unpacked(_frozen(layer), mx.zeros(0)).astype(mx.float32)


def _frozen(layer: nn.Module) -> nn.Module:
    return layer.embedding if isinstance(layer, LoRAEmbedding) else layer.linear


def _width(layer: nn.Module) -> int:
    return layer.lora_b.shape[1] if isinstance(layer, LoRAEmbedding) else layer.lora_a.shape[0]


def _jobs(base: BaseModel) -> dict[str, Job]:
    """How to read each unquantized tensor of the source, by the model's own names."""
    as_it_is = Recipe(SCHEMES["int4"], skip_modules=("*",))
    plan = plan_quantization(base.source, as_it_is, ("*",), SHARD_BYTES)
    return {job.name: job for shard in plan.shards for job in shard}


def _check_source(base: BaseModel) -> None:
    if base.source.is_quantized:
        raise ConfigError(
            f"loftq compares the base with its 16-bit weights, and {base.source.name} is stored quantized.",
            where="lora.init",
            run="mlx-qlora train --model OWNER/NAME …   # the 16-bit model, with quantization.scheme=int4",
        )
    if not any(is_quantized(module) for _, module in base.model.named_modules()):
        raise ConfigError(
            "loftq corrects what quantizing has lost, and this base is not quantized.",
            where="lora.init",
            run="mlx-qlora train --set quantization.scheme=int4 …   # or --set lora.init=default",
        )


def _check_rank(rank: int, layers: Iterator[tuple[str, LoRALinear]]) -> None:
    for path, layer in layers:
        side = min(layer.lora_a.shape[0], layer.lora_b.shape[1])
        if rank > side:
            raise ConfigError(f"{path} has {side} directions, not {rank}.", where="lora.rank")
