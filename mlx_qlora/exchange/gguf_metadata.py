"""config.json as GGUF's metadata and rotary tensors, architecture by architecture.

Keys are llama.cpp's (ggml-org/ggml, docs/gguf.md, and gguf-py's constants). What llama.cpp would compute
otherwise than mlx-lm is refused by name; where the two differ only for long texts, a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_qlora.errors import ModelError, listed
from mlx_qlora.exchange.gguf_layout import Layout
from mlx_qlora.weights.gguf_config import _GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS, _query_scalar
from mlx_qlora.weights.gguf_rope import _HIGH, _LOW, _ROPE_FACTORS, _ROPE_FREQS, _SCALED

_YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
"""What llama.cpp computes with where a file says nothing."""

_LLAMA3_CONTEXT, _YARN_CONTEXT = 8192, 4096
"""mlx-lm's ``original_max_position_embeddings`` where config.json gives none."""

_DEFAULT_CONTEXT = {"gemma": 8192, "gemma2": 8192, "qwen2moe": 32768}


@dataclass
class Description:
    """What a file says about its model beside the weights."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """By full key."""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """Rotary factors, float32."""
    notes: list[str] = field(default_factory=list)
    """What llama.cpp does otherwise, for some texts."""
    problems: list[str] = field(default_factory=list)
    """What llama.cpp cannot do."""


def describe(layout: Layout, where: str) -> Description:
    """Metadata and rotary tensors of a model.

    Raises:
        ModelError: llama.cpp would compute something else; all reasons are listed.
    """
    said, own = Description(), {**_common(layout), **_norms(layout)}
    args, arch = layout.args, layout.architecture
    if getattr(args, "rope_traditional", False) and arch != "llama":
        said.problems.append("rope_traditional: llama.cpp turns the halves of a head, not neighbours")
    own |= _experts(layout, said) | _gemma(layout, said) | _rope(layout, said)
    if arch.startswith("phi"):
        own["rope.dimension_count"] = int(layout.head_dim * args.partial_rotary_factor)
    if arch == "phi3":
        own["attention.sliding_window"] = int(layout.config.get("sliding_window") or 0)
        own["rope.scaling.original_context_length"] = int(args.original_max_position_embeddings)
    if arch == "llama" and "sliding_attention" in (getattr(args, "layer_types", None) or ()):
        said.notes.append(
            f"llama.cpp's llama has no sliding window: beyond {args.sliding_window} tokens it attends to more"
        )
    if said.problems:
        raise ModelError(
            f"llama.cpp cannot run this {arch} model as it is:\n{listed(said.problems)}", where=where
        )
    said.metadata |= {f"{arch}.{key}": value for key, value in own.items()}
    return said


def _common(layout: Layout) -> dict[str, Any]:
    args, config = layout.args, layout.config
    fallback = config.get("max_position_embeddings") or _DEFAULT_CONTEXT.get(layout.architecture, 2048)
    return {
        "block_count": int(args.num_hidden_layers),
        "context_length": int(getattr(args, "max_position_embeddings", None) or fallback),
        "embedding_length": int(args.hidden_size),
        "feed_forward_length": int(args.intermediate_size),
        "attention.head_count": int(args.num_attention_heads),
        "attention.head_count_kv": int(args.num_key_value_heads),
        "attention.key_length": layout.head_dim,
        "attention.value_length": layout.head_dim,
        "vocab_size": int(args.vocab_size),
        "rope.dimension_count": layout.head_dim,
        "rope.freq_base": float(args.rope_theta),
    }


def _norms(layout: Layout) -> dict[str, Any]:
    if layout.architecture == "phi2":
        return {"attention.layer_norm_epsilon": float(layout.args.layer_norm_eps)}
    return {"attention.layer_norm_rms_epsilon": float(layout.args.rms_norm_eps)}


def _experts(layout: Layout, said: Description) -> dict[str, Any]:
    args = layout.args
    count = getattr(args, "num_local_experts", None) or getattr(args, "num_experts", None)
    if not count:
        return {}
    own = {"expert_count": int(count), "expert_used_count": int(args.num_experts_per_tok)}
    if hasattr(args, "moe_intermediate_size"):
        own["expert_feed_forward_length"] = int(args.moe_intermediate_size)
    if hasattr(args, "shared_expert_intermediate_size"):
        own["expert_shared_feed_forward_length"] = int(args.shared_expert_intermediate_size)
    if getattr(args, "decoder_sparse_step", 1) != 1 or getattr(args, "mlp_only_layers", None):
        said.problems.append("some layers have no experts (decoder_sparse_step, mlp_only_layers)")
    if not getattr(args, "norm_topk_prob", True):
        said.problems.append("norm_topk_prob is false: llama.cpp makes the chosen experts' shares sum to one")
    return own


def _gemma(layout: Layout, said: Description) -> dict[str, Any]:
    args, config, own = layout.args, layout.config, dict[str, Any]()
    if layout.architecture == "gemma2":
        own["attn_logit_softcapping"] = float(args.attn_logit_softcapping)
        own["final_logit_softcapping"] = float(args.final_logit_softcapping)
        own["attention.sliding_window"] = int(config.get("sliding_window") or 4096)
        said.notes.append(
            "mlx-lm attends to all tokens in every layer, llama.cpp in every second one to the last "
            f"{own['attention.sliding_window']}"
        )
    if layout.architecture == "gemma3":
        own["attention.sliding_window"] = int(args.sliding_window)
        own["attention.sliding_window_pattern"] = int(args.sliding_window_pattern)
        own["rope.freq_base_swa"] = float(args.rope_local_base_freq)
    if own:
        layers = _GEMMA2_27B_LAYERS if layout.architecture == "gemma2" else _GEMMA3_27B_LAYERS
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
        scalar = _query_scalar({key: getattr(args, key) for key in sizes}, layers)
        if args.query_pre_attn_scalar != scalar:
            said.problems.append(
                f"query_pre_attn_scalar is {args.query_pre_attn_scalar}; llama.cpp takes {scalar}"
            )
    return own


def _rope(layout: Layout, said: Description) -> dict[str, Any]:
    """``rope_scaling`` as keys and tensors; what mlx-lm's model would leave out is refused, as on import."""
    args = layout.args
    scaling = getattr(args, "rope_scaling", None)
    if not isinstance(scaling, Mapping):
        return {}
    kind = str(scaling.get("type") or scaling.get("rope_type") or "default")
    kind = "longrope" if kind == "su" else kind
    if kind == "default":
        return {}
    if kind not in _SCALED.get("llama" if args.model_type == "mistral" else args.model_type, ()):
        said.problems.append(f"rope_scaling {kind!r} has no counterpart")
        return {}
    if kind == "llama3":
        said.tensors[_ROPE_FREQS] = llama3_divisors(layout.head_dim, args.rope_theta, scaling)
        return {}
    if kind == "longrope":
        return _longrope(layout, scaling, said)
    own = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        odd = {key: scaling[key] for key, usual in _YARN.items() if scaling.get(key, usual) != usual}
        if odd:
            said.problems.append(f"rope_scaling {odd}: llama.cpp takes {_YARN}")
        original = scaling.get("original_max_position_embeddings", _YARN_CONTEXT)
        own["rope.scaling.original_context_length"] = int(original)
    return own


def llama3_divisors(head_dim: int, base: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3.1's scaling divides each pair's angle by: float32 of (head_dim / 2,).

    Source: ``rope_type: llama3`` as Llama 3.1 defines it; rope_freqs.weight holds these numbers.
    """
    low, high = scaling.get("low_freq_factor", _LOW), scaling.get("high_freq_factor", _HIGH)
    original = scaling.get("original_max_position_embeddings", _LLAMA3_CONTEXT)
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _longrope(layout: Layout, scaling: Mapping[str, Any], said: Description) -> dict[str, Any]:
    args = layout.args
    pairs = int(layout.head_dim * args.partial_rotary_factor) // 2
    original = args.original_max_position_embeddings
    for name, key in zip(_ROPE_FACTORS, ("long_factor", "short_factor"), strict=True):
        factors = np.asarray(scaling[key], np.float32).reshape(-1)
        if factors.size != pairs:
            said.problems.append(f"rope_scaling.{key} has {factors.size} numbers, not {pairs}")
        said.tensors[name] = factors
    said.notes.append(
        f"in a context of at most {original} tokens llama.cpp takes the short factors, mlx-lm always the long"
    )
    stretch = args.max_position_embeddings / original
    factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {"rope.scaling.attn_factor": factor}
