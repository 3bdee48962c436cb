"""Adapters from PEFT and to PEFT, number for number.

Both hold A, B and, for DoRA, the row lengths m. PEFT stores A as (rank, in) and B as (out, rank) under its
own names; here and in mlx-lm they are (in, rank) and (rank, out). Nothing is computed, nothing is rounded.

Source: peft 0.21; the layouts were compared with its saved files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.dataset import ensure_chat_template
from mlx_qlora.errors import AdapterError, MlxQloraError, StorageError, listed
from mlx_qlora.exchange.peft_checks import (
    check_base,
    check_finite,
    check_ours,
    check_tensors,
    layer_paths,
    without_copies,
)
from mlx_qlora.exchange.peft_config import PEFT_CONFIG, PeftConfig, peft_config, read_peft_config
from mlx_qlora.exchange.peft_tensors import (
    PEFT_WEIGHTS,
    base_shapes,
    our_name,
    peft_name,
    turned,
)
from mlx_qlora.lora.adapter import WEIGHTS, AdapterInfo, read_adapter_info, save_adapter, text_sha256
from mlx_qlora.lora.attach import layer_index, target_paths
from mlx_qlora.storage import new_folder, write_json, write_tensors, write_text
from mlx_qlora.weights.loader import source_fingerprint
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.shards import TensorInfo, read_header, read_tensors
from mlx_qlora.weights.source import ModelSource, resolve_model
from mlx_qlora.weights.tokenizer import read_tokenizer

TEMPLATE = "chat_template.jinja"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Exchanged:
    """An adapter that was brought over."""

    path: Path
    base_model: str
    """Hub id or folder."""
    lora: LoraConfig
    num_adapted: int
    """Layers that have an update."""
    num_tensors: int
    bytes: int
    """Of the tensors."""
    notes: tuple[str, ...]
    """What is worth knowing of what was and was not taken along."""


def import_peft(
    folder: Path,
    output: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    quantization: QuantizationConfig | None = None,
    trust_remote_code: bool = False,
) -> Exchanged:
    """Make an adapter of ours, which mlx-lm loads too, of a PEFT adapter.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
        output: Folder of the new adapter; appears when it is whole.
        model: Hub id or folder of its base model; None takes the hub id that the adapter names.
        quantization: How the base is to be stored where the adapter is used; None as it is.

    Raises:
        AdapterError: it is no PEFT adapter, does not fit the base, or is something that has no like here;
            every reason is listed.
        MlxQloraError: the base model cannot be found or read.
        StorageError: there is something at `output` already, or it cannot be written.
    """
    _check_output(output)
    config = read_peft_config(folder)
    if refusals := config.refusals():
        raise AdapterError(
            f"This PEFT adapter has what an adapter here cannot have:\n{listed(refusals)}",
            where=str(folder / PEFT_CONFIG),
            run="model.merge_and_unload() in PEFT, save_pretrained, then: mlx-qlora quantize FOLDER …",
        )
    infos = _read_infos(folder)
    revision = revision if model is not None else config.revision
    source = resolve_model(model or _named_base(config, folder), revision, trust_remote_code)
    module = skeleton(source)
    shapes = base_shapes(module)
    infos, notes = without_copies(infos, source)
    check_tensors(infos, config, shapes, where=str(folder / PEFT_WEIGHTS))
    stored = {name: array for name, array in read_tensors(folder / PEFT_WEIGHTS).items() if name in infos}
    tensors = {ours: turned(ours, array) for name, array in stored.items() if (ours := our_name(name))}
    check_finite(tensors, folder)
    lora = _lora_config(config, module, sorted(layer_paths(tensors)))
    template = _template(folder, source)
    info = AdapterInfo(
        model=ModelConfig(path=source.name, revision=source.revision),
        quantization=quantization or QuantizationConfig(scheme="none"),
        lora=lora,
        fingerprint=source_fingerprint(source.folder),
        chat_template=template,
        chat_template_sha256=text_sha256(template),
    )
    tensors = {name: tensors[name] for name in sorted(tensors)}
    with new_folder(output) as partial:
        save_adapter(partial, tensors, info, shapes.num_layers)
    return _exchanged(output, source.name, lora, tensors, notes)


def export_peft(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Exchanged:
    """Make a PEFT adapter, which ``PeftModel.from_pretrained`` loads, of an adapter of ours.

    Args:
        adapter: Its folder.
        output: Folder of the PEFT adapter; appears when it is whole.
        model: The base that PEFT shall put it on; None is the adapter's own.
        force: Go on although the weights of `model` are not those the adapter was trained on.

    Raises:
        AdapterError: the adapter is broken, does not fit the base, or is something that PEFT has not.
        MlxQloraError: the base model cannot be found.
        StorageError: there is something at `output` already, or it cannot be written.
    """
    _check_output(output)
    info = read_adapter_info(adapter)
    if info.lora.init == "loftq":
        raise AdapterError(
            "lora.init = 'loftq': the adapter makes up for what its quantized base has lost; PEFT would put "
            "it on a base that has lost nothing.",
            where=str(adapter),
            run=f"mlx-qlora fuse --adapter-path {adapter} --output DIR   # base and adapter as one model",
        )
    name, revision = (model, revision) if model is not None else (info.model.path, info.model.revision)
    if name is None:
        raise AdapterError(
            "The adapter does not say which base model it belongs to.",
            where=str(adapter),
            run=f"mlx-qlora export-peft {adapter} --output {output} --model OWNER/NAME",
        )
    source = resolve_model(name, revision, trust_remote_code, needs_weights=False)
    check_base(source, info, adapter, output, force=force)
    shapes = base_shapes(skeleton(source))
    ours = read_tensors(adapter / WEIGHTS)
    check_ours(ours, info, source, shapes, where=str(adapter / WEIGHTS))
    check_finite(ours, adapter)
    tensors = {peft_name(name, shapes): turned(name, array) for name, array in ours.items()}
    tree = peft_config(info.lora, source.name, source.revision, sorted(layer_paths(ours)), shapes.paths)
    with new_folder(output) as partial:
        write_tensors(partial / PEFT_WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"})
        write_json(partial / PEFT_CONFIG, tree)
        write_text(partial / TEMPLATE, info.chat_template)
    notes = ["the system prompt stays here; PEFT has no place for it"] if info.system_prompt else []
    return _exchanged(output, source.name, info.lora, tensors, notes)


def _read_infos(folder: Path) -> dict[str, TensorInfo]:
    path = folder / PEFT_WEIGHTS
    pickled = folder / "adapter_model.bin"
    if not path.is_file() and pickled.is_file():
        raise AdapterError(
            "The weights are a pickle, which can run any code when it is read; only safetensors are.",
            where=str(pickled),
            run='python -c "import torch, safetensors.torch as s; '
            "s.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\""
            "   # there, if you trust who made it",
        )
    try:
        return read_header(path)
    except MlxQloraError as error:
        raise AdapterError(f"The PEFT adapter does not load: {error.what}", where=error.where) from None


def _named_base(config: PeftConfig, folder: Path) -> str:
    """The hub id an adapter names; a path of the machine it was made on is not followed."""
    name = config.base_model_name_or_path
    if name is not None and _HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    said = f"names {name!r}, which is no hub id" if name else "does not name its base model"
    raise AdapterError(
        f"The adapter {said}.",
        where=str(folder / PEFT_CONFIG),
        run=f"mlx-qlora import-peft {folder} --output A --model M",
    )


def _lora_config(config: PeftConfig, model: Any, paths: list[str]) -> LoraConfig:
    """Short names and a count of layers where they mean exactly `paths`, else the paths themselves."""
    own: dict[str, Any] = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "variant": config.variant,
    }
    names = tuple(sorted({path.rpartition(".")[2] for path in paths}))
    blocks = [index for path in paths if (index := layer_index(path)) is not None]
    last = len(model.layers) - min(blocks) if blocks else -1
    for num_layers in (-1, last):
        short = LoraConfig(target_modules=names, num_layers=num_layers, **own)
        if set(target_paths(model, short)) == set(paths):
            return short
    return LoraConfig(target_modules=tuple(paths), **own)


def _template(folder: Path, source: ModelSource) -> str:
    """The chat template saved with the adapter; else the base's, or the documented one where it has none."""
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"The chat template cannot be read: {error}", where=str(path)) from None
    return ensure_chat_template(read_tokenizer(source.folder))


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StorageError(
            "There is something else here already; nothing was touched.",
            where=str(output),
            run="choose another --output, or remove this one",
        )


def _exchanged(
    path: Path, base: str, lora: LoraConfig, tensors: Mapping[str, mx.array], notes: list[str]
) -> Exchanged:
    adapted = {re.sub(r"\.(lora_|m$).*", "", name) for name in tensors}
    num_bytes = sum(array.nbytes for array in tensors.values())
    return Exchanged(path, base, lora, len(adapted), len(tensors), num_bytes, tuple(notes))
