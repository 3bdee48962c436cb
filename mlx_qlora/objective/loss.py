"""The training objective: summed negative log-likelihood of the target tokens, and their number.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def masked_nll(logits_BTV: mx.array, targets_BT: mx.array, mask_BT: mx.array) -> tuple[mx.array, mx.array]:
    """Summed negative log-likelihood in nats, and the number of tokens it covers; both float32.

    The caller divides, once, by the tokens of a whole update: then it does not matter how the
    update was split into micro-batches.
    """
    mask = mask_BT.astype(mx.float32)
    nll_BT = nn.losses.cross_entropy(logits_BTV.astype(mx.float32), targets_BT)
    return (nll_BT * mask).sum(), mask.sum()


def number(scalar: mx.array) -> float:
    """The value of a 0-dimensional array."""
    return float(scalar.item())  # type: ignore[arg-type]  # no loss is complex


def model_nll(
    model: nn.Module, inputs_BT: mx.array, targets_BT: mx.array, mask_BT: mx.array
) -> tuple[mx.array, mx.array]:
    """`masked_nll` of what `model` says about one batch. Right padding is safe: attention is causal."""
    return masked_nll(model(inputs_BT), targets_BT, mask_BT)
