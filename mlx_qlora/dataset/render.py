"""From conversations to tokens: one template, one loss mask, the same for training and inference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.encoding import encoder_of, inner_of
from mlx_qlora.dataset.prompt_template import begins_with_bos, chat_template_of, check_shows_turns
from mlx_qlora.dataset.records import Example, Message, Record
from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.dataset.template_limits import check_template, time_limit
from mlx_qlora.errors import ModelError

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% else %}{{ 'User: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For base models that bring no template of their own; kept in the adapter. The prompt ends before the
space, because tokenizers join a space with the word that follows it."""

_BEGIN = "{{ bos_token }}"


@dataclass(frozen=True)
class Rendered:
    """A row as tokens, before truncation."""

    tokens: list[int]
    targets: list[bool]


class Unmaskable(BadRow):
    """The chat template does not show which tokens of a conversation are answers."""


class Unlabelled(BadRow):
    """Nothing of the row that fits the window is a target."""


def ensure_chat_template(tokenizer: Any, template: str | None = None) -> str:
    """Give a tokenizer this chat template, or the default one if it has none; the one in use.

    Args:
        template: Replaces the tokenizer's own, as when an adapter was trained with another.
    """
    inner = inner_of(tokenizer)
    if template is not None:
        inner.chat_template = template
    elif not has_chat_template(tokenizer):
        inner.chat_template = (_BEGIN if begins_with_bos(inner) else "") + DEFAULT_CHAT_TEMPLATE
    if inner is not tokenizer and inner.chat_template:
        tokenizer.has_chat_template = True  # mlx-lm's wrapper looks only once, when it is made
    return template_of(tokenizer)


def ensure_prompt_template(tokenizer: Any, config: DataConfig) -> str:
    """Give a tokenizer the template that a run's data asks for: data.prompt_template, its own, the default.

    Raises:
        ConfigError: data.prompt_template is broken, or leaves out what is said.
    """
    if config.prompt_template is None:
        return ensure_chat_template(tokenizer)
    used = ensure_chat_template(tokenizer, chat_template_of(config.prompt_template, tokenizer))
    check_shows_turns(tokenizer, as_text)
    return used


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer brings a chat template, as Jinja or, in mlx-lm's wrapper, as code."""
    return bool(inner_of(tokenizer).chat_template) or bool(getattr(tokenizer, "has_chat_template", False))


