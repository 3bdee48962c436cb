"""Causal attention for training in blocks of queries: exact, without a score for every pair of tokens.

Shapes: B batch, T tokens, H query heads, K key heads, G = H / K, S block of queries, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.objective.exponential import exp_of_shifted
from mlx_qlora.objective.segments import SegmentMask, band

BLOCK = 128
"""Queries per block: scores of B · H · BLOCK · T live at a time."""
MIN_TOKENS = 256
"""Shorter sequences are left to the plain attention."""


@dataclass(frozen=True)
class _Causal:
    """All earlier tokens."""

    def first_key(self, start: int) -> int:  # noqa: ARG002
        """Every query may see the first key."""
        return 0

    def block(self, start: int, stop: int, first: int) -> mx.array:
        """Whether queries start:stop see keys first:stop, (stop - start, stop - first)."""
        return band(start, stop, first, None)


@dataclass(frozen=True)
class _Dense:
    """An array of booleans, (T, T) or (B or 1, H or 1, T, T), from a decoder.

    Taken for granted: no query sees a later key, and each sees at least one.
    """

    allowed: mx.array

    def first_key(self, start: int) -> int:  # noqa: ARG002
        """What an array allows is not looked into."""
        return 0

    def block(self, start: int, stop: int, first: int) -> mx.array:
        """The array's part for queries start:stop and keys first:stop."""
        return self.allowed[..., start:stop, first:stop]


_Mask = SegmentMask | _Causal | _Dense


