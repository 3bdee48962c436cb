"""How a GGUF file scales positions, as config.json says it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf_metadata import Metadata
from mlx_qlora.weights.gguf_tensors import dequantize

_ROPE_FREQS = "rope_freqs.weight"
_ROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
ROPE_TENSORS = (_ROPE_FREQS, *_ROPE_FACTORS)
"""Tensors that become part of config.json."""

_LOW, _HIGH = 1.0, 4.0
"""``low_freq_factor`` and ``high_freq_factor`` of every Llama 3."""

_SCALED = {
    "llama": {"linear", "yarn", "llama3"},
    "qwen2": {"linear", "yarn"},
    "qwen3": {"linear", "yarn"},
    "gemma3_text": {"linear"},
    "phi3": {"linear", "longrope"},
}
"""What mlx-lm's model of each type really applies; elsewhere it would be ignored without a word."""


def rope_scaling(meta: Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says under ``rope_scaling``; None when positions are as they are.

    Raises:
        ModelError: a scaling that mlx-lm's model would leave out.
    """
    scaling = _scaling_said(meta, config)
    if scaling and scaling["type"] not in _SCALED.get(config["model_type"], ()):
        raise ModelError(
            f"The file scales positions by {scaling['type'][:40]!r}; mlx-lm's {config['model_type']} cannot.",
            where=str(meta.file.path),
        )
    return scaling


def _scaling_said(meta: Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    if _ROPE_FREQS in meta.file.tensors:
        return _llama3_scaling(meta, config, _vector(meta, _ROPE_FREQS))
    if all(name in meta.file.tensors for name in _ROPE_FACTORS):
        long, short = (_vector(meta, name).tolist() for name in _ROPE_FACTORS)
        return {"type": "longrope", "long_factor": long, "short_factor": short}
    kind = meta.text(f"{meta.architecture}.rope.scaling.type")
    factor = meta.real("rope.scaling.factor", meta.real("rope.scale_linear", 1.0))
    if kind == "none" or (kind in (None, "linear") and factor in (0.0, 1.0)):
        return None
    scaling: dict[str, Any] = {"type": kind or "linear", "factor": factor}
    if meta.has("rope.scaling.original_context_length"):
        original = meta.integer("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _vector(meta: Metadata, name: str) -> np.ndarray:
    tensor = meta.file.tensors[name]
    return dequantize(tensor.read(0, tensor.rows), tensor.type).reshape(-1)


def _llama3_scaling(meta: Metadata, config: dict[str, Any], divisors: np.ndarray) -> dict[str, Any] | None:
    """The settings that give these divisors; a GGUF file holds only the divisors themselves.

    Source: ``rope_type: llama3`` as Llama 3.1 defines it.
    """
    if np.allclose(divisors, 1.0, rtol=1e-5):
        return None
    width = meta.integer("rope.dimension_count", config["head_dim"], most=2**16)
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, width, 2) / max(width, 1))
    is_scaling = wavelengths.shape == divisors.shape and np.isfinite(divisors).all() and divisors.min() > 0.99
    for original in (2**power for power in range(10, 21)) if is_scaling else ():
        smooth = np.clip((original / wavelengths - _LOW) / (_HIGH - _LOW), 0, 1)
        most = int(divisors.argmax())
        left = 1 / float(divisors[most]) - smooth[most]  # 1 / divisor = (1 - smooth) / factor + smooth
        if left <= 0:
            continue
        factor = float(np.float32((1 - smooth[most]) / left))
        if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-3):
            return {
                "type": "llama3",
                "rope_type": "llama3",
                "factor": float(str(np.float32(round(factor, 3)))),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise ModelError(f"{_ROPE_FREQS} is not the scaling of Llama 3.", where=str(meta.file.path))
