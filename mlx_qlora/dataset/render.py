"""From conversations to tokens: one template, one loss mask, the same for training and inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.records import BadRow, Example, Message, Record

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'User: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""For base models that bring no template of their own; kept in the adapter."""

_BEGIN = "{{ bos_token }}"
# Private-use characters: they stand for a turn's text while the template around it is rendered.
_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True)
class Rendered:
    """A row as tokens, before truncation."""

    tokens: list[int]
    targets: list[bool]


def ensure_chat_template(tokenizer: Any, template: str | None = None) -> str:
    """Give a tokenizer this chat template, or the default one if it has none; the one in use.

    Args:
        template: Replaces the tokenizer's own, as when an adapter was trained with another.
    """
    inner = _inner(tokenizer)
    if template is not None:
        inner.chat_template = template
    elif not inner.chat_template and not getattr(tokenizer, "has_chat_template", False):
        begins = inner.bos_token_id is not None and inner("a")["input_ids"][:1] == [inner.bos_token_id]
        inner.chat_template = (_BEGIN if begins else "") + DEFAULT_CHAT_TEMPLATE
    if inner is not tokenizer and inner.chat_template:
        tokenizer.has_chat_template = True
    return template_of(tokenizer)


def template_of(tokenizer: Any) -> str:
    """The chat template in use, as text."""
    return _inner(tokenizer).chat_template or ""


def render_prompt(tokenizer: Any, messages: Sequence[Message], system_prompt: str | None = None) -> list[int]:
    """The tokens after which the model answers: what stands before the answer in training.

    Args:
        messages: The conversation so far; its last turn is not the assistant's.
        system_prompt: Put before a conversation that has no system turn.
    """
    ensure_chat_template(tokenizer)
    messages = with_system_prompt(tokenizer, messages, system_prompt)
    return _encoded(tokenizer, messages, prompt=True).tokens


def render(tokenizer: Any, record: Record, config: DataConfig) -> Rendered:
    """A row's tokens and which of them are targets.

    Every assistant turn is a target, with the tokens that end it; of plain text, everything.

    Raises:
        BadRow: the template refuses the conversation, or cannot be masked.
    """
    if record.text is not None:
        return _rendered_text(tokenizer, record.text)
    messages = with_system_prompt(tokenizer, record.messages, config.system_prompt)
    rendered = _encoded(tokenizer, messages, prompt=False)
    if config.loss_on == "all":
        return Rendered(rendered.tokens, [True] * len(rendered.tokens))
    return rendered


def truncated(rendered: Rendered, config: DataConfig, eos: int | None, source: str) -> Example | None:
    """The row within max_seq_length; None when it is to be dropped.

    A row that is cut ends in EOS, which is a target: the model still learns to stop.
    """
    tokens, targets = rendered.tokens, rendered.targets
    if len(tokens) > config.max_seq_length:
        if config.truncation == "drop":
            return None
        tokens, targets = tokens[: config.max_seq_length], targets[: config.max_seq_length]
        if eos is not None and any(targets[1:]):
            tokens, targets = [*tokens[:-1], eos], [*targets[:-1], True]
    mask = np.array(targets, bool)
    mask[:1] = False
    return Example(np.array(tokens, np.int32), mask, source)


def with_system_prompt(
    tokenizer: Any, messages: Sequence[Message], system_prompt: str | None
) -> list[Message]:
    """The conversation with a system turn; merged into the first user turn where a template has none."""
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return list(messages)
    whole = [{"role": "system", "content": system_prompt}, *messages]
    try:
        text = _as_text(tokenizer, whole, prompt=whole[-1]["role"] != "assistant")
    except BadRow:
        text = ""
    if system_prompt.strip() in text:
        return whole
    first, *rest = messages
    return [{**first, "content": f"{system_prompt}\n\n{first['content']}"}, *rest]


def _encoded(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> Rendered:
    """Tokens of a conversation. A turn that spells a control token must not become one.

    Ordinary conversations are rendered and tokenized in one go, exactly as the tokenizer itself would.
    Where a turn contains the text of a special token, turns and template are tokenized apart, the turns
    with special tokens switched off.
    """
    specials = [token for token in _inner(tokenizer).all_special_tokens if token]
    if any(token in message["content"] for message in messages for token in specials):
        return _encoded_apart(tokenizer, messages, prompt=prompt)
    text, spans = _spans(tokenizer, messages, prompt=prompt)
    encoding = _inner(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=bool(spans))
    tokens = list(encoding["input_ids"])
    if not spans:
        return Rendered(tokens, [False] * len(tokens))
    ends = [end for _, end in encoding["offset_mapping"]]
    return Rendered(tokens, [any(a < end <= b for a, b in spans) for end in ends])


def _encoded_apart(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> Rendered:
    held = [{**message, "content": f"{_OPEN}{number}{_CLOSE}"} for number, message in enumerate(messages)]
    text, spans = _spans(tokenizer, held, prompt=prompt)
    inner = _inner(tokenizer)
    tokens: list[int] = []
    targets: list[bool] = []
    cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
    for begin, end in pairwise(cuts):
        is_target = any(a <= begin and end <= b for a, b in spans)
        for piece, is_content in _pieces(text[begin:end], messages):
            part = inner(piece, add_special_tokens=False, split_special_tokens=is_content)["input_ids"]
            tokens += part
            targets += [is_target] * len(part)
    return Rendered(tokens, targets)


def _pieces(text: str, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Template text and turns' text, in order; True marks a turn's."""
    first, *rest = text.split(_OPEN)
    pieces = [(first, False)]
    for chunk in rest:
        number, _, template = chunk.partition(_CLOSE)
        pieces += [(messages[int(number)]["content"], True), (template, False)]
    return [(piece, is_content) for piece, is_content in pieces if piece]


def _spans(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and where in it the assistant's turns stand; none for a prompt.

    Raises:
        BadRow: what stands before an answer is not how the whole begins, so it cannot be masked.
    """
    text = _as_text(tokenizer, messages, prompt=prompt)
    spans = []
    for index, message in enumerate(messages):
        if prompt or message["role"] != "assistant":
            continue
        before = _as_text(tokenizer, messages[:index], prompt=True)
        through = _as_text(tokenizer, messages[: index + 1], prompt=False)
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            raise BadRow(
                "the chat template changes earlier turns when later ones follow, so answers cannot be told "
                "from questions; --set data.loss_on=all trains on everything"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _as_text(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # whatever a template raises about roles and their order
        raise BadRow(f"the chat template refuses it: {error}") from None


def _rendered_text(tokenizer: Any, text: str) -> Rendered:
    inner = _inner(tokenizer)
    specials = [token for token in inner.all_special_tokens if token]
    is_plain = not any(token in text for token in specials)
    tokens = list(inner(text, split_special_tokens=not is_plain)["input_ids"])
    if inner.eos_token_id is not None and tokens[-1:] != [inner.eos_token_id]:
        tokens.append(inner.eos_token_id)
    return Rendered(tokens, [True] * len(tokens))


def _inner(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer inside of mlx-lm's wrapper."""
    return getattr(tokenizer, "_tokenizer", tokenizer)
