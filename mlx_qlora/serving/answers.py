"""Answers in OpenAI's two forms, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_qlora.serving.jobs import Piece, TokenLogprob

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot be: JSON has no -inf."""


@dataclass
class Choice:
    """One answer while it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    num_characters: int = 0
    """Of the tokens told so far, for text_offset."""

    def add(self, piece: Piece) -> None:
        """Take in what a step gave."""
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.count(piece)

    def count(self, piece: Piece) -> None:
        """Take in its numbers alone."""
        self.finish_reason = piece.finish_reason
        self.prompt_tokens = piece.prompt_tokens
        self.cached_tokens = piece.cached_tokens
        self.generated_tokens = piece.generated_tokens


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of all choices together; `cached_tokens` of the prompts were not computed again."""
    prompt = sum(choice.prompt_tokens for choice in choices)
    generated = sum(choice.generated_tokens for choice in choices)
    cached = sum(choice.cached_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class ChatForm:
    """chat.completion and chat.completion.chunk.

    Args:
        model: The name the client asked for.
        num_logprobs: None when none were asked for.
        includes_usage: Every chunk has a usage field, null but in the last.
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, *, has_logprobs: bool, includes_usage: bool) -> None:
        self.has_logprobs, self.includes_usage = has_logprobs, includes_usage
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one object."""
        done = [
            {"index": index, **self._whole_choice(choice), "finish_reason": choice.finish_reason}
            for index, choice in enumerate(choices)
        ]
        return {**self.head, "object": self.kind, "choices": done, "usage": usage(choices)}

    def opening(self, index: int) -> bytes | None:
        """The chunk before the first text: whose turn it is."""
        return self._event([{"index": index, "delta": {"role": "assistant", "content": ""},
                             "logprobs": None, "finish_reason": None}])  # fmt: skip

    def chunk(self, index: int, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> bytes | None:
        """What is new in a choice; None when there is nothing to tell."""
        if not text and not logprobs and choice.finish_reason is None:
            return None
        told = self._new_text(choice, text, logprobs)
        return self._event([{"index": index, **told, "finish_reason": choice.finish_reason}])

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """The usage, when it was asked for, and the end of the stream."""
        end = b"data: [DONE]\n\n"
        return self._event([], usage(choices)) + end if self.includes_usage else end

    def _event(self, choices: list[dict[str, Any]], numbers: dict[str, Any] | None = None) -> bytes:
        chunk = {**self.head, "object": self.chunk_kind, "choices": choices}
        if self.includes_usage:
            chunk["usage"] = numbers
        return b"data: " + encoded(chunk) + b"\n\n"

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice, choice.logprobs)}

    def _new_text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(choice, logprobs)}

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:  # noqa: ARG002
        if not self.has_logprobs:
            return None
        content = [
            {
                **_token(each.text, each.logprob),
                "top_logprobs": [_token(text, logprob) for _, text, logprob in each.top],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}


class TextForm(ChatForm):
    """text_completion, whose chunks look like the whole."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def opening(self, index: int) -> bytes | None:  # noqa: ARG002
        """There is none."""
        return None

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._logprobs(choice, choice.logprobs)}

    def _new_text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(choice, logprobs)}

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        offsets = []
        for each in logprobs:
            offsets.append(choice.num_characters)
            choice.num_characters += len(each.text)
        return {
            "tokens": [each.text for each in logprobs],
            "token_logprobs": [_finite(each.logprob) for each in logprobs],
            "top_logprobs": [
                {text: _finite(logprob) for _, text, logprob in reversed(each.top)} for each in logprobs
            ],
            "text_offset": offsets,
        }


def encoded(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8"))}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if logprob == logprob else LOWEST_LOGPROB
