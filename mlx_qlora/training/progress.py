"""Where a run stands after one more update or validation: pure functions of where it stood."""

from __future__ import annotations

import math
from dataclasses import replace

from mlx_qlora.config import TrainingConfig
from mlx_qlora.dataset.batches import Batches
from mlx_qlora.training.checkpoint import Progress
from mlx_qlora.training.step import Outcome


def total_steps(config: TrainingConfig, batches: Batches) -> int:
    """Updates in the whole run."""
    return config.max_steps or config.num_epochs * batches.steps_per_epoch


def after(progress: Progress, outcome: Outcome, *, starts_epoch: bool) -> Progress:
    """Where the run stands after one more update."""
    epoch_nll = 0.0 if starts_epoch else progress.epoch_nll
    epoch_tokens = 0 if starts_epoch else progress.epoch_target_tokens
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + outcome.tokens,
        epoch_nll=epoch_nll + (0.0 if outcome.skipped else outcome.nll),
        epoch_target_tokens=epoch_tokens + (0 if outcome.skipped else outcome.target_tokens),
        bad_in_a_row=progress.bad_in_a_row + 1 if outcome.skipped else 0,
        skipped_updates=progress.skipped_updates + outcome.skipped,
    )


def validated(progress: Progress, loss_nats: float) -> Progress:
    """Where the run stands after a validation with this loss; a loss that is no number is never the best."""
    loss = loss_nats if math.isfinite(loss_nats) else math.inf
    is_best = progress.best_loss is None or loss < progress.best_loss
    return replace(
        progress,
        validated_step=progress.step,
        best_loss=loss if is_best else progress.best_loss,
        best_step=progress.step if is_best else progress.best_step,
        validations_without_best=0 if is_best else progress.validations_without_best + 1,
    )
