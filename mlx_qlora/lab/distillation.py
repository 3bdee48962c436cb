"""Distillation: a small network learns the answers of larger ones.

Source: Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.networks import Loss


def distillation_loss(
    teacher_logits: mx.array, classes: mx.array, temperature: float, soft_share: float
) -> Loss:
    """share · τ² · KL(teacher ‖ student at temperature τ) + (1 − share) · cross-entropy, mean over rows.

    τ² keeps the size of the gradient as τ grows (Hinton et al. 2015, section 2).

    Raises:
        ConfigError: τ is not above 0, or the share not within 0 … 1.
    """
    if not (temperature > 0 and 0 <= soft_share <= 1):
        raise ConfigError(f"τ {temperature} or share {soft_share} is out of range.", where="distillation")
    log_teacher = nn.log_softmax(teacher_logits / temperature)

    def loss(logits: mx.array, rows: mx.array) -> mx.array:
        log_student = nn.log_softmax(logits / temperature)
        soft = nn.losses.kl_div_loss(log_student, log_teacher[rows], axis=-1, reduction="mean")
        hard = nn.losses.cross_entropy(logits, classes[rows], reduction="mean")
        return soft_share * temperature**2 * soft + (1 - soft_share) * hard

    return loss


def ensemble_logits(networks: Sequence[nn.Module], x: np.ndarray) -> mx.array:
    """The mean of several teachers' logits, evaluated."""
    logits = mx.stack([network(mx.array(x)) for network in networks]).mean(axis=0)
    mx.eval(logits)
    return logits
