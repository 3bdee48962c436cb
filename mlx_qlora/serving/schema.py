"""What a client may send: OpenAI's fields, ranges checked, nothing ignored in silence that changes an answer.

A field is one of four kinds. *Served*: declared below. *Harmless*: about the caller or the service, not the
answer; accepted and ignored, because OpenAI's clients send them by themselves. *Known, not served*: refused
by name unless it says nothing (null, an empty list, its default). *Unknown*: refused by name, because a
misspelt ``max_token`` that is ignored gives a wrong answer that nobody notices.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from mlx_qlora.errors import listed
from mlx_qlora.serving.limits import Refusal

NON_TEXT = "only text is served here; nothing is ever fetched"
TOOLS = "this server calls no tools"
_NOTHING: tuple[Any, ...] = (None, [], {}, "", False)

Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Strict(BaseModel):
    """A JSON object whose types are not guessed and whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    NOT_SERVED: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {}
    """Fields of OpenAI's that would change the answer: why not, and values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value.keys() & cls.NOT_SERVED.keys():
            why, harmless = cls.NOT_SERVED[name]
            if not any(value[name] == each and type(value[name]) is type(each) for each in harmless):
                raise PydanticCustomError(
                    "not_served", "{name} is not served: {why}", {"name": name, "why": why}
                )
        return {name: each for name, each in value.items() if name not in cls.NOT_SERVED}


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    NOT_SERVED: ClassVar = {
        "tool_calls": (TOOLS, _NOTHING),
        "function_call": (TOOLS, _NOTHING),
        "tool_call_id": (TOOLS, _NOTHING),
        "audio": (NON_TEXT, _NOTHING),
        "refusal": ("a refusal is not part of a prompt", _NOTHING),
        "annotations": ("annotations are not part of a prompt", _NOTHING),
        "reasoning_content": ("reasoning is not part of a prompt", _NOTHING),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    """Accepted and ignored: chat templates have no place for it."""

    @field_validator("role", mode="before")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise ValueError(f"role {value!r} is not served: {TOOLS}")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            for part in value:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind != "text":
                    raise ValueError(f"content of type {kind!r} is not served: {NON_TEXT}")
        return value

    def as_turn(self) -> dict[str, str]:
        """Role and text, as chat templates read them; a developer's turn is a system's."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """How a stream is told."""

    include_usage: bool | None = None
    """One more chunk before the end, with the number of tokens."""
    include_obfuscation: bool | None = None
    """Accepted and ignored: no padding is sent."""


class Generation(Strict, ABC):
    """What both endpoints take. Temperature is 0 when not given, as in `mlx-qlora infer`."""

    NOT_SERVED: ClassVar = {
        "tools": (TOOLS, _NOTHING),
        "tool_choice": (TOOLS, (*_NOTHING, "none", "auto")),
        "functions": (TOOLS, _NOTHING),
        "function_call": (TOOLS, (*_NOTHING, "none", "auto")),
        "response_format": ("answers are plain text", (*_NOTHING, {"type": "text"})),
        "modalities": (NON_TEXT, (*_NOTHING, ["text"])),
        "audio": (NON_TEXT, _NOTHING),
        "prediction": ("predicted outputs are not used", _NOTHING),
        "web_search_options": ("nothing is ever fetched", _NOTHING),
        "best_of": ("there is one answer to a prompt", (*_NOTHING, 1)),
        "echo": ("the prompt is not repeated", _NOTHING),
        "suffix": ("nothing is filled in before a suffix", _NOTHING),
        "verbosity": ("ask for it in the prompt", (*_NOTHING, "medium")),
        "reasoning_effort": ("ask for it in the prompt", _NOTHING),
    }

    model: Annotated[str, Field(max_length=256)]
    """`base`, the base model's name, or an adapter's."""
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    """Sample among so many of the likeliest tokens; 0 is off. Not OpenAI's."""
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    """Sample among tokens of this fraction of the best one's probability. Not OpenAI's."""
    repetition_penalty: Annotated[float | None, Field(ge=0.1, le=10)] = None
    """Divides the logits of tokens already seen; 1 is off. Not OpenAI's."""
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[dict[TokenId, Bias] | None, Field(max_length=1024)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    """Go on to max_tokens; for measurements. Not OpenAI's."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    """There is one answer to a prompt."""
    user: Annotated[Any, Field(description="Accepted and ignored.")] = None
    metadata: Annotated[Any, Field(description="Accepted and ignored.")] = None
    store: Annotated[Any, Field(description="Accepted and ignored: nothing is stored.")] = None
    service_tier: Annotated[Any, Field(description="Accepted and ignored.")] = None
    safety_identifier: Annotated[Any, Field(description="Accepted and ignored.")] = None
    prompt_cache_key: Annotated[Any, Field(description="Accepted and ignored.")] = None
    prompt_cache_retention: Annotated[Any, Field(description="Accepted and ignored.")] = None
    parallel_tool_calls: Annotated[Any, Field(description="Accepted and ignored.")] = None

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer asked for."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """None for no log-probabilities at all."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts the answer ends before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer asked for, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """0 is the chosen token's alone."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true")
        if None not in (self.max_tokens, names := self.max_completion_tokens) and self.max_tokens != names:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number, and differ")
        return self


class CompletionRequest(Generation):
    """The body of /v1/completions: text or token ids to be continued, or several of them."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None

    @property
    def num_top_logprobs(self) -> int | None:
        """OpenAI's own form: so many of the best at each place."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One item a choice."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if is_one else given


Request = TypeVar("Request", bound=Generation)


def parsed(kind: type[Request], value: Any) -> Request:
    """`value` as a request.

    Raises:
        Refusal: 422 with every problem, each with its field's name.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        lines = list(dict.fromkeys(_said(each, kind) for each in problems))
        message = lines[0] if len(lines) == 1 else "several fields are wrong:\n" + listed(lines)
        raise Refusal(422, message, param=_param(problems[0]), code="invalid_value") from None


_SAID_AS_ONE = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists; none empty",
    "stop": "a text of 1 to 256 characters, or a list of at most 16",
}
"""Fields of several types: pydantic would list what is wrong with each."""


def _param(problem: ErrorDetails) -> str | None:
    where = problem["loc"]
    return str(where[0]) if where else problem.get("ctx", {}).get("name")


def _said(problem: ErrorDetails, model: type[Generation]) -> str:
    where, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), model.model_fields, n=1)
        return f"{where[-1]!r} is not a field this server knows" + (f"; is it {near[0]!r}?" if near else "")
    if where and where[0] in _SAID_AS_ONE:
        return f"{where[0]}: {_SAID_AS_ONE[str(where[0])]}"
    if not where and problem["type"] == "model_type":
        return "the body has to be a JSON object"
    if "content" in where and not message.startswith("content of"):
        where, message = where[: where.index("content") + 1], "a text, or a list of text parts"
    # between the fields' names pydantic puts those of a union's members
    path = ".".join(str(part) for part in where if isinstance(part, int) or part.isidentifier())
    return f"{path}: {message}" if path else message
