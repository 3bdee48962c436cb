"""Adapters on disk: mlx-lm's own two files, plus what is needed to find and check the base again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from pydantic import ValidationError

from mlx_qlora.config import Config, LoraConfig, ModelConfig, QuantizationConfig, difference
from mlx_qlora.errors import AdapterError, MlxQloraError, listed
from mlx_qlora.lora.attach import attach, layer_index
from mlx_qlora.lora.dora import DoRALinear
from mlx_qlora.lora.layers import lora_scale
from mlx_qlora.lora.pissa import PiSSALinear, plain_update
from mlx_qlora.storage import read_json, write_json, write_tensors
from mlx_qlora.weights.shards import read_metadata, read_tensors

WEIGHTS, CONFIG, OURS = "adapters.safetensors", "adapter_config.json", "mlx_qlora"
DIGEST, INFO_DIGEST = "sha256", "mlx_qlora_sha256"
FORMAT_VERSION = 1
_BEGINNING = ("initial_a", "initial_b")


class AdapterInfo(Config):
    """What an adapter remembers of its training; stored under ``mlx_qlora`` in adapter_config.json."""

    format_version: int = FORMAT_VERSION
    model: ModelConfig
    """The base as it was asked for; `path` is a hub id or an absolute folder."""
    quantization: QuantizationConfig
    lora: LoraConfig
    system_prompt: str | None = None
    """Put before every conversation in training, and again in inference."""
    fingerprint: str
    """Of the unquantized base weights."""
    chat_template: str
    chat_template_sha256: str
    tokenizer_sha256: str | None = None
    """Of the tokenizer it was trained with; None in adapters that do not know."""

    def check_tokenizer(self, sha256: str) -> None:
        """Raise AdapterError where prompts would become other tokens than in training.

        Args:
            sha256: Of the tokenizer at hand.
        """
        if self.tokenizer_sha256 not in (None, sha256):
            raise AdapterError(
                "The base's tokenizer is not the one the adapter was trained with, so that prompts become "
                f"other tokens ({sha256[:12]}…, not {self.tokenizer_sha256[:12]}…).",
                where=f"{self.model.path}: tokenizer.json, tokenizer_config.json",
                run="put back the tokenizer files the model had in training, or train again with these",
            )

    def check_template(self) -> None:
        """Raise AdapterError if the stored chat template is not the one that was hashed."""
        if text_sha256(self.chat_template) != self.chat_template_sha256:
            raise AdapterError("The adapter's chat template was changed after training.", where=CONFIG)


def text_sha256(text: str) -> str:
    """Hexadecimal digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, mx.array]) -> str:
    """Hexadecimal digest of tensors: name, type, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(np.array(array.view(mx.uint8) if array.dtype == mx.bfloat16 else array).tobytes())
    return digest.hexdigest()


def _info_sha256(info: AdapterInfo) -> str:
    """Of all but where the base is: people move models."""
    left_out = {"model"} if info.tokenizer_sha256 is not None else {"model", "tokenizer_sha256"}
    tree = info.model_dump(mode="json", exclude=left_out)
    return text_sha256(json.dumps(tree, sort_keys=True))


def adapter_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The trained tensors of a model, by path: ``….q_proj.lora_a`` (in, rank), ``….lora_b`` (rank, out).

    DoRA has ``….m`` (out,) besides; PiSSA what A and B began with, which is not trained but belongs to them.
    """
    tensors = dict(tree_flatten(model.trainable_parameters()))
    for path, module in model.named_modules():
        if isinstance(module, PiSSALinear):
            tensors |= {f"{path}.{name}": module[name] for name in _BEGINNING}
    return tensors


def save_adapter(folder: Path, tensors: Mapping[str, mx.array], info: AdapterInfo, num_layers: int) -> None:
    """Write an adapter that mlx-lm loads too; each file is replaced by one rename.

    One that began with PiSSA is written as the plain LoRA of twice the rank that computes the same.

    Args:
        num_layers: Blocks in the base model.
    """
    tensors, info = as_shipped(tensors, info)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, {"format": "mlx", DIGEST: tensors_sha256(tensors)})
    write_json(folder / CONFIG, _config_for_mlx_lm(tensors, info, num_layers))


def as_shipped(
    tensors: Mapping[str, mx.array], info: AdapterInfo
) -> tuple[Mapping[str, mx.array], AdapterInfo]:
    """The adapter in terms that other tools know: without a beginning that has to be subtracted."""
    paths = [name.removesuffix(".initial_a") for name in tensors if name.endswith(".initial_a")]
    if not paths:
        return tensors, info
    plain: dict[str, mx.array] = {}
    for path in paths:
        own = (tensors[f"{path}.{leaf}"] for leaf in ("lora_a", "lora_b", *_BEGINNING))
        plain[f"{path}.lora_a"], plain[f"{path}.lora_b"] = plain_update(*own)
    lora = info.lora
    # alpha grows as the divisor does: the scale stays.
    factor = math.sqrt(2) if lora.variant == "rslora" else 2
    changes = {"rank": 2 * lora.rank, "alpha": factor * lora.alpha, "init": "default"}
    return plain, info.model_copy(update={"lora": lora.model_copy(update=changes)})


