"""Load a base with its adapter, and answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.dataset import ensure_chat_template, render_prompt, tokenizer_sha256
from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.errors import AdapterError, ConfigError, DataError
from mlx_qlora.lora.adapter import AdapterInfo, check_quantization, load_adapter, read_adapter_info
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.weights.loader import BaseModel, load_base
from mlx_qlora.weights.source import resolve_adapter


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 always takes the likeliest."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = [
            message
            for is_wrong, message in (
                (self.max_tokens < 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
                (
                    not 0 <= self.temperature < float("inf"),
                    f"temperature must be ≥ 0, not {self.temperature}",
                ),
                (not 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
            )
            if is_wrong
        ]
        if problems:
            raise ConfigError("; ".join(problems) + ".", run="mlx-qlora infer --help")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated text and what it took."""

    text: str
    prompt_tokens: int
    generation_tokens: int
    first_token_seconds: float
    """From the call to the first token; loading is not in it."""
    tokens_per_second: float
    """Of generation, after the first token."""
    finish_reason: str
    """stop: the model ended its turn; length: max_tokens were reached."""


@dataclass(frozen=True)
class Assistant:
    """A base model, with its adapter if any, that answers conversations."""

    base: BaseModel
    adapter: AdapterInfo | None = None

    @property
    def model(self) -> nn.Module:
        """The module tree, adapter attached."""
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's tokenizer wrapper, with the chat template the adapter was trained with."""
        return self.base.tokenizer

    def ask(self, question: str, *, system: str | None = None, sampling: Sampling | None = None) -> Answer:
        """One answer to one question."""
        pieces = list(self.stream([{"role": "user", "content": question}], system=system, sampling=sampling))
        return pieces[-1][1]

    def stream(
        self,
        messages: Sequence[dict[str, str]],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[str, Answer]]:
        """The answer to a conversation, piece by piece; with each piece, the whole answer so far.

        Raises:
            DataError: the chat template refuses the conversation, or fails.
        """
        prompt = self.prompt(messages, system=system)
        yield from generate_pieces(self.model, self.tokenizer, prompt, sampling or Sampling())

    def prompt(self, messages: Sequence[dict[str, str]], *, system: str | None = None) -> list[int]:
        """The tokens that ask for the answer to a conversation.

        Raises:
            DataError: as `stream`.
        """
        system_prompt = (
            system if system is not None else (self.adapter.system_prompt if self.adapter else None)
        )
        try:
            return render_prompt(self.tokenizer, list(messages), system_prompt)
        except BadRow as error:
            raise DataError(f"This cannot be asked: {error}", where=self.base.source.name) from None


def load_assistant(
    model: str | None = None,
    *,
    adapter_path: str | Path | None = None,
    quantization: QuantizationConfig | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload: bool = False,
    offload_budget_gib: float | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    is_lazy: bool = False,
) -> Assistant:
    """Load a base model and, when given, the adapter that belongs to it.

    Args:
        model: Hub id or folder; None takes the adapter's own.
        adapter_path: Folder of the adapter, or its hub id.
        quantization: How the base is stored; None is the adapter's own, or the checkpoint as it is.
        dtype: A value of ``model.dtype``; None leaves it to the adapter or to the device.
        offload: Leave layers that do not fit in memory in their files.
        offload_budget_gib: What the weights may take of memory then; see ``model.offload_budget_gib``.
        on_bytes: Called with (done, total) while the base is being quantized.
        is_lazy: Leave the base's weights unread until they are first used.

    Raises:
        MlxQloraError: nothing to load, or the adapter belongs to another base.
    """
    folder = resolve_adapter(adapter_path) if adapter_path is not None else None
    info = read_adapter_info(folder) if folder is not None else None
    if model is None and info is None:
        raise ConfigError("There is no model to ask.", run='mlx-qlora infer "…" --adapter-path adapters/NAME')
    model_config = _model_config(model, revision, info, trust_remote_code=trust_remote_code)
    update: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if offload or offload_budget_gib is not None:
        update |= {"offload": True, "offload_budget_gib": offload_budget_gib}
    model_config = ModelConfig.model_validate({**model_config.model_dump(), **update})
    stored = quantization or (info.quantization if info else QuantizationConfig(scheme="none"))
    if info is not None:
        check_quantization(info, stored)
    base = load_base(model_config, stored, on_bytes=on_bytes, is_lazy=is_lazy)
    if info is not None:
        info.check_tokenizer(tokenizer_sha256(base.tokenizer))
    ensure_chat_template(base.tokenizer, info.chat_template if info else None)
    if info is not None and folder is not None:
        load_adapter(base.model, folder, info, fingerprint=base.fingerprint)
    base.model.eval()
    return Assistant(base, info)


def _model_config(
    model: str | None, revision: str | None, info: AdapterInfo | None, *, trust_remote_code: bool
) -> ModelConfig:
    if model is not None:
        return ModelConfig(path=model, revision=revision, trust_remote_code=trust_remote_code)
    if info is None or info.model.path is None:
        raise AdapterError(
            "The adapter does not say which base model it belongs to.", run="mlx-qlora infer --model M …"
        )
    return info.model.model_copy(update={"trust_remote_code": trust_remote_code})


def generate_pieces(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    sampling: Sampling,
    *,
    agreed: Callable[[Any], Any] | None = None,
) -> Iterator[tuple[str, Answer]]:
    """The continuation of `prompt` (token ids), piece by piece; with each piece, the whole so far.

    Generation itself is mlx-lm's. On a CPU a prompt of many tokens goes through unpacked weights, as a
    batch does in training, and its first token comes several times sooner with a fast BLAS.

    Args:
        agreed: Makes of the tokens chosen here, an array, those that are taken: where ranks answer
            together, one chooses for all.
    """
    import mlx.core as mx
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    choose = make_sampler(temp=sampling.temperature, top_p=sampling.top_p if sampling.top_p < 1 else 0.0)
    sampler = choose if agreed is None else lambda logprobs: agreed(choose(logprobs))
    started, first, text = time.perf_counter(), None, ""
    with dense_products(model):
        responses = stream_generate(model, tokenizer, prompt, max_tokens=sampling.max_tokens, sampler=sampler)
        for response in responses:
            first = first if first is not None else time.perf_counter() - started
            text += response.text
            yield (
                response.text,
                Answer(
                    text=text,
                    prompt_tokens=len(prompt),
                    generation_tokens=response.generation_tokens,
                    first_token_seconds=first,
                    tokens_per_second=response.generation_tps,
                    finish_reason=response.finish_reason or "",
                ),
            )
