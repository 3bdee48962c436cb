"""A language model in two parts: the trunk, which makes hidden states, and the head, which makes logits.

Shapes: B batch, T tokens, N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.lora.layers import LoRALinear

Transform = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits."""

    module: nn.Module
    """A linear layer, or the embedding whose transpose is used."""
    is_tied: bool
    transform: Transform | None = None
    """Applied to the raw logits, as a soft-cap or a scale is."""

    def __call__(self, hidden_ND: mx.array) -> mx.array:
        """Logits, (N, V)."""
        raw = self.module.as_linear(hidden_ND) if self.is_tied else self.module(hidden_ND)
        return self.transform(raw) if self.transform is not None else raw

    @property
    def is_plain_matmul(self) -> bool:
        """Whether logits are hidden · Wᵀ and nothing else, with W frozen."""
        is_bare = self.transform is None and "bias" not in self.module
        return is_bare and not isinstance(self.module, LoRALinear) and not self.module.trainable_parameters()


@dataclass(frozen=True)
class SplitModel:
    """A model whose logits are head(trunk(tokens))."""

    trunk: nn.Module
    head: Head


def split(model: nn.Module) -> SplitModel | None:
    """The two parts of `model`, or None when its logits are made in another way.

    mlx-lm's architectures keep the trunk under ``model`` and the head under ``lm_head`` or in the
    embedding, some with a soft-cap or a scale after it. Which of these holds is not looked up: each
    candidate is tried on a few tokens, and only one that gives the model's own logits is taken.
    """
    trunk = getattr(model, "model", None)
    if not isinstance(trunk, nn.Module):
        return None
    tokens = mx.array([[1, 2, 3, 5]])
    try:
        wanted, hidden = model(tokens), trunk(tokens)
        for head in _candidates(model, trunk):
            if _agree(head(hidden), wanted):
                return SplitModel(trunk, head)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return None


def _candidates(model: nn.Module, trunk: nn.Module) -> list[Head]:
    modules = []
    if isinstance(getattr(model, "lm_head", None), nn.Module):
        modules.append((model.lm_head, False))
    if isinstance(getattr(trunk, "embed_tokens", None), nn.Embedding | nn.QuantizedEmbedding):
        modules.append((trunk.embed_tokens, True))
    return [Head(module, tied, transform) for module, tied in modules for transform in _transforms(model)]


def _transforms(model: nn.Module) -> list[Transform | None]:
    """No transform, and those that the model's own numbers suggest."""
    found: list[Transform | None] = [None]
    for owner in (model, getattr(model, "args", None)):
        if cap := _number(owner, "final_logit_softcapping"):
            found.append(partial(_soft_capped, cap=cap))
        if scale := _number(owner, "logit_scale"):
            found.append(partial(_scaled, scale=scale))
        if scale := _number(owner, "logits_scaling"):
            found.append(partial(_scaled, scale=1 / scale))
    return found


def _soft_capped(logits: mx.array, *, cap: float) -> mx.array:
    return mx.tanh(logits / cap) * cap


def _scaled(logits: mx.array, *, scale: float) -> mx.array:
    return logits * scale


def _number(owner: Any, name: str) -> float | None:
    value = getattr(owner, name, None)
    return float(value) if isinstance(value, int | float) and value else None


def _agree(logits: mx.array, wanted: mx.array) -> bool:
    if logits.shape != wanted.shape:
        return False
    difference = mx.abs(logits.astype(mx.float32) - wanted.astype(mx.float32)).max()
    size = mx.abs(wanted.astype(mx.float32)).max()
    # The same operations in the same type: any real transform changes far more than this.
    return bool((difference <= 1e-3 * size).item())
