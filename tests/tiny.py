"""Tiny real models, made on the spot."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from mlx_qlora.config import LoraConfig
from mlx_qlora.dataset.batches import Batch
from mlx_qlora.lora.attach import attach

VOCAB = 97


def tiny_llama(*, bits: int | None = 4, layers: int = 2, tied: bool = False, seed: int = 3) -> nn.Module:
    """A Llama of hidden size 64 in float32, quantized unless bits is None."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=layers,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=VOCAB,
            tie_word_embeddings=tied,
        )
    )
    if bits:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    return model


def with_lora(model: nn.Module, *, dropout: float = 0.0, seed: int = 0, **lora: object) -> nn.Module:
    """`model` in training mode with adapters whose B is not zero, so that every gradient is."""
    attach(model, LoraConfig(**{"rank": 4, "dropout": dropout, **lora}), seed)
    flat = tree_flatten(model.trainable_parameters())
    noise = [(k, mx.random.normal(v.shape, key=mx.random.key(i)) * 0.05) for i, (k, v) in enumerate(flat)]
    model.update(tree_unflatten([(k, v) for k, v in noise if k.endswith("lora_b")]))
    mx.eval(model.parameters())
    return model.train()


def random_batch(lengths: list[int], *, seed: int = 0, prompt: int = 2) -> Batch:
    """Rows of random tokens with the first `prompt` targets masked out, padded to a multiple of 32."""
    rng = np.random.default_rng(seed)
    width = -(-(max(lengths) - 1) // 32) * 32
    inputs = np.zeros((len(lengths), width), np.int32)
    targets, mask = inputs.copy(), np.zeros(inputs.shape, bool)
    for row, length in enumerate(lengths):
        tokens = rng.integers(1, VOCAB, length)
        inputs[row, : length - 1], targets[row, : length - 1] = tokens[:-1], tokens[1:]
        mask[row, prompt : length - 1] = True
    return Batch(inputs, targets, mask, tokens=sum(lengths))


ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}


def tiny_model(name: str, *, bits: int | None = 4, seed: int = 3) -> nn.Module:
    """A random model of one of `ARCHITECTURES` in float32, hidden size 64, quantized unless bits is None."""
    from mlx_lm.utils import _get_classes

    config = {**_SIZES, **ARCHITECTURES[name]}
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if bits:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    return model


def target_modules(name: str) -> tuple[str, ...]:
    """Linear layers to adapt in a model of that architecture."""
    return ("qkv_proj", "down_proj") if name == "phi3" else ("q_proj", "v_proj", "down_proj")
