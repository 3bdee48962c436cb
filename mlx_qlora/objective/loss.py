"""The training objective: summed negative log-likelihood of the target tokens, and their number.

Shapes: B batch, T tokens, N = B · T positions, M labelled positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.dataset.batches import Batch
from mlx_qlora.objective.fused import CHUNK_BYTES, fused_nll
from mlx_qlora.objective.head import SplitModel, split

LABEL_MULTIPLE = 64
"""Labelled positions are padded to a multiple of this: few shapes, so that few graphs are traced."""


class LossInputs(NamedTuple):
    """One micro-batch as the loss wants it."""

    inputs_BT: mx.array
    labelled_M: mx.array
    """Flat positions that have a label; padded with position 0."""
    targets_M: mx.array
    weights_M: mx.array
    """1 for a label, 0 for padding; float32."""


@dataclass(frozen=True)
class Objective:
    """The loss of one model, in the least memory its architecture allows.

    Where the model comes apart into trunk and head, the head sees labelled positions only, a chunk at a
    time. Where it does not, all logits are made at once, and `note` says so. Both give the same numbers.
    """

    model: nn.Module
    parts: SplitModel | None
    chunk_bytes: int = CHUNK_BYTES

    @property
    def note(self) -> str | None:
        """What a person should know about how this model's loss is computed."""
        if self.parts is not None:
            return None
        return "this architecture's logits are made at once: more memory than a fused loss would take"

    def prepared(self, batch: Batch) -> LossInputs:
        """The arrays of a batch, gathered on the host."""
        positions = np.flatnonzero(batch.mask_BT)
        padded = max(1, -(-len(positions) // LABEL_MULTIPLE)) * LABEL_MULTIPLE
        labelled = np.zeros(padded, np.int32)
        labelled[: len(positions)] = positions
        weights = (np.arange(padded) < len(positions)).astype(np.float32)
        targets = batch.targets_BT.reshape(-1)[labelled]
        return LossInputs(*map(mx.array, (batch.inputs_BT, labelled, targets.astype(np.int32), weights)))

    def nll(self, inputs: LossInputs) -> mx.array:
        """Summed negative log-likelihood of the labelled positions, in nats, float32."""
        if self.parts is None:
            logits = self.model(inputs.inputs_BT)
            at_labels = logits.reshape(-1, logits.shape[-1])[inputs.labelled_M]
            return weighted_nll(at_labels, inputs.targets_M, inputs.weights_M)
        hidden = self.parts.trunk(inputs.inputs_BT)
        at_labels = hidden.reshape(-1, hidden.shape[-1])[inputs.labelled_M]
        return fused_nll(at_labels, inputs.targets_M, inputs.weights_M, self.parts.head, self.chunk_bytes)


def objective_for(model: nn.Module, chunk_bytes: int = CHUNK_BYTES) -> Objective:
    """The objective for `model`, its low-rank layers attached already."""
    was_training = model.training
    model.eval()
    try:
        return Objective(model, split(model), chunk_bytes)
    finally:
        model.train(was_training)


def weighted_nll(logits_MV: mx.array, targets_M: mx.array, weights_M: mx.array) -> mx.array:
    """Sum of weight · negative log-likelihood, in nats, float32: the plain computation.

    The caller divides, once, by the tokens of a whole update: then it does not matter how the update was
    split into micro-batches.
    """
    return (nn.losses.cross_entropy(logits_MV.astype(mx.float32), targets_M) * weights_M).sum()


def number(scalar: mx.array) -> float:
    """The value of a 0-dimensional array."""
    return float(scalar.item())  # type: ignore[arg-type]  # no loss is complex
