"""A conversation with a model: its turns, what fits in the context, and the keys and values kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.dataset import ensure_chat_template, render_prompt, template_of, tokenizer_sha256
from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.errors import ConfigError, DataError, StorageError
from mlx_qlora.inference.generate import Answer, Assistant, Sampling
from mlx_qlora.lora.adapter import load_adapter, read_adapter_info
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.storage import said_clearly, write_text

INTERRUPTED = "interrupted"
"""`finish_reason` of an answer that was stopped by the person who asked."""
_FROZEN = ("linear", "embedding")  # what a low-rank layer calls the layer it stands for
MIN_CONTEXT = 16
PREFILL_TOKENS = 512
"""Of a prompt, between two looks at whether the answer is still wanted."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer in a conversation, so far."""

    answer: Answer
    cached_tokens: int
    """Of the prompt: those whose keys and values were kept from the turns before."""
    dropped_pairs: int
    """Oldest questions, with their answers, that no longer fit in the context, since the turn before."""


class Chat:
    """A conversation that goes on: each question is answered knowing the turns before it.

    Args:
        assistant: The model, with its adapter if any. Its chat template is the one to return to when an
            adapter is taken off, so start from a bare model and use `switch_adapter`.
        sampling: How tokens are chosen, and how many at most.
        context: Tokens that prompt and answer may take together; None is the model's own limit.

    Attributes:
        system: System prompt; None is the adapter's own, if any.
        messages: All finished turns, in pairs of question and answer; those out of the context too.
        replies: What each answer took, one for each pair.
    """

    def __init__(
        self, assistant: Assistant, *, sampling: Sampling | None = None, context: int | None = None
    ) -> None:
        self.assistant = assistant
        self.sampling = sampling or Sampling()
        self.context = _context(assistant.base.config, context)
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.replies: list[Reply] = []
        self._first = 0  # of the messages that are still in the context
        self._kept = _KeptPrompt(assistant.model)
        self._own_template = template_of(assistant.tokenizer)

    @property
    def system_prompt(self) -> str | None:
        """The system prompt in force: the one given, or else the adapter's."""
        if self.system is not None:
            return self.system
        return self.assistant.adapter.system_prompt if self.assistant.adapter else None

    def ask(
        self, question: str, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Reply]]:
        """The answer, piece by piece; with each piece, the whole so far.

        The turn is added to the conversation when the iterator ends, stops or is closed; an answer without
        any text adds nothing, and leaves the conversation as it was.

        Args:
            should_stop: Asked between pieces, and every 512 tokens while a long prompt is being read.

        Raises:
            MlxQloraError: the question does not fit in the context, or the template refuses it.
        """
        prompt, first = self._prompt(question)
        dropped, self._first = (first - self._first) // 2, first
        layers, rest = self._kept.take(prompt)
        cached, generated, reply = len(prompt) - len(rest), list[int](), None
        started, first_token, text = time.perf_counter(), None, ""
        try:
            with (
                dense_products(self.assistant.model),
                closing(self._responses(rest, layers, self.context - len(prompt), should_stop)) as responses,
            ):
                for response in responses:
                    first_token = first_token if first_token is not None else time.perf_counter() - started
                    generated.append(response.token)
                    text += response.text
                    stopped = response.finish_reason is None and should_stop()
                    answer = Answer(
                        text=text,
                        prompt_tokens=len(prompt),
                        generation_tokens=response.generation_tokens,
                        first_token_seconds=first_token,
                        tokens_per_second=response.generation_tps,
                        finish_reason=INTERRUPTED if stopped else response.finish_reason or "",
                    )
                    reply = Reply(answer=answer, cached_tokens=cached, dropped_pairs=dropped)
                    yield response.text, reply
                    if stopped:
                        break
            self._kept.put(layers, [*prompt, *generated])
        except _Unwanted:
            pass
        finally:
            if reply is not None and text.strip():
                self._add(question, text, reply)

    def reset(self) -> None:
        """Forget all turns; model, adapter and system prompt stay."""
        self.messages, self.replies, self._first = [], [], 0

    def switch_adapter(self, folder: Path | None) -> None:
        """Take off the adapter that is attached, if any, and attach the one in `folder`; the base stays.

        Args:
            folder: None leaves the bare base model.

        Raises:
            MlxQloraError: the adapter is broken or belongs to another base; the one before is attached still.
        """
        base, model = self.assistant.base, self.assistant.model
        info = read_adapter_info(folder) if folder is not None else None
        if info is not None:
            info.check_tokenizer(tokenizer_sha256(base.tokenizer))
        before = _detach(model)
        try:
            if info is not None and folder is not None:
                load_adapter(model, folder, info, fingerprint=base.fingerprint)
        except BaseException:  # Ctrl-C too: a model that is half adapted would answer nonsense
            _detach(model)
            if before:
                model.update_modules(tree_unflatten(list(before.items())))
            raise
        finally:
            model.eval()
        ensure_chat_template(base.tokenizer, info.chat_template if info else self._own_template)
        self.assistant = Assistant(base, info)
        self._kept = _KeptPrompt(model)

    def save(self, path: Path, *, append: bool = False) -> None:
        """Write the conversation as one row of training data: a JSON object with ``messages``.

        Args:
            append: Add a row to a file that is there; without it such a file is refused.

        Raises:
            MlxQloraError: there is nothing to save, or the file is there or cannot be written.
        """
        if not self.messages:
            raise DataError("There is nothing to save yet: nothing was asked and answered.")
        if path.exists() and not append:
            raise StorageError(
                "This file is there already; nothing was touched.",
                where=str(path),
                run=f"/save --append {path}   # adds a row to it, or choose another name",
            )
        with said_clearly(path):
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        row = json.dumps({"messages": [*system, *self.messages]}, ensure_ascii=False)
        write_text(path, before + ("\n" if before and not before.endswith("\n") else "") + row + "\n")

    def _add(self, question: str, text: str, reply: Reply) -> None:
        if not reply.answer.finish_reason:  # the iterator was closed before the answer's end
            reply = replace(reply, answer=replace(reply.answer, finish_reason=INTERRUPTED))
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": text.strip()})
        self.replies.append(reply)

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """The tokens to answer, and the first message among them: as many pairs as leave an answer room."""
        room = min(self.sampling.max_tokens, self.context // 4)
        asked = {"role": "user", "content": question}
        for first in range(self._first, len(self.messages) + 1, 2):
            try:
                turns = [*self.messages[first:], asked]
                tokens = render_prompt(self.assistant.tokenizer, turns, self.system_prompt)
            except BadRow as error:
                raise DataError(f"This cannot be asked: {error}.") from None
            if len(tokens) + room <= self.context:
                return tokens, first
        if len(tokens) >= self.context:
            raise DataError(
                f"The question takes {len(tokens)} tokens, and the context holds {self.context}; "
                "ask in fewer words."
            )
        return tokens, first

    def _responses(
        self, rest: list[int], layers: list[Any], room: int, should_stop: Callable[[], bool]
    ) -> Any:
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        def look(_done: int, _total: int) -> None:
            if should_stop():
                raise _Unwanted

        sampling = self.sampling
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        return stream_generate(
            self.assistant.model,
            self.assistant.tokenizer,
            rest,
            max_tokens=min(sampling.max_tokens, room),
            sampler=make_sampler(
                temp=sampling.temperature, top_p=sampling.top_p if sampling.top_p < 1 else 0.0
            ),
            prompt_cache=layers,
            prefill_step_size=PREFILL_TOKENS,
            prompt_progress_callback=look,
        )


class _Unwanted(Exception):
    """The answer is no longer wanted, and its prompt is still being read."""


class _KeptPrompt:
    """Keys and values of the tokens a model has read, for the next prompt that begins with them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[Any] | None = None
        self.tokens: list[int] = []

    def take(self, prompt: list[int]) -> tuple[list[Any], list[int]]:
        """mlx-lm's cache of what is shared with `prompt`, and the tokens that are still to be read.

        Nothing is kept until the cache is `put` back: one that was left half-way is not to be trusted.
        """
        from mlx_lm.models.cache import make_prompt_cache

        layers, tokens = self.layers, self.tokens
        self.layers, self.tokens = None, []
        shared = _num_shared(tokens, prompt[:-1])  # the last token is always read: it gives the first logits
        if layers is not None and shared and _cut(layers, len(tokens) - shared):
            return layers, prompt[shared:]
        return make_prompt_cache(self.model), prompt

    def put(self, layers: list[Any], tokens: list[int]) -> None:
        """Keep a cache that has read exactly `tokens`."""
        self.layers, self.tokens = layers, tokens


def _num_shared(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _cut(layers: list[Any], num_tokens: int) -> bool:
    """Forget the last tokens; False where a model's cache cannot (a window that has slid, a state)."""
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

    if num_tokens == 0:
        return True
    return can_trim_prompt_cache(layers) and trim_prompt_cache(layers, num_tokens) == num_tokens


def _detach(model: nn.Module) -> dict[str, nn.Module]:
    """Put the frozen layers back in place of the low-rank ones; these, by path."""
    adapted = {path: module for path, module in model.named_modules() if "lora_a" in module}
    frozen = [(path, module[next(k for k in _FROZEN if k in module)]) for path, module in adapted.items()]
    if frozen:
        model.update_modules(tree_unflatten(frozen))
    return adapted


def check_context(asked: int | None) -> None:
    """Refuse a context that is too short for a question and an answer.

    Raises:
        ConfigError: it is.
    """
    if asked is not None and asked < MIN_CONTEXT:
        raise ConfigError(f"A context of {asked} tokens holds no conversation.", run="mlx-qlora chat --help")


def _context(config: dict[str, Any], asked: int | None) -> int:
    """Tokens the model was made for, or fewer if asked for fewer; without either, a number never reached."""
    text = config.get("text_config")
    limits = [each.get("max_position_embeddings") for each in (config, text or {}) if isinstance(each, dict)]
    own = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    check_context(asked)
    known = [limit for limit in (own, asked) if limit is not None]
    return min(known) if known else 2**31
