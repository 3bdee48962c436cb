"""Write a folder with NF4 layers as transformers and bitsandbytes do, so that they read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ModelError, StorageError
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.schemes import NESTED_BLOCK
from mlx_qlora.storage import new_folder, write_json, write_tensors
from mlx_qlora.weights.bitsandbytes import FLOATS, STATE
from mlx_qlora.weights.codebook import has_codebooks
from mlx_qlora.weights.output_folder import copy_small_files
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.shards import INDEX, lazy_tensors, read_checkpoint
from mlx_qlora.weights.source import ModelSource
from mlx_qlora.weights.stream import SHARD_BYTES

Tensors = dict[str, mx.array]


def export_bitsandbytes(source: ModelSource, output: Path, *, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write the model in `source`, a folder of ours with NF4 layers, as bitsandbytes stores it.

    Linear layers in NF4 keep their codes and scales to the bit. What bitsandbytes does not quantize, the
    embedding and the output head, and layers in other formats are unpacked to the model's 16 bits. Tensors
    keep mlx-lm's names, which for architectures without stacked experts are transformers'.

    Returns:
        The linear layers that were unpacked, or never were quantized.

    Raises:
        ModelError: the folder has no NF4 layers.
        StorageError: the disk is full, or `output` is there already.
    """
    if not has_codebooks(source.config):
        raise ModelError(
            "There are no NF4 layers here to write for bitsandbytes.",
            where=str(source.folder),
            run=f"mlx-qlora quantize {source.name} --scheme nf4-dq --output DIR",
        )
    if output.exists():
        raise StorageError("There is something here already.", where=str(output), run="choose another folder")
    files = {info.file for info in read_checkpoint(source.folder).values()}
    stored: Tensors = {name: array for file in sorted(files) for name, array in lazy_tensors(file).items()}
    modules = dict(skeleton(source).named_modules())
    dtype = _dtype(source.config, stored)
    layers = {p: m for p, m in modules.items() if type(m) is nn.Linear}
    in_four_bits = [p for p in layers if f"{p}.absmax" in stored and not _is_head(p)]
    kept = [path for path in layers if path not in in_four_bits]
    groups = list(_groups(stored, source.config, set(in_four_bits), dtype))
    is_double = any(f"{path}.offset" in stored for path in in_four_bits)
    del stored
    with new_folder(output) as folder:
        _write_shards(folder, groups, shard_bytes)
        write_json(folder / "config.json", _config(source.config, kept, dtype, is_double=is_double))
        copy_small_files(source.folder, folder)
    return kept


def _is_head(path: str) -> bool:
    """Outside of the blocks transformers quantizes no linear layer."""
    return not any(part.isdigit() for part in path.split("."))


def _dtype(config: Mapping[str, Any], stored: Tensors) -> mx.Dtype:
    """Of the model before it was quantized."""
    named = FLOATS.get(str(config.get("torch_dtype") or config.get("dtype")))
    return named or next((a.dtype for n, a in stored.items() if n.endswith("norm.weight")), mx.bfloat16)


def _groups(
    stored: Tensors, config: Mapping[str, Any], in_four_bits: set[str], dtype: mx.Dtype
) -> Iterator[Tensors]:
    """What is written of each layer, not computed yet."""
    quantization = config["quantization"]
    by_path: dict[str, Tensors] = {}
    for name, array in sorted(stored.items()):
        path, _, leaf = name.rpartition(".")
        by_path.setdefault(path, {})[leaf] = array
    for path, parts in by_path.items():
        own = quantization.get(path)
        settings = own if isinstance(own, Mapping) else quantization
        quantized = {leaf: parts.pop(leaf) for leaf in _LEAVES if leaf in parts and _is_quantized(parts)}
        plain = {f"{path}.{leaf}": array for leaf, array in parts.items()}
        if path in in_four_bits:
            plain |= _four_bits(path, quantized, settings["group_size"], dtype)
        elif quantized:
            plain[f"{path}.weight"] = _dense(quantized, settings, dtype)
        yield plain


_LEAVES = ("absmax", "nested_absmax", "offset", "scales", "biases", "weight")
"""The weight last: the others say that it is quantized."""


def _is_quantized(parts: Tensors) -> bool:
    return parts["weight"].dtype == mx.uint32 if "weight" in parts else False


def _four_bits(path: str, parts: Tensors, block: int, dtype: mx.Dtype) -> Tensors:
    words = parts["weight"]
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "shape": [words.shape[0], 8 * words.shape[1]],
    }
    written = {
        "": words.view(mx.uint8).reshape(-1, 1),
        ".absmax": parts["absmax"].reshape(-1),
        ".quant_map": mx.array(nf4.NF4),
    }
    if "offset" in parts:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = parts["offset"].item()
        written |= {".nested_absmax": parts["nested_absmax"], ".nested_quant_map": nf4.dynamic_map()}
    written[f"{STATE}nf4"] = mx.array(np.frombuffer(json.dumps(state).encode(), np.uint8))
    return {f"{path}.weight{leaf}": array for leaf, array in written.items()}


def _dense(parts: Tensors, settings: Mapping[str, Any], dtype: mx.Dtype) -> mx.array:
    if "absmax" in parts:
        absmax = nf4.absmax_of(parts, parts["absmax"], slice(None))
        return nf4.unpack_words(parts["weight"], absmax, settings["mode"], dtype)
    how = {
        "group_size": settings["group_size"],
        "bits": settings["bits"],
        "mode": settings.get("mode", "affine"),
    }
    return mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **how, dtype=dtype)


def _write_shards(folder: Path, groups: list[Tensors], shard_bytes: int) -> None:
    """Fill files up to a size; a layer's tensors stay together."""
    shards: list[list[Tensors]] = [[]]
    size = 0
    while groups:
        group = groups.pop()
        group_bytes = sum(array.nbytes for array in group.values())
        if shards[-1] and size + group_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group_bytes
    weight_map: dict[str, str] = {}
    total, count = 0, len(shards)
    for index in range(count):
        name = f"model-{index + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        tensors = {key: array for group in shards.pop(0) for key, array in group.items()}
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(array.nbytes for array in tensors.values())
        write_tensors(folder / name, tensors, {"format": "pt"})
    if count > 1:
        index_of = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index_of)


def _config(
    config: Mapping[str, Any], kept: list[str], dtype: mx.Dtype, *, is_double: bool
) -> dict[str, Any]:
    """The model's config.json with the settings transformers reads."""
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("mlx.core."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept or None,
    }
    return {**{k: v for k, v in config.items() if k != "quantization"}, "quantization_config": settings}
