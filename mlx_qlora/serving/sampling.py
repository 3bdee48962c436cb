"""The next token of each row of a batch: by its own settings, from a key of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qlora.serving.jobs import Job

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(eq=False)
class Drawing:
    """How one row draws its tokens, and how many it has drawn."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    num_drawn: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens are never drawn, so that they have to be sorted."""
        return self.top_p < 1 or self.top_k > 0

    def next_key(self) -> list[int]:
        """Two 32-bit words for the next draw: a function of the seed and of the token's place alone."""
        text = f"{self.seed}/{self.num_drawn}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]


def draw(logprobs_BV: mx.array, drawings: Sequence[Drawing]) -> mx.array:
    """One token for each row, (B,); counts it in the row's `Drawing`.

    A row's draw is the maximum of its log-probabilities plus Gumbel noise from its key, so other rows have no
    part in it, and a rounding error of the log-probabilities seldom has one. Tokens are left out as in
    mlx-lm, by probabilities before temperature.

    Args:
        logprobs_BV: Normalized, in nats.

    Source: Gumbel 1954; as sampling, Maddison et al. 2014, arXiv:1411.0030.
    """
    tokens_B = mx.argmax(logprobs_BV, axis=-1)
    hot = [row for row, drawing in enumerate(drawings) if not drawing.is_greedy]
    if hot:
        chosen = [drawings[row] for row in hot]
        drawn = _drawn(logprobs_BV[mx.array(hot)].astype(mx.float32), chosen)
        tokens_B[mx.array(hot)] = drawn.astype(tokens_B.dtype)
    for drawing in drawings:
        drawing.num_drawn += 1
    return tokens_B


def _drawn(logprobs_BV: mx.array, drawings: Sequence[Drawing]) -> mx.array:
    keys = mx.array(np.array([drawing.next_key() for drawing in drawings], np.uint32))
    floor_B1 = thresholds(logprobs_BV, drawings)
    temperature_B1 = mx.array([[drawing.temperature] for drawing in drawings])
    size = logprobs_BV.shape[-1]
    noise_BV = mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys)
    kept_BV = mx.where(logprobs_BV >= floor_B1, logprobs_BV, -mx.inf)
    # Noise times temperature is the same choice as scores over temperature, and small ones do not overflow.
    return mx.argmax(kept_BV + noise_BV * temperature_B1, axis=-1)


def thresholds(logprobs_BV: mx.array, drawings: Sequence[Drawing]) -> mx.array:
    """The smallest log-probability each row may draw, (B, 1): the likeliest token is always among them."""
    best_B1 = mx.max(logprobs_BV, axis=-1, keepdims=True)
    shares = [[math.log(drawing.min_p) if drawing.min_p > 0 else -math.inf] for drawing in drawings]
    floor_B1 = best_B1 + mx.array(shares)
    filtered = [row for row, drawing in enumerate(drawings) if drawing.is_filtered]
    if filtered:
        rows = mx.array(filtered)
        floors = _sorted_floors(logprobs_BV[rows], [drawings[row] for row in filtered])
        floor_B1[rows] = mx.maximum(floor_B1[rows], floors)
    return floor_B1


def _sorted_floors(logprobs_BV: mx.array, drawings: Sequence[Drawing]) -> mx.array:
    size = logprobs_BV.shape[-1]
    sorted_BV = -mx.sort(-logprobs_BV, axis=-1)
    counts_B1 = mx.array([[min(drawing.top_k or size, size)] for drawing in drawings])
    top_p_B1 = mx.array([[drawing.top_p if drawing.top_p < 1 else math.inf] for drawing in drawings])
    probabilities = mx.exp(sorted_BV)
    # A token is in the nucleus when those before it have not reached top_p.
    before_BV = mx.cumsum(probabilities, axis=-1) - probabilities
    nucleus_B1 = mx.sum(before_BV < top_p_B1, axis=-1, keepdims=True)
    last_B1 = mx.maximum(mx.minimum(counts_B1, nucleus_B1), 1) - 1
    return mx.take_along_axis(sorted_BV, last_B1, axis=-1)


def logits_processors(job: Job) -> list[LogitsProcessor]:
    """What changes a job's logits before they are normalized: bias, then penalties; often nothing."""
    processors: list[LogitsProcessor] = []
    if job.logit_bias:
        processors.append(_bias(job))
    if job.repetition_penalty != 1 or job.presence_penalty != 0 or job.frequency_penalty != 0:
        processors.append(_penalties(job))
    return processors


def _bias(job: Job) -> LogitsProcessor:
    tokens, values = mx.array(list(job.logit_bias)), mx.array(list(job.logit_bias.values()))

    def process(_context: mx.array, logits_1V: mx.array) -> mx.array:
        return logits_1V.at[:, tokens].add(values.astype(logits_1V.dtype))

    return process


def _penalties(job: Job) -> LogitsProcessor:
    """Of tokens seen (repetition: Keskar et al. 2019, arXiv:1909.05858) and generated (OpenAI's API)."""
    num_prompt = len(job.tokens)

    def process(context: mx.array, logits_1V: mx.array) -> mx.array:
        if job.repetition_penalty != 1:
            seen = logits_1V[:, context]
            factor = job.repetition_penalty
            logits_1V[:, context] = mx.where(seen > 0, seen / factor, seen * factor)
        generated = context[num_prompt:]
        if generated.size and (job.presence_penalty or job.frequency_penalty):
            counts = mx.zeros((logits_1V.shape[-1],), mx.float32).at[generated].add(1.0)
            penalty = job.frequency_penalty * counts + job.presence_penalty * (counts > 0)
            logits_1V = logits_1V - penalty[None].astype(logits_1V.dtype)
        return logits_1V

    return process
