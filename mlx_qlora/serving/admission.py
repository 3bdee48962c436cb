"""From a request to a job that the engine can compute."""

from __future__ import annotations

from typing import Protocol

from mlx_qlora.serving.jobs import Job
from mlx_qlora.serving.limits import Limits, Refusal, over_limit
from mlx_qlora.serving.schema import Generation

_SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)


class Sizes(Protocol):
    """What is to be known of a model."""

    @property
    def vocabulary_size(self) -> int:
        """Ids are below it."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""


def job_of(
    wanted: Generation, adapter: str | None, tokens: list[int], *, engine: Sizes, limits: Limits
) -> Job:
    """What to generate, checked against the vocabulary, the context and the limits.

    Raises:
        Refusal: 422 with the number that would fit.
    """
    bias = {int(token): value for token, value in (wanted.logit_bias or {}).items()}
    _check_vocabulary(wanted, bias, tokens, engine.vocabulary_size)
    room = _room(wanted, tokens, engine.context_length)
    if wanted.wanted_tokens is not None and wanted.wanted_tokens > limits.max_tokens:
        raise over_limit(422, limits, "max_tokens", "That is too long an answer", param="max_tokens")
    given = {name: value for name in _SETTINGS if (value := getattr(wanted, name)) is not None}
    return Job(
        adapter=adapter,
        tokens=tokens,
        max_tokens=wanted.wanted_tokens or min(limits.max_tokens, room),
        logit_bias=bias,
        stop=wanted.stops,
        num_top_logprobs=wanted.num_top_logprobs,
        timeout_seconds=limits.request_seconds,
        **given,
    )


def _check_vocabulary(wanted: Generation, bias: dict[int, float], tokens: list[int], size: int) -> None:
    def refused(param: str, message: str) -> Refusal:
        limit = ("vocabulary_size", size)
        return Refusal(422, f"{param}: {message}", param=param, code="vocabulary_size", limit=limit)

    for param, ids in (("logit_bias", bias), ("prompt", tokens)):
        unknown = next((token for token in ids if not 0 <= token < size), None)
        if unknown is not None:
            raise refused(param, f"there is no token {unknown}; ids are 0…{size - 1}.")
    if wanted.top_k is not None and wanted.top_k > size:
        raise refused("top_k", f"{wanted.top_k} is more than the vocabulary's {size} tokens.")


def _room(wanted: Generation, tokens: list[int], context: int) -> int:
    room, asked = context - len(tokens), wanted.wanted_tokens or 1
    if not tokens:
        raise Refusal(422, "The prompt is empty.", param="prompt", code="prompt")
    if asked > room:
        raise Refusal(
            422,
            f"The prompt has {len(tokens)} tokens and {asked} are asked for; the context holds {context} "
            "(context_length).",
            param="max_tokens" if room > 0 else "prompt",
            code="context_length_exceeded",
            limit=("context_length", context),
        )
    return room
