"""config.json from a GGUF file's metadata, architecture by architecture.

Keys are llama.cpp's (ggml-org/ggml, docs/gguf.md, and gguf-py's constants). A value that a file does not say
is the one llama.cpp takes for that architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_file import GgufFile
from mlx_qlora.weights.gguf_metadata import Metadata, special_token
from mlx_qlora.weights.gguf_rope import rope_scaling

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def config_of(file: GgufFile) -> dict[str, Any]:
    """The config.json that mlx-lm builds the same model from.

    Raises:
        ModelError: an architecture we do not read, only a vocabulary, or impossible metadata.
    """
    meta = Metadata(file)
    specific = _ARCHITECTURES.get(meta.architecture or "")
    if specific is None:
        raise ModelError(
            f"GGUF files of the architecture {str(meta.architecture)[:80]!r} cannot be imported; "
            f"these can: {', '.join(_ARCHITECTURES)}.",
            where=str(file.path),
            run="mlx-qlora quantize OWNER/NAME …   # the original model, from its safetensors",
        )
    if isinstance(parts := file.metadata.get("split.count"), int) and parts > 1:
        raise ModelError(
            f"This file is one of {parts} parts of a model.",
            where=str(file.path),
            run="llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf   # llama.cpp's; then import the whole",
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelError("The file holds no model: there is no token_embd.weight.", where=str(file.path))
    if meta.integer("block_count") > len(file.tensors):
        raise ModelError("There are fewer tensors than layers.", where=str(file.path))
    config = _common(meta) | _special_tokens(meta)
    config |= specific(meta, config)
    turned = meta.integer("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"] and "partial_rotary_factor" not in config:
        raise ModelError(
            f"Only {turned} of {config['head_dim']} numbers per head are rotated, "
            f"which mlx-lm's {config['model_type']} model cannot.",
            where=str(file.path),
        )
    if scaling := rope_scaling(meta, config):
        config["rope_scaling"] = scaling
    return config


def _common(meta: Metadata) -> dict[str, Any]:
    heads = max(1, meta.integer("attention.head_count", most=2**16))
    hidden = meta.integer("embedding_length", most=2**24)
    return {
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length", 0, most=2**24),
        "num_hidden_layers": meta.integer("block_count", most=2**16),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, meta.integer("attention.head_count_kv", heads, most=2**16)),
        "head_dim": meta.integer("attention.key_length", hidden // heads, most=2**16),
        "vocab_size": meta.file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": meta.integer("context_length", 2048),
        "rope_theta": meta.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in meta.file.tensors,
    }


def _special_tokens(meta: Metadata) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    ends = [special_token(meta.file, name) for name in ("eos", "eot", "eom")]
    ids["eos_token_id"] = sorted({token for token in ends if token is not None}) or None
    ids["bos_token_id"] = special_token(meta.file, "bos")
    ids["pad_token_id"] = special_token(meta.file, "padding")
    return {key: value for key, value in ids.items() if value is not None}


def _rms(meta: Metadata) -> dict[str, Any]:
    return {"rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon")}


def _llama(meta: Metadata, _config: dict[str, Any]) -> dict[str, Any]:
    if experts := meta.integer("expert_count", 0, most=2**16):
        return _rms(meta) | {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": meta.integer("expert_used_count", most=experts),
        }
    return _rms(meta) | {
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in meta.file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in meta.file.tensors,
    }


def _qwen2(meta: Metadata, _config: dict[str, Any]) -> dict[str, Any]:
    return _rms(meta) | {"model_type": "qwen2"}


def _qwen3(meta: Metadata, _config: dict[str, Any]) -> dict[str, Any]:
    return _rms(meta) | {"model_type": "qwen3"}


def _experts(meta: Metadata) -> dict[str, Any]:
    experts = meta.integer("expert_count", most=2**16)
    return {
        "num_experts": experts,
        "num_experts_per_tok": meta.integer("expert_used_count", most=experts),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length", _expert_width(meta), most=2**24),
    }


def _expert_width(meta: Metadata) -> int | None:
    experts = meta.file.tensors.get("blk.0.ffn_up_exps.weight")
    return experts.shape[-2] if experts is not None and len(experts.shape) > 1 else None


def _qwen2_moe(meta: Metadata, _config: dict[str, Any]) -> dict[str, Any]:
    shared = meta.file.tensors.get("blk.0.ffn_up_shexp.weight")
    width = shared.shape[0] if shared is not None else None
    return (
        _rms(meta)
        | _experts(meta)
        | {
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": meta.integer("expert_shared_feed_forward_length", width),
        }
    )


def _qwen3_moe(meta: Metadata, _config: dict[str, Any]) -> dict[str, Any]:
    own = {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return _rms(meta) | _experts(meta) | own


def _gemma(meta: Metadata, _config: dict[str, Any]) -> dict[str, Any]:
    return _rms(meta) | {"model_type": "gemma"}


def _gemma2(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return _rms(meta) | {
        "model_type": "gemma2",
        "attn_logit_softcapping": meta.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.real("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA2_27B_LAYERS),
        "sliding_window": meta.integer("attention.sliding_window", 4096),
    }


def _gemma3(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return _rms(meta) | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA3_27B_LAYERS),
        "rope_theta": meta.real("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": meta.real("rope.freq_base_swa", 10_000.0),
        "sliding_window": meta.integer("attention.sliding_window", 1024),
        "sliding_window_pattern": max(1, meta.integer("attention.sliding_window_pattern", 6)),
    }


def _query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """No key says it: 27B models divide by the width per head, the others by the head's own."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi2(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return _partial_rotary(meta, config) | {
        "model_type": "phi",
        "layer_norm_eps": meta.real("attention.layer_norm_epsilon"),
    }


def _phi3(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    original = meta.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    own = {"model_type": "phi3", "original_max_position_embeddings": original}
    return _rms(meta) | _partial_rotary(meta, config) | own


def _partial_rotary(meta: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    width = max(1, config["head_dim"])
    return {"partial_rotary_factor": meta.integer("rope.dimension_count", width, most=width) / width}


_ARCHITECTURES: dict[str, Callable[[Metadata, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi2": _phi2,
    "phi3": _phi3,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
}
