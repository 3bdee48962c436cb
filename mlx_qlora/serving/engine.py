"""The generation engine: one thread that owns the model and all of MLX's work, and many jobs in one batch."""

from __future__ import annotations

import copy
import functools
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.dataset import ensure_chat_template, render_prompt, tokenizer_sha256
from mlx_qlora.dataset.encoding import inner_of
from mlx_qlora.dataset.render import stop_tokens
from mlx_qlora.errors import AdapterError, ConfigError
from mlx_qlora.lora.adapter import AdapterInfo, read_adapter_info
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.serving.batch import Batch
from mlx_qlora.serving.generation import Desk, Generation, Listener, Observe, Running
from mlx_qlora.serving.jobs import (
    AnswerText,
    EngineStats,
    EngineStopped,
    Job,
    JobFailed,
    Piece,
    QueueFull,
    TokenLogprob,
    check_job,
)
from mlx_qlora.serving.prompt_cache import DEFAULT_PROMPT_CACHE_BYTES, PromptCache
from mlx_qlora.serving.row_lora import BASE, RowAdapters, attach_rows, read_updates
from mlx_qlora.weights.loader import BaseModel, load_base

__all__ = [
    "Engine",
    "EngineStats",
    "EngineStopped",
    "Job",
    "JobFailed",
    "Piece",
    "QueueFull",
    "Ticket",
    "TokenLogprob",
]

DEFAULT_CONTEXT_LENGTH = 4096
"""Where a model's configuration does not say how many positions it knows."""