class Scoring(NamedTuple):
    """How scores are made of queries and keys, and how many at a time."""

    mask: _Mask
    scale: float
    block: int

    def blocks(self, num_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Queries and the keys they may see, block by block."""
        for start in range(0, num_tokens, self.block):
            stop = min(num_tokens, start + self.block)
            yield slice(start, stop), slice(self.mask.first_key(start), stop)

    def scores(self, q: mx.array, k_t: mx.array, rows: slice, seen: slice) -> mx.array:
        """Scores of one block, queries scaled already, keys transposed; float32, (B, K, G, S, keys)."""
        scores = (q @ k_t[..., seen]).astype(mx.float32)
        allowed = self.mask.block(rows.start, rows.stop, seen.start)
        if allowed.ndim == 4:
            heads = (1, 1) if allowed.shape[1] == 1 else (k_t.shape[1], -1)
            allowed = allowed.reshape(allowed.shape[0], *heads, *allowed.shape[2:])
        # A minimum takes a tenth of a where's time on the CPU. Not -inf, so that nothing can become NaN.
        return mx.minimum(scores, mx.where(allowed, mx.inf, mx.finfo(mx.float32).min))


def attend(queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
    """Attention of queries (B, H, T, D) to keys and values (B, K, T, D), for gradients too.

    Kept for the backward pass: the output and each query's log-sum-exp of scores; the scores are made
    again, a block at a time.

    Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
    """

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(q, k, v, scoring)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        out, log_sums = outputs
        return _backward(q, k, v, cotangents[0], out, log_sums, scoring)

    result: Any = forward(queries, keys, values)  # typed as object, and is what `forward` returns
    return result[0]


def _forward(q: mx.array, k: mx.array, v: mx.array, scoring: Scoring) -> tuple[mx.array, mx.array]:
    num_tokens, key_heads = q.shape[2], k.shape[1]
    q, k_t, v = _grouped(q * scoring.scale, key_heads), _transposed(k), v[:, :, None]
    outputs, log_sums = list[mx.array](), list[mx.array]()
    for rows, seen in scoring.blocks(num_tokens):
        q_block = q[..., rows, :]
        if outputs:  # one block's scores after the other's, never side by side
            (q_block,) = mx.depends([q_block], [outputs[-1]])
        scores = scoring.scores(q_block, k_t, rows, seen)
        highest = scores.max(axis=-1, keepdims=True)
        weights = exp_of_shifted(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        outputs.append((weights / total).astype(v.dtype) @ v[..., seen, :])
        log_sums.append(highest + mx.log(total))
    return _flat(mx.concatenate(outputs, axis=3)), mx.concatenate(log_sums, axis=3)


def _backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    d_out: mx.array,
    out: mx.array,
    log_sums: mx.array,
    scoring: Scoring,
) -> tuple[mx.array, mx.array, mx.array]:
    num_tokens, key_heads, dtype = q.shape[2], k.shape[1], q.dtype
    q, out, d_out = (_grouped(x, key_heads) for x in (q * scoring.scale, out, d_out))
    d_k, d_v = mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
    k, k_t, v_t = k[:, :, None], _transposed(k), _transposed(v)
    d_q: list[mx.array] = []
    for rows, seen in scoring.blocks(num_tokens):
        q_block, d_block = q[..., rows, :], d_out[..., rows, :]
        if d_q:
            q_block, d_block = mx.depends([q_block, d_block], [d_q[-1], d_k, d_v])
        scores = scoring.scores(q_block, k_t, rows, seen)
        weights = exp_of_shifted(
            scores - log_sums[..., rows, :]
        )  # nothing where masked, so no gradient either
        d_weights = (d_block @ v_t[..., seen]).astype(mx.float32)
        row_sums = (d_block * out[..., rows, :]).astype(mx.float32).sum(axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - row_sums)).astype(dtype)
        d_q.append(d_scores @ k[..., seen, :])
        d_k = _added(d_k, seen, (d_scores.swapaxes(-1, -2) @ q_block).sum(axis=2))
        d_v = _added(d_v, seen, (weights.astype(dtype).swapaxes(-1, -2) @ d_block).sum(axis=2))
    d_q_scaled = _flat(mx.concatenate(d_q, axis=3)) * scoring.scale
    return d_q_scaled, d_k.astype(dtype), d_v.astype(dtype)


def _added(total: mx.array, where: slice, part: mx.array) -> mx.array:
    return total.at[:, :, where].add(part.astype(total.dtype))


def _transposed(x: mx.array) -> mx.array:
    """(B, K, T, D) as (B, K, 1, D, T), laid out: MLX's CPU loops take a transposed view twice as long."""
    return mx.contiguous(x.swapaxes(-1, -2))[:, :, None]


def _grouped(x: mx.array, key_heads: int) -> mx.array:
    """(B, H, T, D) as (B, K, G, T, D)."""
    return x.reshape(x.shape[0], key_heads, -1, *x.shape[2:])


def _flat(x: mx.array) -> mx.array:
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def has_fused_gradient(queries: mx.array, mask: Any) -> bool:
    """Whether MLX's own attention has a gradient that keeps no scores: the one place that knows devices.

    - CPU: there is no fused attention, forward or backward.
    - Metal: none while gradients are traced. MLX chooses the unfused operations there and says that they
      are faster (mlx/backend/metal/scaled_dot_product_attention.cpp, `use_fallback`, `is_training`); they
      keep all scores.
    - CUDA: cuDNN's, for 16-bit types and rows whose length is a multiple of 128
      (mlx/backend/cuda/scaled_dot_product_attention.cpp). Read, not run.
    """
    is_cuda = mx.default_device() == mx.gpu and mx.cuda.is_available()
    is_taken = isinstance(mask, str) and queries.dtype != mx.float32 and queries.shape[2] % 128 == 0
    return is_cuda and is_taken


def covers(model: nn.Module) -> bool:
    """Whether all attention of `model` goes through mlx-lm's shared function, which can be replaced.

    Found out by running a few tokens: gemma2, for one, computes its soft-capped attention itself.
    """
    calls = 0

    def count(*args: Any, **kwargs: Any) -> mx.array:
        nonlocal calls
        calls += 1
        return _plain()(*args, **kwargs)

    with _swapped(model, count):
        model(mx.array([[1, 2, 3]]))
    return calls == len(getattr(model, "layers", ()))


_NAME = "scaled_dot_product_attention"


@contextmanager
def blocked_attention(
    model: nn.Module, *, block: int = BLOCK, min_tokens: int = MIN_TOKENS
) -> Iterator[None]:
    """Let `model`'s architecture use blocked attention while this is open.

    Open it around whatever runs or traces the model's Python code: value_and_grad with its recomputation
    of checkpointed layers, the calls of a compiled step. What blocked attention cannot take goes to
    mlx-lm's own attention, call by call.
    """
    with _swapped(model, _attention(_plain(), block, min_tokens)):
        yield


@contextmanager
def _swapped(model: nn.Module, new: Callable[..., mx.array]) -> Iterator[None]:
    """Put `new` wherever this model's classes look mlx-lm's attention up."""
    modules = {sys.modules[cls.__module__] for m in model.modules() for cls in type(m).__mro__}
    owners = [module for module in modules if getattr(module, _NAME, None) is _plain()]
    for owner in owners:
        setattr(owner, _NAME, new)
    try:
        yield
    finally:
        for owner in owners:
            setattr(owner, _NAME, _plain())


def _plain() -> Callable[..., mx.array]:
    from mlx_lm.models import base

    return base.scaled_dot_product_attention


def _attention(plain: Callable[..., mx.array], block: int, min_tokens: int) -> Callable[..., mx.array]:
    def scaled_dot_product_attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        scale: float = 1.0,
        mask: Any = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        taken = _taken(mask)
        fits = (
            taken is not None
            and sinks is None
            and not hasattr(cache, "bits")
            and _is_self_attention(queries, keys, values)
            and queries.shape[2] >= min_tokens
            and not has_fused_gradient(queries, mask)
        )
        if taken is not None and fits:
            return attend(queries, keys, values, Scoring(taken, scale, block))
        mask = mask.dense() if isinstance(mask, SegmentMask) else mask
        return plain(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    return scaled_dot_product_attention


def _taken(mask: Any) -> _Mask | None:
    if isinstance(mask, SegmentMask):
        return mask
    if isinstance(mask, str):
        return _Causal() if mask == "causal" else None
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.ndim in (2, 4):
        return _Dense(mask)
    return None


def _is_self_attention(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    same = queries.ndim == 4 and keys.shape[2] == values.shape[2] == queries.shape[2]
    return same and queries.shape[1] % keys.shape[1] == 0 and keys.shape[1] == values.shape[1]
