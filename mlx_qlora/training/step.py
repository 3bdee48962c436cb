"""One optimizer update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_qlora.config import TrainingConfig
from mlx_qlora.dataset.batches import Batch
from mlx_qlora.lora.layers import lora_layers, set_dropout_keys
from mlx_qlora.objective.loss import LossInputs, Objective, number
from mlx_qlora.training.distributed import ALONE, Ranks
from mlx_qlora.training.optimizer import clipped, global_norm


@dataclass(frozen=True)
class Outcome:
    """What one update did, on all ranks together."""

    nll: float
    """Summed over the update's target tokens, in nats."""
    target_tokens: int
    tokens: int
    grad_norm: float
    """Of the mean gradient, before clipping."""
    skipped: bool
    """True when loss or gradient was not finite: nothing was updated."""
    has_no_gradient: bool = False
    """Whether a micro-batch of this rank has a loss and no gradient at all, as where a device failed and gave
    zeros. It counts as not finite."""


class TrainStep:
    """Loss and gradient of each micro-batch, summed; one division; one update.

    A step is the same however its examples are split into micro-batches, and it is a function of the
    weights, the optimizer state, the batches, the seed and the step number alone.

    Args:
        ranks: Those that each do a part of the update's examples. Sums over all of them are divided by the
            tokens of all of them, so that it does not matter how many there are.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optim.Optimizer,
        config: TrainingConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective, self.model = objective, objective.model
        self.optimizer, self.config, self.ranks = optimizer, config, ranks
        self._lora = lora_layers(self.model)
        # State must exist before the first update: then a resumed run starts from the same arrays.
        optimizer.init(self.model.trainable_parameters())
        self._has_dropout = any(layer.dropout > 0 for layer in self._lora)
        compiled = config.compile if config.compile is not None else mx.default_device() != mx.cpu
        compiled = compiled and objective.apart is None  # what is computed apart is evaluated on the way
        nll_and_grad = mx.value_and_grad(self._nll)
        self._graph = mx.compile(nll_and_grad, inputs=[self.model.state]) if compiled else nll_and_grad

    def __call__(self, batches: Sequence[Batch], step: int, learning_rate: float) -> Outcome:
        """Do update `step` (counted from 1) at `learning_rate`."""
        nll, grad, target_tokens, has_no_gradient = 0.0, None, 0, False
        tokens = sum(batch.tokens for batch in batches)
        for index, batch in enumerate(batches):
            inputs = self.objective.prepared(batch)
            part, part_grad = self._nll_and_grad(inputs, self._dropout_keys(step, index))
            grad = part_grad if grad is None else tree_map(mx.add, grad, part_grad)
            part_norm = global_norm(part_grad)
            mx.eval(part, grad, part_norm)  # frees this micro-batch's activations
            nll, target_tokens = nll + number(part), target_tokens + batch.target_tokens
            has_no_gradient |= number(part_norm) == 0 and number(part) > 0
        nll = math.nan if has_no_gradient else nll
        if not self.ranks.is_alone:
            nll, grad, target_tokens, tokens = self._of_all_ranks(nll, grad, target_tokens, tokens)
        grad = tree_map(lambda g: g / max(target_tokens, 1), grad)
        norm = global_norm(grad)
        grad_norm = number(norm)
        is_finite = math.isfinite(nll) and math.isfinite(grad_norm) and target_tokens > 0
        if is_finite:
            self._update(clipped(grad, norm, self.config.max_grad_norm), learning_rate)
        return Outcome(nll, target_tokens, tokens, grad_norm, not is_finite, has_no_gradient)

    def _of_all_ranks(
        self, nll: float, grad: Any, target_tokens: int, tokens: int
    ) -> tuple[float, Any, int, int]:
        """The sums over all ranks; one without rows adds zeros."""
        if grad is None:
            grad = tree_map(mx.zeros_like, self.model.trainable_parameters())
        total, all_targets, all_tokens = self.ranks.total(nll, target_tokens, tokens)
        return total, self.ranks.summed(grad), int(all_targets), int(all_tokens)

    def _update(self, grad: Any, learning_rate: float) -> None:
        self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.model, grad)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)

    def _nll_and_grad(self, inputs: LossInputs, keys: mx.array) -> Any:
        """(nll, gradients) of one micro-batch; no traced array stays behind in the model."""
        trained = self.model.trainable_parameters()
        try:
            with self.objective.active():
                return self._graph(trained, inputs, keys)
        finally:
            self.model.update(trained)
            set_dropout_keys(self._lora, None)

    def _nll(self, trained: Any, inputs: LossInputs, keys: mx.array) -> mx.array:
        self.model.update(trained)
        set_dropout_keys(self._lora, keys if self._has_dropout else None)
        return self.objective.nll(LossInputs(*inputs))

    def _dropout_keys(self, step: int, micro_batch: int) -> mx.array:
        """One key per low-rank layer, (layers, 2) uint32: a function of seed, step, micro-batch and rank."""
        number = micro_batch * self.ranks.size + self.ranks.rank
        return mx.random.split(mixed_key(self.config.seed, step, number), max(len(self._lora), 1))


def mixed_key(*numbers: int) -> mx.array:
    """A random key from several numbers, mixed so that (1, 2) and (2, 1) are unrelated."""
    word = np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0]
    return mx.random.key(int(word))