def read_adapter_info(folder: Path) -> AdapterInfo:
    """What the adapter in `folder` remembers.

    Raises:
        AdapterError: there is no adapter, it is broken, or it was made by another tool.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise AdapterError(
            f"There is no adapter here: {' and '.join(missing)} missing; "
            f"there is {', '.join(there) or 'nothing'}.",
            where=str(folder),
            run=f"mlx-qlora train --model M --data D --adapter-path {folder}",
        )
    try:
        tree = read_json(folder / CONFIG)
        info = AdapterInfo.model_validate(tree[OURS])
        digest = tree.get(INFO_DIGEST)
    except KeyError:
        raise AdapterError(
            "This adapter was not made by mlx_qlora: it does not say which base model it belongs to.",
            where=str(folder / CONFIG),
            run=f'python -m mlx_lm generate --model M --adapter-path {folder} --prompt "…"',
        ) from None
    except (OSError, ValueError, TypeError, ValidationError, RecursionError) as error:
        raise AdapterError(
            f"The adapter's configuration is broken: {error}", where=str(folder / CONFIG)
        ) from None
    info.check_template()
    if digest is not None and digest != _info_sha256(info):
        raise AdapterError(
            "The adapter's configuration was changed or damaged after it was written.",
            where=str(folder / CONFIG),
            run=f"remove its key {INFO_DIGEST!r} if the change is yours",
        )
    return info


def load_adapter(model: nn.Module, folder: Path, info: AdapterInfo, *, fingerprint: str) -> None:
    """Attach the adapter in `folder` to a freshly loaded base model.

    Args:
        fingerprint: Of the base that was loaded.

    Raises:
        AdapterError: the base is another one, or tensors are missing, left over or of another shape.
    """
    if fingerprint != info.fingerprint:
        raise AdapterError(
            f"{folder} was trained on {info.model.path}, and the base model given has other weights "
            f"({fingerprint[:19]}…, not {info.fingerprint[:19]}…).",
            run=f'python -m mlx_qlora.infer "…" --model {info.model.path} --adapter-path {folder}',
        )
    try:
        attach(model, info.lora, seed=0)
        tensors = read_tensors(folder / WEIGHTS)
        digest = read_metadata(folder / WEIGHTS).get(DIGEST)
    except MlxQloraError as error:
        raise AdapterError(
            f"The adapter does not load: {error.what}", where=error.where or str(folder)
        ) from None
    if digest is not None and digest != tensors_sha256(tensors):
        raise AdapterError(
            "The adapter was damaged after it was written (the checksum of its tensors differs).",
            where=str(folder / WEIGHTS),
            run=f"mlx-qlora train --resume --adapter-path {folder}   # writes it again from its checkpoints",
        )
    set_adapter_tensors(model, tensors, where=str(folder / WEIGHTS))


def check_quantization(info: AdapterInfo, quantization: QuantizationConfig) -> None:
    """Raise AdapterError where an adapter that makes up for its base's losses is to get another base.

    Args:
        quantization: How the base is to be stored.
    """
    if info.lora.init == "loftq" and quantization != info.quantization:
        changes = ", ".join(difference(info.quantization, quantization))
        raise AdapterError(
            "The adapter began with loftq: it makes up for what its own quantized base has lost, and makes "
            f"another one worse ({changes}).",
            where="lora.init",
            run='mlx-qlora infer "…" --adapter-path A   # without another quantization',
        )


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, mx.array], *, where: str) -> None:
    """Put trained tensors into a model that has their low-rank layers attached.

    Raises:
        AdapterError: names or shapes differ; all differences are listed.
    """
    expected = adapter_tensors(model)
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: not in the model" for name in tensors if name not in expected]
    problems += [
        f"{name}: {tuple(tensors[name].shape)}, not {tuple(array.shape)}"
        for name, array in expected.items()
        if name in tensors and tensors[name].shape != array.shape
    ]
    if problems:
        raise AdapterError(f"The adapter does not fit this model:\n{listed(problems)}", where=where)
    model.load_weights([(name, a.astype(mx.float32)) for name, a in tensors.items()], strict=False)
    evaluate_adapter(model)


def evaluate_adapter(model: nn.Module) -> None:
    """Compute whatever belongs to the low-rank layers and is still to be computed."""
    for _, module in model.named_modules():
        if isinstance(module, DoRALinear):  # one at a time: each unpacks its weight
            mx.eval(module.lengths.base_squares)
    mx.eval(adapter_tensors(model))


def _config_for_mlx_lm(tensors: Mapping[str, mx.array], info: AdapterInfo, num_layers: int) -> dict[str, Any]:
    paths = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in tensors))
    keys, count = _mlx_lm_keys(paths, num_layers)
    return {
        "fine_tune_type": "dora" if info.lora.variant == "dora" else "lora",
        "model": info.model.path,
        "num_layers": count,
        "lora_parameters": {
            "rank": info.lora.rank,
            "scale": lora_scale(info.lora.alpha, info.lora.rank, info.lora.variant),
            "dropout": info.lora.dropout,
            "keys": keys,
        },
        OURS: info.model_dump(mode="json"),
        INFO_DIGEST: _info_sha256(info),
    }


def _mlx_lm_keys(paths: list[str], num_layers: int) -> tuple[list[str], int]:
    """mlx-lm names layers within a block and counts blocks from the end; other choices need full paths."""
    within: dict[int, list[str]] = {}
    for path in paths:
        index = layer_index(path)
        if index is None:
            return paths, num_layers
        within.setdefault(index, []).append(path.split(f".{index}.", 1)[1])
    first = min(within)
    is_uniform = sorted(within) == list(range(first, num_layers)) and all(
        sorted(names) == sorted(within[first]) for names in within.values()
    )
    return (within[first], num_layers - first) if is_uniform else (paths, num_layers)
