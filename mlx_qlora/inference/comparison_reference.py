"""What one model says of each labelled token, kept on disk, and how far another model is from it.

A vocabulary of 128 k makes half a megabyte of logits a token. Where the reference's logits are hidden states
times a matrix, the hidden states are kept instead, some kilobytes a token, and the matrix once: its logits
come back by the operation that made them, a chunk at a time. Where they are not, all logits are kept.

Shapes: M labelled positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.dataset.batches import Batch
from mlx_qlora.objective.fused import CHUNK_BYTES, chunk_length
from mlx_qlora.objective.head import Transform
from mlx_qlora.objective.loss import Objective, number
from mlx_qlora.quantization.dense import dense_products, forward_product, is_codebook, use_dense_products
from mlx_qlora.storage import write_tensors
from mlx_qlora.weights.shards import read_tensors

HEAD = "head.safetensors"


@dataclass(frozen=True)
class Score:
    """One model on a set of rows, beside the reference."""

    loss_nats: float
    """Mean negative log-likelihood per labelled token."""
    divergence_nats: float
    """Mean Kullback-Leibler divergence from the reference per labelled token; 0 for the reference itself."""
    agreement: float
    """Share of labelled tokens where both hold the same next token for the likeliest, 0 to 1."""
    target_tokens: int


@dataclass(frozen=True)
class _Logits:
    """Hidden states of labelled positions, and what makes logits of them; without a head they are logits."""

    objective: Objective

    def of(self, made_MD: mx.array) -> mx.array:
        """Logits, (M, V), float32."""
        parts = self.objective.parts
        if parts is None:
            return made_MD.astype(mx.float32)
        module = parts.head.module
        # On a CPU a quantized head is unpacked for many rows, as the layers below it are.
        if parts.head.is_plain_matmul and (use_dense_products() or is_codebook(module)):
            return forward_product(module)(made_MD).astype(mx.float32)
        return parts.head(made_MD).astype(mx.float32)


def write_reference(objective: Objective, batches: Iterable[Batch], folder: Path) -> Score:
    """Keep what `objective`'s model says of every labelled position, and score it.

    Raises:
        StorageError: the disk has no room.
    """
    logits = _Logits(objective)
    matrix = _head_matrix(objective)
    if matrix is not None:
        write_tensors(folder / HEAD, {"weight": matrix}, {})
    nll, tokens = 0.0, 0
    for index, (made_MD, targets_M) in enumerate(_labelled(objective, batches)):
        kept = made_MD if matrix is not None else logits.of(made_MD)
        write_tensors(folder / f"{index:06d}.safetensors", {"states": kept}, {})
        for part in _chunks(len(targets_M), logits.of(made_MD[:1]).shape[-1]):
            q_MV = _normalised(logits.of(made_MD[part]))
            nll += _nll(q_MV, targets_M[part])
        tokens += len(targets_M)
    return Score(nll / tokens, 0.0, 1.0, tokens)


def score_against(objective: Objective, batches: Iterable[Batch], folder: Path) -> Score:
    """Score `objective`'s model on the batches that `folder` was written for, in the same order."""
    logits = _Logits(objective)
    matrix = read_tensors(folder / HEAD)["weight"] if (folder / HEAD).is_file() else None
    transform = objective.parts.head.transform if objective.parts is not None else None
    nll = divergence = agreed = 0.0
    tokens = 0
    for index, (made_MD, targets_M) in enumerate(_labelled(objective, batches)):
        kept = read_tensors(folder / f"{index:06d}.safetensors")["states"]
        for part in _chunks(len(targets_M), logits.of(made_MD[:1]).shape[-1]):
            p_MV = _normalised(_reference_logits(kept[part], matrix, transform))
            q_MV = _normalised(logits.of(made_MD[part]))
            nll += _nll(q_MV, targets_M[part])
            divergence += number((mx.exp(p_MV) * (p_MV - q_MV)).sum())
            agreed += number((p_MV.argmax(axis=-1) == q_MV.argmax(axis=-1)).sum())
        tokens += len(targets_M)
    # Below 0 by rounding only.
    return Score(nll / tokens, max(0.0, divergence / tokens), agreed / tokens, tokens)


def _head_matrix(objective: Objective) -> mx.array | None:
    """W, (V, D), where the logits are a transform of hidden · Wᵀ and W is stored as it is; else None."""
    if objective.parts is None:
        return None
    module = objective.parts.head.module
    is_plain = type(module) in (nn.Linear, nn.Embedding) and "bias" not in module
    return module.weight if is_plain else None


def _reference_logits(kept_MD: mx.array, matrix: mx.array | None, transform: Transform | None) -> mx.array:
    """The reference's logits, (M, V), float32."""
    if matrix is None:
        return kept_MD
    raw = kept_MD @ matrix.T
    return (raw if transform is None else transform(raw)).astype(mx.float32)


def _labelled(objective: Objective, batches: Iterable[Batch]) -> Iterator[tuple[mx.array, mx.array]]:
    """What the trunk (without one, the model) makes at the labelled positions of each batch; the labels."""
    module = objective.model if objective.parts is None else objective.parts.trunk
    was_training = objective.model.training
    objective.model.eval()
    try:
        for batch in batches:
            if batch.target_tokens == 0:
                continue
            inputs = objective.prepared(batch)
            count = batch.target_tokens  # behind them is padding
            with objective.active(), dense_products(objective.model):
                made = module(inputs.inputs_BT)
                at_labels = made.reshape(-1, made.shape[-1])[inputs.labelled_M[:count]]
                mx.eval(at_labels)
            yield at_labels, inputs.targets_M[:count]
    finally:
        objective.model.train(was_training)


def _chunks(count: int, vocabulary: int) -> Iterator[slice]:
    length = chunk_length(vocabulary, CHUNK_BYTES)
    for first in range(0, count, length):
        yield slice(first, first + length)


def _normalised(logits_MV: mx.array) -> mx.array:
    """Logarithms of probabilities."""
    return logits_MV - mx.logsumexp(logits_MV, axis=-1, keepdims=True)


def _nll(q_MV: mx.array, targets_M: mx.array) -> float:
    return -number(mx.take_along_axis(q_MV, targets_M[:, None], axis=-1).sum())
