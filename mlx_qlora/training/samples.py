"""What the base and the adapter answer to a few held-out prompts, for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.dataset import Example
from mlx_qlora.lora.adapter import adapter_tensors, set_adapter_tensors
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear

MAX_TOKENS = 64
"""Of an answer; longer ones are cut."""

MAX_SECONDS = 30.0
"""For all answers together: a report is worth no more."""

PLAIN_TEXT_PROMPT = 32
"""So many tokens, or a third of the row, are given where every token is a target."""

CUT, OUT_OF_TIME = " …", "(no time left)"

Continue = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt and three answers, as text."""

    source: str
    """Where the row stands: file:line."""
    prompt: str
    """As the model reads it, control tokens included."""
    expected: str
    base: str
    """Of the base alone."""
    adapted: str
    """With the adapter that is kept."""


def sampled_answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    adapter: Mapping[str, mx.array],
    should_stop: Callable[[], object] = lambda: None,
    max_seconds: float = MAX_SECONDS,
) -> list[Sample]:
    """Greedy answers of one model object, its low-rank layers switched off and on.

    It draws nothing at random and leaves the model as it was. A prompt that time did not suffice for is left
    out, and so is a row without a prompt.

    Args:
        adapter: The tensors to answer with, as `adapter_tensors` names them.
        should_stop: Asked before each token; true ends it all.
        max_seconds: For all answers together.
    """
    deadline = time.monotonic() + max_seconds

    def is_over() -> bool:
        return bool(should_stop()) or time.monotonic() > deadline

    samples: list[Sample] = []
    trained, was_training = adapter_tensors(model), model.training
    model.eval()
    try:
        set_adapter_tensors(model, adapter, where="the adapter of the report")
        for example in examples:
            prompt, expected = parted(example)
            if not prompt or is_over():
                continue
            with switched_off(model):
                base = _answer(model, tokenizer, prompt, is_over)
            adapted = _answer(model, tokenizer, prompt, is_over)
            samples.append(
                Sample(
                    source=example.source,
                    prompt=tokenizer.decode(prompt),
                    expected=tokenizer.decode(expected, skip_special_tokens=True).strip(),
                    base=base,
                    adapted=adapted,
                )
            )
    finally:
        set_adapter_tensors(model, trained, where="the model")
        model.train(was_training)
    return samples


def parted(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before a row's first answer, and the answer.

    Where every token is a target, as of plain text, the prompt is the row's beginning.
    """
    tokens, targets = example.tokens.tolist(), np.flatnonzero(example.targets_mask)
    if not targets.size:
        return [], []
    begin = int(targets[0])
    others = np.flatnonzero(~example.targets_mask[begin:])
    end = begin + int(others[0]) if others.size else len(tokens)
    if begin <= 1:
        begin = max(1, min(PLAIN_TEXT_PROMPT, len(tokens) // 3))
    return tokens[:begin], tokens[begin : max(begin, end)]


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let every low-rank layer of `model` compute what its frozen layer does, while this is open."""
    layers = [m for _, m in model.named_modules() if isinstance(m, LoRALinear | LoRAEmbedding)]
    classes = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = _PlainEmbedding if isinstance(layer, LoRAEmbedding) else _PlainLinear
    try:
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


class _PlainLinear(LoRALinear):
    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


class _PlainEmbedding(LoRAEmbedding):
    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embedding(tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of a head that is tied to this embedding, without the update."""
        return self.embedding.as_linear(x)


def _answer(model: nn.Module, tokenizer: Any, prompt: list[int], is_over: Callable[[], bool]) -> str:
    from mlx_lm.generate import stream_generate

    text, reason = "", None
    if is_over():
        return OUT_OF_TIME
    for response in stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS):
        text, reason = text + response.text, response.finish_reason
        if is_over():
            break
    return text.strip() + ("" if reason == "stop" else CUT)