def template_of(tokenizer: Any) -> str:
    """The chat template in use, as text; of several, the default one."""
    template = inner_of(tokenizer).chat_template or ""
    return template if isinstance(template, str) else str(template.get("default", ""))


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of the chat template in use, as hexadecimal digits."""
    return hashlib.sha256(template_of(tokenizer).encode("utf-8")).hexdigest()


def render_prompt(tokenizer: Any, messages: Sequence[Message], system_prompt: str | None = None) -> list[int]:
    """The tokens after which the model answers: what stands before the answer in training.

    Args:
        messages: The conversation so far; its last turn is not the assistant's.
        system_prompt: Put before a conversation that has no system turn.
    """
    ensure_chat_template(tokenizer)
    return _encoded(tokenizer, with_system_prompt(tokenizer, messages, system_prompt), prompt=True).tokens


def render(tokenizer: Any, record: Record, config: DataConfig) -> Rendered:
    """A row's tokens and which of them are targets.

    Every assistant turn is a target, with the tokens that end it; of plain text, everything.

    Raises:
        BadRow: the template refuses the conversation, or (Unmaskable) does not show its answers.
    """
    if record.text is not None:
        return _rendered_text(tokenizer, record.text)
    messages = with_system_prompt(tokenizer, record.messages, config.system_prompt)
    return _encoded(tokenizer, messages, prompt=False, all_targets=config.loss_on == "all")


def truncated(rendered: Rendered, config: DataConfig, stops: Sequence[int], source: str) -> Example | None:
    """The row within max_seq_length; None when it is to be dropped.

    A row that is cut ends in EOS, which is a target: the model still learns to stop. Cut inside of a later
    question, it ends where the answer before it does; without any answer's word, nothing is left.

    Args:
        stops: Tokens that end an answer, EOS first.
    """
    tokens, targets = rendered.tokens, rendered.targets
    limit = config.max_seq_length
    if len(tokens) > limit:
        if config.truncation == "drop":
            return None
        kept = limit
        if targets[kept - 1] and not targets[kept - 2] and tokens[kept - 1] not in stops:
            kept -= 1  # of this answer only EOS would be left, which teaches silence
        while kept and not targets[kept - 1]:
            kept -= 1
        tokens, targets = tokens[:kept], targets[:kept]
        if kept and stops and tokens[-1] not in stops:
            room = min(kept, limit - 1)
            tokens, targets = [*tokens[:room], stops[0]], [*targets[:room], True]
    mask = np.array(targets, bool)
    mask[:1] = False
    return Example(np.array(tokens, np.int32), mask, source)


def example_of(
    tokenizer: Any, record: Record, config: DataConfig, stops: Sequence[int]
) -> tuple[Rendered, Example | None]:
    """A row as tokens, whole and within max_seq_length; None when it is to be dropped.

    Raises:
        BadRow: it cannot be rendered, or has no token to learn.
    """
    rendered = render(tokenizer, record, config)
    example = truncated(rendered, config, stops, record.source)
    if example is not None and not example.targets_mask.any():
        raise Unlabelled(
            f"its prompt fills the window of {config.max_seq_length} tokens (the row has "
            f"{len(rendered.tokens)}), so it has no token to learn"
        )
    return rendered, example


def stop_tokens(tokenizer: Any) -> list[int]:
    """The tokens that end an answer, EOS first."""
    inner = inner_of(tokenizer)
    eos = inner.eos_token_id
    # Hugging Face's own answers to this name too, with a single number.
    others = tokenizer.eos_token_ids if tokenizer is not inner else ()
    return [*([eos] if eos is not None else []), *sorted(set(others) - {eos})]


def with_system_prompt(
    tokenizer: Any, messages: Sequence[Message], system_prompt: str | None
) -> list[Message]:
    """The conversation with a system turn; merged into the first user turn where a template has none."""
    whole = list(messages)
    if system_prompt is not None and not any(message["role"] == "system" for message in messages):
        whole = [{"role": "system", "content": system_prompt}, *messages]
    starts_with_system = [message["role"] for message in whole[:2]] == ["system", "user"]
    if not starts_with_system or has_system_role(tokenizer):
        return whole
    system, first, *rest = whole
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def has_system_role(tokenizer: Any) -> bool:
    """Whether the chat template shows a system turn; some refuse it, some leave it out."""
    probe = [{"role": "system", "content": "MLXQLORA"}, {"role": "user", "content": "?"}]
    try:
        return "MLXQLORA" in as_text(tokenizer, probe, prompt=True)
    except BadRow:
        return False


def _encoded(
    tokenizer: Any, messages: Sequence[Message], *, prompt: bool, all_targets: bool = False
) -> Rendered:
    """Tokens of a conversation: exactly the tokenizer's own, unless a turn spells a control token
    or an answer's first letters would join the prompt's last ones (see `Encoder`)."""
    encoder = encoder_of(tokenizer)
    hidden = any(encoder.spells_control(message["content"]) for message in messages)
    if hidden:
        messages = [{**message, "content": encoder.hide(message["content"])} for message in messages]
    text = as_text(tokenizer, messages, prompt=prompt)
    try:
        spans = _answer_spans(tokenizer, messages, text, prompt=prompt)
    except Unmaskable:
        if not (prompt or all_targets):
            raise
        spans = []
    ends = [edge for span in spans for edge in span]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    tokens, counts = encoder.encode(text, ends, hidden=hidden)
    targets = [all_targets] * len(tokens)
    for first, last in zip(counts[::2], counts[1::2], strict=False):
        targets[first:last] = [True] * (last - first)
    return Rendered(tokens, targets)


def _answer_spans(
    tokenizer: Any, messages: Sequence[Message], text: str, *, prompt: bool
) -> list[tuple[int, int]]:
    """Where in the rendered text the assistant's turns stand, each through the tokens that end it.

    Raises:
        Unmaskable: what stands before an answer is not how the whole begins.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = as_text(tokenizer, messages[:index], prompt=True)
        is_last = not prompt and index == len(messages) - 1
        through = text if is_last else as_text(tokenizer, messages[: index + 1], prompt=False)
        end = _answer_end(tokenizer, text, len(before), through, message) if text.startswith(before) else None
        if end is None:
            raise Unmaskable(
                "the chat template changes earlier turns when later ones follow, so answers cannot be told "
                "from questions; data.loss_on=all trains on everything"
            )
        spans.append((len(before), end))
    return spans


def _answer_end(tokenizer: Any, text: str, begin: int, through: str, message: Message) -> int | None:
    encoder = encoder_of(tokenizer)
    if text.startswith(through) and len(through) > begin:
        # A line break that the template writes after the end of a turn is never generated.
        shown = through.rstrip()
        return len(shown) if encoder.ends_with_control(shown) and len(shown) > begin else len(through)
    # Templates that shorten the thoughts of earlier turns: the answer itself, and the control token after it.
    answer = message["content"].strip()
    at = _after_space(text, begin)
    if not text.startswith(answer, at):
        return None
    closing = _after_space(text, at + len(answer))  # an answer may end in spaces that a template keeps
    end = encoder.control_end(text, closing)
    return end if end > closing else None


def _after_space(text: str, begin: int) -> int:
    return len(text) - len(text[begin:].lstrip())


def as_text(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    """A conversation as the chat template writes it, within the template's limits.

    Args:
        prompt: Whether the answer comes next.

    Raises:
        BadRow: the template refuses the conversation.
        ModelError: the template is forbidden, or takes too long.
    """
    check_template(template_of(tokenizer))
    try:
        with time_limit():
            return str(
                tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
            )
    except ModelError:
        raise
    except Exception as error:  # whatever a template raises about roles and their order
        raise BadRow(f"the chat template refuses it: {error}") from None


def _rendered_text(tokenizer: Any, text: str) -> Rendered:
    """Plain text was laid out by its author: control tokens in it are meant, and BOS or EOS not doubled."""
    inner = inner_of(tokenizer)
    tokens = list(inner(text, verbose=False)["input_ids"])
    if inner.bos_token_id is not None and tokens[:2] == [inner.bos_token_id] * 2:
        tokens = tokens[1:]
    if inner.eos_token_id is not None and tokens[-1:] != [inner.eos_token_id]:
        tokens.append(inner.eos_token_id)
    return Rendered(tokens, [True] * len(tokens))
