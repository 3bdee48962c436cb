"""One model of a base and its adapter: measured first, written as a stream, published by one rename."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlx_qlora.config import ModelConfig
from mlx_qlora.errors import AdapterError, MlxQloraError
from mlx_qlora.exchange.fuse_base import find_base
from mlx_qlora.exchange.fuse_loss import measure_loss
from mlx_qlora.exchange.fuse_plan import FuseFormat, changed, plan_targets, plan_writing
from mlx_qlora.exchange.fuse_report import MAX_LOST_SHARE, MAX_WEIGHT_ERROR, FuseLoss
from mlx_qlora.exchange.fuse_sample import MAX_TOKENS, Sample, text_sample, validation_sample
from mlx_qlora.exchange.fuse_weights import Target
from mlx_qlora.exchange.fuse_write import (
    Fusing,
    check_free_name,
    check_room,
    sweep,
    write_fused,
)
from mlx_qlora.lora.adapter import AdapterInfo, read_adapter_info
from mlx_qlora.weights.output_folder import locked
from mlx_qlora.weights.plan import QuantizationPlan
from mlx_qlora.weights.stream import SHARD_BYTES, OnBytes
from mlx_qlora.weights.tokenizer import read_tokenizer


class LossError(MlxQloraError):
    """A format that loses too much of an adapter."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """On what the loss is measured."""

    data: str | None = None
    """Folder, file or hub data set, whose validation rows are used; None takes a built-in text."""
    max_tokens: int = MAX_TOKENS
    """Tokens of the data, at most."""
    logits: bool = True
    """Without them only weights are compared, in the memory of one layer."""


@dataclass(frozen=True)
class FuseResult:
    """A fused model folder."""

    path: Path
    base: str
    """Hub id or folder that was asked for."""
    base_folder: Path
    """What was fused into: that, or its quantized copy."""
    num_fused: int
    """Layers with an update."""
    schemes: Mapping[str, int]
    """Scheme → layers that have it."""
    bytes: int
    bits_per_weight: float
    loss: FuseLoss
    seconds: float


def fuse(
    adapter_path: Path,
    output: Path,
    form: FuseFormat | None = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    measuring: Measuring | None = None,
    accept_loss: bool = False,
    on_quantizing: OnBytes | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    on_loss: Callable[[FuseLoss], None] | None = None,
    on_bytes: OnBytes | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FuseResult:
    """Write base and adapter as one model, layer by layer.

    The base is what the adapter was trained on: of an adapter trained on an int4 copy, that copy. The loss is
    measured first; if it is too large, nothing is written. A kill leaves nothing under the output's name.

    Args:
        model: Another copy of the base, such as a quantized folder; None is the adapter's own.
        accept_loss: Write whatever is lost.
        on_quantizing: Called with (done, total) bytes if the base's quantized copy has to be made again.
        on_layer: Called with (layers measured, layers to measure).
        on_loss: Called with what was measured, before anything is written.
        on_bytes: Called with (bytes written, bytes to write).

    Raises:
        LossError: the format loses too much of the adapter.
        AdapterError: the adapter is broken, or belongs to another base.
        StorageError: the disk has no room, or `output` is there already.
        MlxQloraError: the model or the data cannot be used.
    """
    started, adapter_path, output = time.perf_counter(), adapter_path.resolve(), output.resolve()
    info = read_adapter_info(adapter_path)
    # A lock that a killed run left goes too; where nothing is yet, no folder is made for looking.
    with locked(output) if output.parent.is_dir() else nullcontext():
        check_free_name(output)
    config = _model_config(info, model, revision, trust_remote_code)
    base = find_base(config, info.quantization, on_quantizing)
    fusing = Fusing(base, adapter_path, info, form or FuseFormat())
    plan, schemes = _planned(fusing, shard_bytes)
    check_room(plan, output)
    loss = _measured(fusing, measuring or Measuring(), on_layer)
    if on_loss is not None:
        on_loss(loss)
    if loss.is_too_large and not accept_loss:
        raise _refusal(loss, fusing, output)
    with locked(output):
        check_free_name(output)
        sweep(output)
        write_fused(fusing, plan, output, loss, on_bytes)
    return FuseResult(
        path=output,
        base=base.source.name,
        base_folder=base.folder,
        num_fused=len(loss.layers),
        schemes=schemes,
        bytes=plan.output_bytes,
        bits_per_weight=8 * plan.output_bytes / plan.num_parameters,
        loss=loss,
        seconds=time.perf_counter() - started,
    )


def _model_config(
    info: AdapterInfo, model: str | None, revision: str | None, trust_remote_code: bool
) -> ModelConfig:
    if model is not None:
        return ModelConfig(path=model, revision=revision, trust_remote_code=trust_remote_code)
    if info.model.path is None:
        raise AdapterError(
            "The adapter does not say which base model it belongs to.", run="mlx-qlora fuse --model M …"
        )
    return info.model.model_copy(update={"trust_remote_code": trust_remote_code})


def _planned(fusing: Fusing, shard_bytes: int) -> tuple[QuantizationPlan, dict[str, int]]:
    model, config = fusing.base.adapted_model(fusing.adapter_path, fusing.info)
    targets = plan_targets(model, config, fusing.form)
    counts = Counter(_spelled(target) for target in targets.values())
    return plan_writing(model, config, targets, fusing.form, shard_bytes), dict(counts)


def _spelled(target: Target) -> str:
    """The scheme of a layer, or the type of an unquantized one."""
    if target.scheme is None:
        return str(target.dtype).removeprefix("mlx.core.")
    return f"{target.scheme.name}-g{target.scheme.group_size}"


def _measured(fusing: Fusing, measuring: Measuring, on_layer: Callable[[int, int], None] | None) -> FuseLoss:
    model, config = fusing.base.adapted_model(fusing.adapter_path, fusing.info)
    targets = changed(model, plan_targets(model, config, fusing.form))
    adapted = [path for path, target in targets.items() if target.update is not None]
    sample = _sample(fusing, measuring) if measuring.logits else None
    comparison = measure_loss(model, targets, sample, on_layer)
    return FuseLoss(
        {path: comparison.weights[path] for path in adapted},
        comparison.logits,
        sample is not None and sample.is_validation,
        tuple(comparison.notes),
    )


def _sample(fusing: Fusing, measuring: Measuring) -> Sample:
    tokenizer = read_tokenizer(fusing.base.folder)
    if measuring.data is None:
        return text_sample(tokenizer)
    return validation_sample(measuring.data, tokenizer, fusing.info, measuring.max_tokens)


def _refusal(loss: FuseLoss, fusing: Fusing, output: Path) -> LossError:
    command = f"mlx-qlora fuse --adapter-path {fusing.adapter_path} --output {output}"
    ways = [
        f"{command} --bits 8",
        f"{command} --adapted-scheme int8   # the layers with an update alone",
        f"{command} --dequantize",
    ]
    if not loss.is_validation:
        ways.append(f"{command} --data D   # measure on your own validation rows")
    ways.append(f"{command} --accept-loss")
    if loss.logits is not None:
        what = (
            f"This format loses {loss.logits.lost_share or 0.0:.0%} of what the adapter does "
            f"({loss.logits.kl_nats:.4f} of {loss.logits.base_kl_nats:.4f} nats); "
            f"at most {MAX_LOST_SHARE:.0%} is let through"
        )
    else:
        what = (
            f"This format's error is {loss.weights.error or 0.0:.2f} times the adapter's update; at most "
            f"{MAX_WEIGHT_ERROR:g} times is let through without a look at the logits"
        )
    return LossError(
        f"{what}. Nothing was written.", where=str(fusing.adapter_path), run="\n  or ".join(ways)
    )
