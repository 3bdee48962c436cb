"""The rows that generate together: mlx-lm's batch generator, told which row is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import make_prompt_cache

from mlx_qlora.errors import ModelError
from mlx_qlora.serving.row_lora import Row, RowAdapters, RowTags, StepLogprobs
from mlx_qlora.serving.sampling import draw, logits_processors

PREFILL_ROWS = 8
"""Prompts that are read at the same time."""
PREFILL_TOKENS = 512
"""Of a prompt between two tokens of the others: more is faster alone, and makes them wait longer."""

Caches = list[Any]
"""One of mlx-lm's caches for each layer, of one row."""
CachedTokens = tuple[list[int], Caches]
"""Tokens, and the caches that hold just these."""

_PROBE_ROWS = (5, 7)  # a mask that is broadcast over heads by mistake fits one count of heads, not both


@dataclass(frozen=True)
class Token:
    """What a step gave for one row."""

    row: Row
    token: int
    logprob: float
    """Of the token; not finite when the row's numbers are not."""
    logprobs_V: mx.array
    is_eos: bool
    is_last: bool
    """The row has left the batch: at EOS or at its length."""
    cached: CachedTokens | None
    """Of the last token: what the row's caches hold."""


class GroupedMask:
    """A batch's cache whose mask is laid out for scores by groups of heads, (rows, groups, heads, T, T).

    Where mlx-lm multiplies attention scores itself (gemma2), it adds a batch's mask, (rows, 1, T, T), as if
    its rows were groups.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask of the next call, with an axis more."""
        mask = self._cache.make_mask(*args, **kwargs)
        return mask[:, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask


class TaggedModel:
    """A model whose last cache says which rows it is called with, and so which adapter each one uses.

    Raises:
        ModelError: mlx-lm cannot compute several rows of this model at once.
    """

    def __init__(self, model: nn.Module, adapters: RowAdapters) -> None:
        self.model = model
        self.adapters = adapters
        self.rows: list[Row] = []
        """Of the last call."""
        self._has_grouped_masks = _has_grouped_masks(model, adapters)

    def __call__(self, tokens_BT: mx.array, cache: Caches) -> mx.array:
        *caches, tags = cache
        self.rows = tags.rows
        self.adapters.set([row.adapter for row in self.rows])
        if self._has_grouped_masks:
            caches = [GroupedMask(each) for each in caches]
        logits_BTV: mx.array = self.model(tokens_BT, cache=caches)
        return logits_BTV

    def draw(self, logprobs_BV: mx.array) -> mx.array:
        """The next token of each row of the last call, (B,): the batch generator's sampler."""
        tokens_B = draw(logprobs_BV, [row.drawing for row in self.rows])
        chosen_B = mx.take_along_axis(logprobs_BV, tokens_B[:, None].astype(mx.int32), axis=-1)[:, 0]
        mx.async_eval(chosen_B)
        step = StepLogprobs(chosen_B)
        for index, row in enumerate(self.rows):
            row.steps.append((step, index))
        return tokens_B


class Batch:
    """Rows that generate together; they join and leave between steps. One thread owns it and all it returns.

    Args:
        adapters: Shared with the model's `RowLoRALinear` layers.
        eos_tokens: Ids that end a text.
        max_rows: At most so many rows at a time.

    Raises:
        ModelError: mlx-lm cannot compute several rows of this model at once.
    """

    def __init__(
        self, model: nn.Module, adapters: RowAdapters, eos_tokens: Sequence[int], max_rows: int
    ) -> None:
        self._tagged = TaggedModel(model, adapters)
        self._stops = StopSequences([[token] for token in eos_tokens] or None)
        self._never = StopSequences()
        self._rows: dict[int, Row] = {}
        self._generator = BatchGenerator(
            self._tagged,
            sampler=self._tagged.draw,
            completion_batch_size=max_rows,
            prefill_batch_size=min(PREFILL_ROWS, max_rows),
            prefill_step_size=PREFILL_TOKENS,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row, cached: CachedTokens | None = None) -> None:
        """Let a row join at the next step.

        Args:
            cached: Tokens the prompt begins with, not all of it, and the caches that hold them.
        """
        known, caches = cached if cached is not None else ([], make_prompt_cache(self._tagged.model))
        (row.uid,) = self._generator.insert(
            [row.job.tokens[len(known) :]],
            [row.job.max_tokens],
            caches=[[*caches, RowTags([row])]],
            all_tokens=[list(known)],
            logits_processors=[logits_processors(row.job)],
            stop_sequences=[self._never if row.job.ignore_eos else self._stops],
        )
        self._rows[row.uid] = row

    def remove(self, row: Row) -> None:
        """Take a row out, if it is in; its place and its caches are free."""
        if self._rows.pop(row.uid, None) is not None:
            self._generator.remove([row.uid])
            row.steps.clear()

    def cached_of(self, row: Row) -> CachedTokens:
        """What the caches of a row in the batch hold, and a copy of them."""
        caches, tokens = self._generator.extract_cache([row.uid])[row.uid]
        return list(tokens), list(caches)[:-1]

    def step(self) -> tuple[list[Row], list[Token]]:
        """One token for each row that has read its prompt, and some more of the other rows' prompts.

        Returns:
            Rows that have read their prompt in this step, and the tokens.
        """
        prompts, responses = self._generator.next()
        ready = [self._rows[prompt.uid] for prompt in prompts if prompt.end_of_prompt]
        return ready, [self._token(response) for response in responses]

    def close(self) -> None:
        """Give back what the generator holds of the device."""
        self._generator.close()

    def _token(self, response: Any) -> Token:
        row = self._rows[response.uid]
        step, index = row.steps.popleft()
        cached = None
        if response.finish_reason is not None:
            del self._rows[response.uid]
            row.steps.clear()
            cached = (list(response.all_tokens), list(response.prompt_cache)[:-1])
        return Token(
            row,
            response.token,
            step[index],
            response.logprobs,
            response.finish_reason == "stop",
            response.finish_reason is not None,
            cached,
        )


def _has_grouped_masks(model: nn.Module, adapters: RowAdapters) -> bool:
    """Whether a batch's mask needs an axis more; found out by shapes alone, nothing is computed."""
    failure = _batch_failure(model, adapters, has_grouped_masks=False)
    if failure is None:
        return False
    if _batch_failure(model, adapters, has_grouped_masks=True) is None:
        return True
    raise ModelError(f"mlx-lm cannot generate several texts at once with this model: {failure}")


def _batch_failure(model: nn.Module, adapters: RowAdapters, *, has_grouped_masks: bool) -> Exception | None:
    try:
        for size in _PROBE_ROWS:
            caches = [make_prompt_cache(model) for _ in range(size)]
            merged: Caches = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]
            if has_grouped_masks:
                merged = [GroupedMask(cache) for cache in merged]
            adapters.set([0] * size)
            for num_tokens in (3, 1):
                model(mx.zeros((size, num_tokens), mx.int32), cache=merged)
    except Exception as error:  # whatever a model makes of a batch it was not written for
        return error
    return None
