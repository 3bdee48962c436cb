"""Loss and perplexity over a fixed set of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.nn as nn

from mlx_qlora.dataset.batches import Batch
from mlx_qlora.objective.loss import Objective, number, objective_for


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


def evaluate(model: nn.Module, batches: Iterable[Batch], objective: Objective | None = None) -> Evaluation:
    """The token-weighted loss of `model` over all of `batches`, dropout off.

    Args:
        objective: The model's own, when it was made already.

    It draws nothing at random and leaves the model as it was, so evaluating more often changes no run.
    """
    objective = objective or objective_for(model)
    was_training = model.training
    model.eval()
    total_nll, total_tokens = 0.0, 0
    try:
        for batch in batches:
            with objective.active():
                total_nll += number(objective.nll(objective.prepared(batch)))
            total_tokens += batch.target_tokens
    finally:
        model.train(was_training)
    return Evaluation(total_nll / total_tokens if total_tokens else math.nan, total_tokens)
