"""Optimizers by name, the learning rate of each update, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mlx_qlora.config import TrainingConfig


def build_optimizer(config: TrainingConfig) -> optim.Optimizer:
    """The optimizer that `config` names; its learning rate is set before each update."""
    if config.lora_plus_ratio == 1:
        return _named(config)
    return LoRAPlus(_named(config), _named(config), ratio=config.lora_plus_ratio)


class LoRAPlus(optim.MultiOptimizer):
    """Two optimizers of a kind: one for every matrix B, at `ratio` times the learning rate, one for the rest.

    Their states are apart, and each is that of a plain optimizer. Decoupled weight decay is a multiple of
    the learning rate, so B's is `ratio` times as large too, as in PEFT's LoRA+.

    Source: Hayou et al. 2024, arXiv:2402.12354.
    """

    def __init__(self, for_b: optim.Optimizer, for_others: optim.Optimizer, *, ratio: float) -> None:
        super().__init__([for_b, for_others], [lambda path, _array: path.endswith("lora_b")])
        self.ratio = ratio
        self.learning_rate = for_others.learning_rate

    @property
    def learning_rate(self) -> mx.array:
        """Of everything but B."""
        return self.optimizers[1].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        """Set it, and B's to `ratio` times as much."""
        for_b, for_others = self.optimizers
        for_b.learning_rate = learning_rate * self.ratio
        for_others.learning_rate = learning_rate


def _named(config: TrainingConfig) -> optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        # MLX leaves the bias of early moments uncorrected by default: first updates three times too large.
        case "adamw":
            return optim.AdamW(rate, weight_decay=decay, bias_correction=True)
        case "adam":
            return optim.Adam(rate, bias_correction=True)
        case "sgd":
            return optim.SGD(rate, momentum=0.9, weight_decay=decay)
        case "adafactor":
            return optim.Adafactor(rate, relative_step=False, scale_parameter=False, weight_decay=decay)
        case "lion":
            return optim.Lion(rate, weight_decay=decay)


def warmup_length(config: TrainingConfig, total_steps: int) -> int:
    """Updates of warm-up: as configured, or a tenth of a run that would end before it."""
    return config.warmup_steps if config.warmup_steps < total_steps else total_steps // 10


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The rate of update `step`, counted from 1.

    It rises linearly and reaches the peak at the last warm-up update; a falling schedule would reach
    zero one update after the last, so that no update is wasted.
    """
    warmup = max(warmup_length(config, total_steps), 1)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / (total_steps - warmup + 1)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.lr_schedule]
    return config.learning_rate * factor


def global_norm(grads: Any) -> mx.array:
    """Euclidean norm of all gradients together, float32."""
    squares = [mx.square(g.astype(mx.float32)).sum() for _, g in tree_flatten(grads)]
    return mx.sqrt(mx.stack(squares).sum())


def clipped(grads: Any, norm: mx.array, max_norm: float | None) -> Any:
    """`grads`, scaled down to `max_norm` when their `norm` is above it."""
    if max_norm is None:
        return grads
    factor = mx.minimum(max_norm / (norm + 1e-12), 1.0)
    return tree_map(lambda g: g * factor, grads)