class Ticket:
    """A submitted job, to be cancelled."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def cancel(self) -> None:
        """End the job at the next step, if it has not ended; its listener gets a last piece."""
        self._cancel()


@dataclass(frozen=True)
class _Loaded:
    """What the generation thread has loaded; the tokenizers are for any thread, one at a time."""

    base: BaseModel
    adapters: RowAdapters
    tokenizers: dict[str | None, Any]
    system_prompts: dict[str | None, str | None]
    vocabulary_size: int


class Engine:
    """Generates for many jobs at once, each with the base or with one of its adapters. See `start`."""

    def __init__(
        self,
        model: str,
        adapter_names: Sequence[str],
        desk: Desk,
        *,
        prompt_cache_bytes: int = DEFAULT_PROMPT_CACHE_BYTES,
        on_death: Callable[[BaseException], None] | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.model_name = model
        """Hub id or folder of the base."""
        self.adapter_names = tuple(adapter_names)
        """What jobs can call."""
        self.vocabulary_size = 0
        """Tokens 0 to this - 1 have a logit."""
        self.context_length = DEFAULT_CONTEXT_LENGTH
        """Positions the model knows, prompt and answer together."""
        self._rows_of: dict[str | None, int] = {None: BASE}
        self._rows_of.update({name: row for row, name in enumerate(adapter_names, start=BASE + 1)})
        self._desk = desk
        self._prompts = PromptCache(prompt_cache_bytes)
        self._on_death = on_death or (lambda _error: None)
        self._observe = observe or (lambda _name, _seconds: None)
        self._tokenizing = threading.Lock()
        self._loaded: _Loaded | None = None
        self._is_ready = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        model: str,
        adapters: Mapping[str, Path],
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        prompt_cache_bytes: int = DEFAULT_PROMPT_CACHE_BYTES,
        quantization: QuantizationConfig | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        on_bytes: Callable[[int, int], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        observe: Observe | None = None,
    ) -> Engine:
        """Load a base and its adapters on a thread of their own, and return when jobs can come.

        Args:
            model: Hub id or folder of the base.
            adapters: Folders of adapters by the name that jobs call them.
            max_batch: Jobs that generate at the same time.
            max_queue: Jobs that wait beyond these.
            prompt_cache_bytes: Of keys and values kept of recent texts; 0 keeps none.
            quantization: How the base is stored; None is what the adapters were trained on.
            on_bytes: Called with (done, total) while the base is being quantized.
            on_death: Called once, on the generation thread, with what ended it.
            observe: Called on the generation thread with ("first_token_seconds" | "request_seconds",
                seconds), both from submission.

        Raises:
            MlxQloraError: the base or an adapter cannot be loaded, or they do not belong together.
        """
        if max_batch < 1 or max_queue < 0 or prompt_cache_bytes < 0:
            raise ConfigError("max_batch must be at least 1; max_queue and prompt_cache_bytes at least 0.")
        infos = {name: read_adapter_info(Path(folder)) for name, folder in adapters.items()}
        stored = quantization or _shared_quantization(infos)
        config = ModelConfig(path=model, revision=revision, trust_remote_code=trust_remote_code)
        engine = cls(
            model,
            tuple(adapters),
            Desk(max_batch, max_queue),
            prompt_cache_bytes=prompt_cache_bytes,
            on_death=on_death,
            observe=observe,
        )
        load = functools.partial(_load, config, stored, adapters, infos, on_bytes)
        engine._thread = threading.Thread(target=engine._run, args=(load,), name="generation", daemon=True)
        engine._thread.start()
        engine._is_ready.wait()
        if engine._loaded is None and engine._desk.error is not None:
            engine._thread.join()
            raise engine._desk.error
        return engine

    def render(self, adapter: str | None, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, by the adapter's own chat template and system prompt.

        Raises:
            ConfigError: there is no adapter of that name, or its template refuses the conversation.
        """
        self._check_adapter(adapter)
        loaded = self._loaded_now()
        turns = [dict(message) for message in messages]
        with self._tokenizing:
            try:
                return render_prompt(loaded.tokenizers[adapter], turns, loaded.system_prompts[adapter])
            except Exception as error:  # a template's, or a tokenizer's on half a surrogate pair
                raise ConfigError(f"This conversation has no tokens: {error}") from None

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, as the tokenizer begins one.

        Raises:
            ConfigError: the text is none, as half of a surrogate pair.
        """
        with self._tokenizing:
            try:
                return list(inner_of(self._loaded_now().base.tokenizer)(text, verbose=False)["input_ids"])
            except Exception as error:  # whatever a tokenizer makes of what is no text
                raise ConfigError(f"This text has no tokens: {error}") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens.

        Raises:
            ConfigError: the tokenizer does not know one of them.
        """
        with self._tokenizing:
            try:
                return str(inner_of(self._loaded_now().base.tokenizer).decode(list(tokens)))
            except Exception as error:  # negative or enormous ids
                raise ConfigError(f"These tokens have no text: {error}") from None

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Queue a job; from any thread, and at once.

        Args:
            listener: Called on the generation thread with each piece, and last with a piece that has a finish
                reason, or with JobFailed. It must be quick and not raise.

        Raises:
            ConfigError: a value of the job is out of range.
            QueueFull: too many jobs wait.
            EngineStopped: no jobs are taken any more.
        """
        self._check_adapter(job.adapter)
        check_job(job, vocabulary_size=self.vocabulary_size, context_length=self.context_length)
        tokenizer = self._loaded_now().base.tokenizer
        text = AnswerText(tokenizer.detokenizer, job.stop, len(tokenizer))
        running = Running(job, self._rows_of[job.adapter], listener, text, time.monotonic())
        self._desk.submit(running)
        return Ticket(functools.partial(self._desk.cancel, running))

    def stats(self) -> EngineStats:
        """Counts up to now."""
        return self._desk.stats(is_alive=self._thread is not None and self._thread.is_alive())

    def drain(self, timeout_seconds: float) -> bool:
        """Take no new jobs and wait for those there are; whether all have ended in time."""
        with self._desk.changed:
            self._desk.is_draining = True
            return self._desk.changed.wait_for(lambda: self._desk.num_open == 0, timeout_seconds)

    def stop(self) -> None:
        """Cancel what is left and end the generation thread."""
        with self._desk.changed:
            self._desk.is_draining = self._desk.is_stopping = True
            self._desk.changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _check_adapter(self, adapter: str | None) -> None:
        if adapter not in self._rows_of:
            names = ", ".join(self.adapter_names) or "none"
            raise ConfigError(f"There is no adapter called {adapter}; there is: {names}.")

    def _loaded_now(self) -> _Loaded:
        if self._loaded is None:
            raise EngineStopped("The engine has not started.")
        return self._loaded

    def _run(self, load: Callable[[], _Loaded]) -> None:
        """The generation thread, from loading to its end."""
        try:
            with ExitStack() as stack:
                loaded = load()
                model, tokenizer = loaded.base.model, loaded.base.tokenizer
                batch = Batch(model, loaded.adapters, stop_tokens(tokenizer), self._desk.max_running)
                stack.callback(batch.close)
                stack.enter_context(dense_products(model))
                text_of = functools.partial(token_text, tokenizer)
                generation = Generation(
                    self._desk, batch, self._prompts, observe=self._observe, text_of=text_of
                )
                self.vocabulary_size = loaded.vocabulary_size
                self.context_length = _context_length(loaded.base.config)
                self._loaded = loaded
                self._is_ready.set()
                generation.run()
        except BaseException as error:
            self._die(error)
        finally:
            self._prompts.clear()
            mx.clear_streams()  # MLX wants it at the end of a thread, or the process may abort at its exit
            self._is_ready.set()

    def _die(self, error: BaseException) -> None:
        with self._desk.changed:
            self._desk.error = error  # from here on nobody joins
        for running in self._desk.everyone():
            self._desk.leave(running, "failed")
            self._desk.close(running, JobFailed(f"Generation has ended: {type(error).__name__}: {error}"))
        if self._loaded is not None:
            self._on_death(error)


def token_text(tokenizer: Any, token: int) -> str:
    """One token as text, with the space it begins with; U+FFFD for part of a character."""
    inner = inner_of(tokenizer)
    name = inner.convert_ids_to_tokens(token) if token < len(inner) else None
    if name is None:
        return ""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
        return bytes([int(name[3:5], 16)]).decode("utf-8", "replace")
    return name.replace("▁", " ") if "▁" in name else str(inner.decode([token]))


def _load(
    config: ModelConfig,
    quantization: QuantizationConfig,
    folders: Mapping[str, Path],
    infos: Mapping[str, AdapterInfo],
    on_bytes: Callable[[int, int], None] | None,
) -> _Loaded:
    base = load_base(config, quantization, on_bytes=on_bytes)
    for info in infos.values():
        info.check_tokenizer(tokenizer_sha256(base.tokenizer))
    model, rows = base.model, RowAdapters()
    updates = [
        read_updates(model, name, Path(folders[name]), infos[name], fingerprint=base.fingerprint)
        for name in infos
    ]
    attach_rows(model, updates, rows, getattr(mx, base.dtype))
    model.eval()
    vocabulary_size = model(mx.array([[0]])).shape[-1]
    tokenizers: dict[str | None, Any] = {None: base.tokenizer}
    for name, info in infos.items():
        tokenizers[name] = _copied_tokenizer(base.tokenizer)
        ensure_chat_template(tokenizers[name], info.chat_template)
    ensure_chat_template(base.tokenizer)
    system_prompts: dict[str | None, str | None] = {None: None}
    system_prompts.update({name: info.system_prompt for name, info in infos.items()})
    return _Loaded(base, rows, tokenizers, system_prompts, vocabulary_size)


def _copied_tokenizer(tokenizer: Any) -> Any:
    """Another tokenizer with the same vocabulary, whose chat template can be another."""
    copied = copy.copy(tokenizer)
    copied._tokenizer = copy.copy(inner_of(tokenizer))
    return copied


def _shared_quantization(infos: Mapping[str, AdapterInfo]) -> QuantizationConfig:
    """How the adapters' base was stored in training; as the checkpoint is, without adapters.

    Raises:
        AdapterError: they were trained on different ones.
    """
    kinds = {name: info.quantization for name, info in infos.items()}
    if not kinds:
        return QuantizationConfig(scheme="none")
    first, *others = kinds.values()
    if any(other != first for other in others):
        shown = ", ".join(f"{name}: {kind.scheme}" for name, kind in kinds.items())
        raise AdapterError(
            f"The adapters were trained on bases that are stored differently ({shown}): say which.",
            run="mlx-qlora serve --scheme int4 …",
        )
    return first


def _context_length(config: Mapping[str, Any]) -> int:
    """Positions a model knows, by its configuration."""
    inner = config.get("text_config")
    for tree in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(length := tree.get(key), int) and length > 0:
                return length
    return DEFAULT_CONTEXT_LENGTH
