"""The training objective: summed negative log-likelihood of the target tokens, and their number.

Shapes: B batch, T tokens, D hidden size, N = B · T positions, M labelled positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.batches import Batch, Layout
from mlx_qlora.errors import ConfigError
from mlx_qlora.objective.attention import blocked_attention, covers
from mlx_qlora.objective.fused import CHUNK_BYTES, fused_nll
from mlx_qlora.objective.head import SplitModel, split
from mlx_qlora.objective.prefix import StoredPrefix
from mlx_qlora.objective.segments import RowCache, keeps_examples_apart

Apart = Callable[..., mx.array]
"""Computes a number and its gradients away from the rest of a step: (head, function, *arrays) → number."""

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
    segments_BT: mx.array
    """The example each position belongs to; without elements when each row is one example."""
    longest: int
    """No example has more positions; one of few values."""
    hidden_BTD: mx.array
    """What the frozen layers below the first trained one give; without elements when they are to be run."""


def row_layout(model: nn.Module, config: DataConfig, *, may_concatenate: bool, is_banded: bool) -> Layout:
    """How micro-batches of a model of this size are best laid out, when what it can do is known."""
    args = getattr(model, "args", None)
    return Layout(
        may_concatenate=may_concatenate,
        # A block has about 12 D² weights, two operations each; a score and its value take 4 D, and
        # causal attention skips half of them.
        linear_cost=12.0 * getattr(args, "hidden_size", 0),
        row_capacity=config.max_seq_length - 1 if config.packing else None,
        is_banded=is_banded,
        longest_row=getattr(args, "max_position_embeddings", None),
    )


@dataclass(frozen=True)
class Objective:
    """The loss of one model, in the least memory its architecture allows.

    Where the model comes apart into trunk and head, the head sees labelled positions only, a chunk at a
    time. Where it does not, all logits are made at once, and `note` says so. Both give the same numbers.
    """

    model: nn.Module
    parts: SplitModel | None
    keeps_examples_apart: bool = False
    """Whether several examples may share a row."""
    is_blocked: bool = False
    """Whether attention is made block by block."""
    chunk_bytes: int = CHUNK_BYTES
    prefix: StoredPrefix | None = None
    """Hidden states computed before, for batches that say which examples they hold."""
    apart: Apart | None = None
    """How the loss of a training step is computed on its own; None: together with the layers."""

    @property
    def notes(self) -> list[str]:
        """What a person should know about how this model's loss is computed."""
        notes = []
        if self.parts is None:
            notes.append("this architecture's logits are made at once: more memory than a fused loss takes")
        if not self.is_blocked:
            notes.append("this architecture makes all attention scores at once: long rows take more memory")
        if not self.keeps_examples_apart:
            notes.append("this architecture cannot keep examples apart in one row: batches are padded")
        return notes

    def layout(self, config: DataConfig) -> Layout:
        """How this model's micro-batches are best laid out.

        Raises:
            ConfigError: packing is asked for and the model cannot keep examples apart.
        """
        may_pack = self.keeps_examples_apart and keeps_examples_apart(self.model, num_rows=2)
        if config.packing and not may_pack:
            raise ConfigError(
                "This architecture cannot keep examples apart in one row, so they cannot be packed.",
                where="data.packing",
                run="mlx-qlora train … --set data.packing=false",
            )
        return row_layout(
            self.model, config, may_concatenate=self.keeps_examples_apart, is_banded=self.is_blocked
        )

    def prepared(self, batch: Batch) -> LossInputs:
        """The arrays of a batch, gathered on the host."""
        positions = np.flatnonzero(batch.mask_BT)
        padded = max(1, -(-len(positions) // LABEL_MULTIPLE)) * LABEL_MULTIPLE
        labelled = np.zeros(padded, np.int32)
        labelled[: len(positions)] = positions
        weights = (np.arange(padded) < len(positions)).astype(np.float32)
        targets = batch.targets_BT.reshape(-1)[labelled]
        segments = batch.segments_BT if batch.segments_BT is not None else np.zeros((0, 0), np.int32)
        return LossInputs(
            mx.array(batch.inputs_BT),
            mx.array(labelled),
            mx.array(targets.astype(np.int32)),
            mx.array(weights),
            mx.array(segments),
            batch.longest,
            self._stored(batch),
        )

    def nll(self, inputs: LossInputs) -> mx.array:
        """Summed negative log-likelihood of the labelled positions, in nats, float32."""
        module = self.model if self.parts is None else self.parts.trunk
        with self._given(inputs):
            made = module(inputs.inputs_BT, **self._cache(inputs))
        at_labels = made.reshape(-1, made.shape[-1])[inputs.labelled_M]
        if self.apart is None or not self.model.training:
            return self._loss(at_labels, inputs.targets_M, inputs.weights_M)
        head = nn.Module() if self.parts is None else self.parts.head.module
        return self.apart(head, self._loss, at_labels, inputs.targets_M, inputs.weights_M)

    def _loss(self, made_MD: mx.array, targets_M: mx.array, weights_M: mx.array) -> mx.array:
        """Of logits where the model does not come apart, else of what its trunk gives."""
        if self.parts is None:
            return weighted_nll(made_MD, targets_M, weights_M)
        return fused_nll(made_MD, targets_M, weights_M, self.parts.head, self.chunk_bytes)

    def _stored(self, batch: Batch) -> mx.array:
        if self.prefix is None or not batch.examples:
            return mx.zeros((0, 0, 0))
        return self.prefix.gathered(batch)

    def _given(self, inputs: LossInputs) -> AbstractContextManager[None]:
        if self.prefix is None or inputs.hidden_BTD.size == 0:
            return nullcontext()
        return self.prefix.given(inputs.hidden_BTD)

    def _cache(self, inputs: LossInputs) -> dict[str, list[RowCache]]:
        if inputs.segments_BT.size == 0:
            return {}
        cache = RowCache(inputs.segments_BT, longest=inputs.longest, is_dense=not self.is_blocked)
        return {"cache": [cache] * len(self.model.layers)}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Open this around whatever traces or runs `nll`, gradients and recomputation included."""
        with blocked_attention(self.model) if self.is_blocked else nullcontext():
            yield


def objective_for(model: nn.Module, chunk_bytes: int = CHUNK_BYTES) -> Objective:
    """The objective for `model`, its low-rank layers attached already."""
    was_training = model.training
    model.eval()
    try:
        is_blocked = covers(model)
        return Objective(model, split(model), keeps_examples_apart(model), is_blocked, chunk_bytes)
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
