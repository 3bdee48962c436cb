"""What the engine is asked for and what it answers, and where an answer's text ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mlx_qlora.errors import ConfigError, MlxQloraError, listed

FinishReason = Literal["stop", "length", "timeout", "cancelled"]
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One text to generate."""

    adapter: str | None
    """A name given at start; None is the base alone."""
    tokens: list[int]
    """The rendered prompt, at least one token."""
    max_tokens: int
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 is all."""
    min_p: float = 0.0
    """Draw among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen, prompt included, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were generated."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time it was generated."""
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    """Added to the logits of these tokens."""
    seed: int | None = None
    """The same text for the same seed, whatever else runs; None draws a seed."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these to be complete."""
    ignore_eos: bool = False
    """Go on to max_tokens, as a benchmark needs it."""
    num_top_logprobs: int | None = None
    """None: no log-probabilities; else the chosen token's, and those of so many of the likeliest."""
    timeout_seconds: float | None = None
    """From submission; time in the queue counts."""


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log-probability in nats, after penalties and bias, before temperature."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]
    """The likeliest tokens of that step, best first: id, text, log-probability."""


@dataclass(frozen=True)
class Piece:
    """What a step gave. The text may be empty: a stop string may have begun, or a character is not whole."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text begins in what was given so far."""
    finish_reason: FinishReason | None = None
    """Set on the last piece only."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those that did not have to be computed again."""
    generated_tokens: int = 0
    """So far; the one that ended the text is among them."""


class JobFailed(MlxQloraError):
    """One job could not be finished; the others go on."""


class QueueFull(MlxQloraError):
    """No job more is taken before one ends.

    Args:
        limit: How many may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"The queue is full: {limit} requests wait already.")


class EngineStopped(MlxQloraError):
    """The engine takes no job: it is draining, was stopped, or is dead."""


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and how many jobs there are now."""

    num_queued: int
    num_running: int
    num_finished: int
    """Ended by themselves, by their length or by their time limit."""
    num_cancelled: int
    num_failed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    is_alive: bool


def check_job(job: Job, *, vocabulary_size: int, context_length: int) -> None:
    """Refuse what the engine cannot compute.

    Raises:
        ConfigError: values are out of range; all of them are listed.
    """

    def is_finite(*values: float) -> bool:
        return all(math.isfinite(value) for value in values)

    room = context_length - len(job.tokens)
    checks = (
        (bool(job.tokens), "the prompt has no tokens"),
        (all(0 <= token < vocabulary_size for token in job.tokens), "the prompt holds an unknown token"),
        (
            1 <= job.max_tokens <= room,
            f"max_tokens must be in 1…{room}, what the prompt leaves of {context_length}, "
            f"not {job.max_tokens}",
        ),
        (is_finite(job.temperature) and job.temperature >= 0, "temperature must be ≥ 0"),
        (0 < job.top_p <= 1, "top_p must be in (0, 1]"),
        (job.top_k >= 0, "top_k must be ≥ 0"),
        (0 <= job.min_p <= 1, "min_p must be in [0, 1]"),
        (
            is_finite(job.repetition_penalty) and job.repetition_penalty > 0,
            "repetition_penalty must be above 0",
        ),
        (
            is_finite(job.presence_penalty, job.frequency_penalty),
            "presence_penalty and frequency_penalty must be finite",
        ),
        (
            all(0 <= token < vocabulary_size for token in job.logit_bias),
            f"logit_bias must name tokens in 0…{vocabulary_size - 1}",
        ),
        (is_finite(*job.logit_bias.values()), "logit_bias must be finite"),
        (all(job.stop), "stop strings must not be empty"),
        (
            job.num_top_logprobs is None or 0 <= job.num_top_logprobs <= MAX_TOP_LOGPROBS,
            f"num_top_logprobs must be in 0…{MAX_TOP_LOGPROBS}",
        ),
        (job.timeout_seconds is None or job.timeout_seconds > 0, "timeout_seconds must be above 0"),
    )
    problems = [message for is_right, message in checks if not is_right]
    if problems:
        raise ConfigError(f"This job cannot be computed:\n{listed(problems)}")


class StopText:
    """A stream of text that ends before the first stop string to be complete.

    What may be the beginning of one is held back until it is known, so the text given does not depend on
    the pieces in which it came.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that can be given now, and whether a stop string is complete."""
        if not self._stop:
            return text, False
        whole = self._held + text
        found = [(at + len(word), at) for word in self._stop if (at := whole.find(word)) >= 0]
        if found:
            self._held = ""
            return whole[: min(found)[1]], True
        kept = len(whole) - self._num_open(whole)
        self._held = whole[kept:]
        return whole[:kept], False

    def flush(self) -> str:
        """What is still held: nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _num_open(self, whole: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(len(whole), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            if any(word.startswith(whole[-size:]) for word in self._stop):
                return size
        return 0


class AnswerText:
    """From tokens to the text of an answer, with each token's log-probability beside its text.

    Args:
        detokenizer: mlx-lm's streaming detokenizer, of this answer alone.
        num_tokens: Tokens that the tokenizer knows; a model may have more, which have no text.
    """

    def __init__(self, detokenizer: Any, stop: tuple[str, ...], num_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._stop = StopText(stop)
        self._num_tokens = num_tokens
        self._num_made, self._num_given = 0, 0
        self._waiting: list[tuple[int, TokenLogprob]] = []

    def add(self, token: int, logprob: TokenLogprob | None) -> tuple[str, tuple[TokenLogprob, ...], bool]:
        """Text and log-probabilities that can be given now, and whether a stop string is complete."""
        if logprob is not None:
            self._waiting.append((self._num_made, logprob))
        if token < self._num_tokens:
            self._detokenizer.add_token(token)
        text, is_stopped = self._stop.add(self._made())
        return text, self._released(text, everything=False), is_stopped

    def finish(self) -> tuple[str, tuple[TokenLogprob, ...], bool]:
        """The same for what was held back: no token more comes."""
        self._detokenizer.finalize()
        text, is_stopped = self._stop.add(self._made())
        if not is_stopped:
            text += self._stop.flush()
        return text, self._released(text, everything=not is_stopped), is_stopped

    def _made(self) -> str:
        text: str = self._detokenizer.last_segment
        self._num_made += len(text)
        return text

    def _released(self, text: str, *, everything: bool) -> tuple[TokenLogprob, ...]:
        self._num_given += len(text)
        ready = [entry for begin, entry in self._waiting if everything or begin < self._num_given]
        self._waiting = self._waiting[len(ready) :]  # they begin in order
        return tuple(ready)
