"""Loss and perplexity over a fixed set of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.dataset.batches import Batch
from mlx_qlora.objective.loss import model_nll, number


@dataclass(frozen=True)
class Evaluation:
    """The loss of one model on one set of rows."""

    loss_nats: float
    """Mean negative log-likelihood per target token."""
    target_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss): as many equally likely next tokens would be as surprising."""
        return math.exp(min(self.loss_nats, 700.0))


def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """The token-weighted loss of `model` over all of `batches`, dropout off.

    It draws nothing at random and leaves the model as it was, so evaluating more often changes no run.
    """
    was_training = model.training
    model.eval()
    total_nll, total_tokens = 0.0, 0
    try:
        for batch in batches:
            nll, tokens = model_nll(model, *map(mx.array, (batch.inputs_BT, batch.targets_BT, batch.mask_BT)))
            total_nll, total_tokens = total_nll + number(nll), total_tokens + int(number(tokens))
    finally:
        model.train(was_training)
    return Evaluation(total_nll / total_tokens if total_tokens else math.nan, total_tokens)
