"""Tiny checkpoints of several architectures, as Hugging Face lays them out."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-tied": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {**BASE, "model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {**BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "gemma2": {**BASE, "model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 64},
    "qwen3_moe": {
        **BASE,
        **EXPERTS,
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        **BASE,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def make_checkpoint(
    folder: Path,
    architecture: str,
    tokenizer_from: Path,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    num_shards: int = 1,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A random model of `CONFIGS[architecture]`, in `num_shards` files, with a tokenizer."""
    from mlx_lm.utils import _get_classes

    full = {**CONFIGS[architecture], **config}
    folder.mkdir(parents=True)
    mx.random.seed(seed)
    model_class, args_class = _get_classes(full)
    parameters = dict(tree_flatten(model_class(args_class.from_dict(full)).parameters()))
    # Biases and norms start as zeros and ones; noise shows when two are swapped.
    tensors = {n: (a + 0.1 * mx.random.normal(a.shape)).astype(dtype) for n, a in parameters.items()}
    save_sharded(folder, as_published(tensors), num_shards)
    (folder / "config.json").write_text(json.dumps(full))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_from / name, folder / name)
    return folder


def as_published(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """One tensor per expert, as checkpoints on the hub have them; mlx-lm's sanitize stacks them."""
    published: dict[str, mx.array] = {}
    for name, array in tensors.items():
        if "switch_mlp" not in name:
            published[name] = array
            continue
        block, _, leaf = name.partition(".switch_mlp.")
        projection, _, rest = leaf.partition(".")
        if "block_sparse_moe" in block:
            projection = _MIXTRAL_NAMES[projection]
        for expert in range(array.shape[0]):
            published[f"{block}.experts.{expert}.{projection}.{rest}"] = array[expert]
    return published


def save_sharded(folder: Path, tensors: dict[str, mx.array], num_shards: int) -> None:
    """`model.safetensors`, or several files with their index."""
    if num_shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::num_shards]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    """All tensors of a model folder."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(file))
    return tensors


def raw(array: mx.array) -> bytes:
    """The array's bytes."""
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def write_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header, however wrong."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path
