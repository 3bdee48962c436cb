"""Tiny GGUF files of every architecture, written with gguf-py from real mlx-lm models of random weights.

Names and layouts are written out here once more, from llama.cpp's converter, and not taken from the importer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 320
HIDDEN, HEADS, KV_HEADS, LAYERS, WIDTH, CONTEXT = 64, 4, 2, 2, 96, 512
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.switch_mlp.gate_proj": "ffn_gate_exps",
    "block_sparse_moe.switch_mlp.up_proj": "ffn_up_exps",
    "block_sparse_moe.switch_mlp.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Kind:
    """An architecture: its name in GGUF, mlx-lm's configuration and metadata of its own."""

    arch: str
    config: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    rms: bool = True
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """Tensors that are no weights."""
    rewrite: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


def llama3_divisors(head_dim: int, base: float, scaling: dict[str, Any] = LLAMA3) -> np.ndarray:
    """As convert_hf_to_gguf.py computes them."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * base ** (i / head_dim)
        original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original / 1:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def _split_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    split: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if "_exps." in name:
            for expert, part in enumerate(array):
                split[name.replace("_exps.", f".{expert}.")] = part
        else:
            split[name] = array
    return split


def _fuse_qkv(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    fused = {name: array for name, array in tensors.items() if "attn_q" not in name}
    for name, array in tensors.items():
        if ".attn_q." in name:
            parts = [array, *(fused.pop(name.replace("attn_q", other)) for other in ("attn_k", "attn_v"))]
            fused[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return fused


def _flatten_shared_gate(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """llama.cpp's converter drops the axis of one row."""
    return {n: a.reshape(-1) if "ffn_gate_inp_shexp" in n else a for n, a in tensors.items()}


_MOE = {"expert_count": 4, "expert_used_count": 2}
_PARTIAL = {"rope.dimension_count": 8}
_LONG, _SHORT = np.linspace(1, 4, 8, dtype=np.float32), np.linspace(1, 1.5, 8, dtype=np.float32)
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_PHI = {
    "model_type": "phi",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}
KINDS = {
    "llama": Kind("llama", _LLAMA),
    "llama-tied": Kind("llama", {"model_type": "llama", "tie_word_embeddings": True}),
    "llama-biases": Kind("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama3": Kind(
        "llama",
        {**_LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
        extra={"rope_freqs.weight": llama3_divisors(HIDDEN // HEADS, 500000.0)},
    ),
    "llama-linear": Kind(
        "llama",
        {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": Kind("llama", {"model_type": "mistral", "tie_word_embeddings": False, "head_dim": 32}),
    "mixtral": Kind("llama", {**_MIXTRAL, "tie_word_embeddings": False}, _MOE),
    "mixtral-old": Kind("llama", {**_MIXTRAL, "tie_word_embeddings": False}, _MOE, rewrite=_split_experts),
    "qwen2": Kind("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen2-yarn": Kind(
        "qwen2",
        {
            "model_type": "qwen2",
            "tie_word_embeddings": True,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "qwen3": Kind("qwen3", {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32}),
    "qwen2moe": Kind(
        "qwen2moe",
        {
            **_EXPERTS,
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
        {**_MOE, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
        rewrite=_flatten_shared_gate,
    ),
    "qwen3moe": Kind(
        "qwen3moe",
        {
            **_EXPERTS,
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        {**_MOE, "expert_feed_forward_length": 32},
    ),
    "gemma": Kind("gemma", {"model_type": "gemma", "head_dim": 32}),
    "gemma2": Kind(
        "gemma2",
        {
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "attention.sliding_window": 64},
    ),
    "gemma3": Kind(
        "gemma3",
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
        },
        {"attention.sliding_window": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "phi2": Kind("phi2", _PHI, _PARTIAL, rms=False),
    "phi2-fused": Kind("phi2", _PHI, _PARTIAL, rms=False, rewrite=_fuse_qkv),
    "phi3": Kind("phi3", {"model_type": "phi3", "tie_word_embeddings": False}),
    "phi3-long": Kind(
        "phi3",
        {
            "model_type": "phi3",
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 128,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": _LONG.tolist(),
                "short_factor": _SHORT.tolist(),
            },
        },
        {"rope.scaling.original_context_length": 128},
        extra={"rope_factors_long.weight": _LONG, "rope_factors_short.weight": _SHORT},
    ),
}


def full_config(kind: str, **changes: Any) -> dict[str, Any]:
    """mlx-lm's configuration of `KINDS[kind]`."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        **KINDS[kind].config,
        **changes,
    }


def random_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """In float32; norms and biases are random too, so that no two can be swapped unseen."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        model.sanitize({})  # loses the head that a tied checkpoint does not have
    noisy = [(n, a + 0.1 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())]
    model.update(tree_unflatten(noisy))
    mx.eval(model.parameters())
    return model


def gguf_tensors(model: nn.Module, kind: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The model's weights by llama.cpp's names and in its layout."""
    own = KINDS[kind]
    names = GEMMA_NAMES if own.arch in ("gemma2", "gemma3") else NAMES
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        values = np.array(array)
        path, _, leaf = name.rpartition(".")
        if own.arch.startswith("gemma") and path.endswith("norm"):
            values = values + 1
        if own.arch == "llama" and path.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if path.endswith("q_proj") else "num_key_value_heads"]
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if path.startswith("model.layers."):
            _, _, layer, rest = path.split(".", 3)
            tensors[f"blk.{layer}.{names[rest]}.{leaf}"] = values
        else:
            tensors[f"{names[path]}.{leaf}"] = values
    return own.rewrite(tensors)


def write_model(
    path: Path,
    kind: str,
    *,
    types: dict[str, tuple[np.ndarray, Type]] | None = None,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
) -> nn.Module:
    """Write `KINDS[kind]` as float32, `types` instead where given (raw blocks); the float32 model."""
    config = config or full_config(kind)
    model = random_model(config, seed)
    tensors = gguf_tensors(model, kind, config)
    write_gguf(path, kind, config, tensors, types or {}, metadata or {})
    return model


def write_gguf(
    path: Path,
    kind: str,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    types: dict[str, tuple[np.ndarray, Type]],
    metadata: dict[str, Any],
) -> None:
    """One file with gguf-py's own writer."""
    own = KINDS[kind]
    writer = gguf.GGUFWriter(path, own.arch)
    common = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "rope.freq_base": config["rope_theta"],
        f"attention.layer_norm_{'rms_' if own.rms else ''}epsilon": 1e-5,
    }
    for key, value in {**common, **own.metadata}.items():
        _add(writer, f"{own.arch}.{key}", value)
    for key, value in {**vocabulary(), **metadata}.items():
        _add(writer, key, value)
    for name, array in {**tensors, **own.extra}.items():
        raw, type_ = types.get(name, (array, None))
        writer.add_tensor(name, raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def vocabulary() -> dict[str, Any]:
    """A SentencePiece vocabulary of `VOCAB` tokens: three specials, the bytes, letters and some words."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,?!"]
    words = ["▁t", "he", "▁the", "▁a", "in", "er"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(words))]
    scores = [
        *[0.0] * 259,
        *(-1000.0 - i for i in range(len(letters))),
        *(-float(i) for i in range(len(words))),
    ]
    missing = VOCAB - len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in range(missing))],
        "tokenizer.ggml.scores": [*scores, *[-5000.0] * missing],
        "tokenizer.ggml.token_type": [*types, *[5] * missing],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def random_blocks(shape: tuple[int, ...], type_: Type, seed: int = 0) -> np.ndarray:
    """Blocks of any bits, with scales such that weights are of order 0.1: uint8 of (…, row bytes)."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(seed)
    rows = int(np.prod(shape[:-1]))
    raw = rng.integers(0, 256, (rows * shape[-1] // block, num_bytes), dtype=np.uint8)
    at, dtype, size = _SCALES[type_]
    for offset in at:
        scale = (size * rng.uniform(0.5, 1.5, (len(raw), 1))).astype(dtype)
        raw[:, offset : offset + scale.itemsize] = scale.view(np.uint8)
    if type_ == Type.MXFP4:
        raw[:, 0] = rng.integers(120, 126, len(raw))
    if type_ == Type.NVFP4:
        raw[:, :4] = rng.integers(40, 56, (len(raw), 4))
    if type_ == Type.IQ1_M:  # its scale lies in the top four bits of four words, as 0x2000 here
        words = raw[:, 48:56].view("<u2")
        words &= 0x0FFF
        words[:, 3] |= 0x2000
    return raw.reshape(*shape[:-1], -1)


_SCALES: dict[Type, tuple[tuple[int, ...], str, float]] = {
    Type.Q4_0: ((0,), "<f2", 0.02),
    Type.Q4_1: ((0, 2), "<f2", 0.02),
    Type.Q5_0: ((0,), "<f2", 0.01),
    Type.Q5_1: ((0, 2), "<f2", 0.01),
    Type.Q8_0: ((0,), "<f2", 0.002),
    Type.Q2_K: ((80, 82), "<f2", 0.005),
    Type.Q3_K: ((108,), "<f2", 0.002),
    Type.Q4_K: ((0, 2), "<f2", 0.0005),
    Type.Q5_K: ((0, 2), "<f2", 0.0002),
    Type.Q6_K: ((208,), "<f2", 0.00005),
    Type.Q8_K: ((0,), "<f4", 0.002),
    Type.IQ2_XXS: ((0,), "<f2", 0.002),
    Type.IQ2_XS: ((0,), "<f2", 0.002),
    Type.IQ2_S: ((0,), "<f2", 0.002),
    Type.IQ3_XXS: ((0,), "<f2", 0.002),
    Type.IQ3_S: ((0,), "<f2", 0.002),
    Type.IQ1_S: ((0,), "<f2", 0.01),
    Type.IQ1_M: ((), "<f2", 0.0),
    Type.IQ4_NL: ((0,), "<f2", 0.001),
    Type.IQ4_XS: ((0,), "<f2", 0.0001),
    Type.TQ1_0: ((52,), "<f2", 0.1),
    Type.TQ2_0: ((64,), "<f2", 0.1),
    Type.MXFP4: ((), "<f2", 0.0),
    Type.NVFP4: ((), "<f2", 0.0),
}
BLOCK_TYPES = list(_SCALES)


def reference_values(raw: np.ndarray, type_: Type) -> np.ndarray:
    """gguf-py's own dequantization; it has none of Q8_K, a float32 scale and 256 signed bytes per block."""
    if type_ != Type.Q8_K:
        return gguf.dequantize(raw, type_)
    blocks = raw.reshape(-1, 292)
    values = blocks[:, :4].copy().view("<f4") * blocks[:, 4:260].view(np.int8)
    return values.reshape(*raw.shape[:-1], -1)
