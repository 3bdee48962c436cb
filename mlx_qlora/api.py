"""The Python interface: what a notebook needs, in seven functions."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.config import DataConfig, ModelConfig, QuantizationConfig, RunConfig, build_config
from mlx_qlora.dataset import Example, in_order, render_prompt
from mlx_qlora.errors import ConfigError
from mlx_qlora.inference.calibration import settle_by_answers
from mlx_qlora.inference.generate import Sampling, generate_pieces, load_assistant
from mlx_qlora.memory.plan import parse_memory
from mlx_qlora.objective.evaluate import Evaluation
from mlx_qlora.objective.evaluate import evaluate as evaluate_batches
from mlx_qlora.quantization.environment import quantization_from_environment
from mlx_qlora.quantization.policy import recipe_of
from mlx_qlora.quantization.settings import quantization_from
from mlx_qlora.quantization.translation import Filter, Translation
from mlx_qlora.training.events import Observer
from mlx_qlora.training.live_plot import LivePlot
from mlx_qlora.training.planning import RunPlan, plan_run, work_of
from mlx_qlora.training.run import TrainedRun, resumed_config
from mlx_qlora.training.run import train as train_run
from mlx_qlora.weights.loader import settled
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import QuantizeResult, quantize_checkpoint

Progress = Callable[[int, int], None]


@contextmanager
def _session_kept() -> Iterator[None]:
    """Leave MLX's global generator as it was, and let the traceback of an exception keep no model.

    A model that is built draws its first weights at random, and a notebook keeps the last traceback: with it
    the base that was loaded would stay in memory, beside the one that the next run of the cell loads.
    """
    generator: Any = mx.random.state  # of a type that MLX's stubs do not tell
    high, low = generator[0].tolist()
    try:
        yield
    except BaseException as error:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        raise
    finally:
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed


@_session_kept()
def load(
    model: str | None = None,
    *,
    adapter_path: str | Path | None = None,
    quantization: str | QuantizationConfig | None = None,
    quantization_config: Any = None,
    filter_fn: Filter | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload: bool = False,
    offload_budget_gib: float | None = None,
    on_bytes: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """A model and its tokenizer, ready to generate or, with mlx-lm's own functions, for anything else.

    Args:
        model: Hub id or folder; None takes the adapter's own.
        adapter_path: Folder of an adapter to attach.
        quantization: A scheme's name (``int4``) or a whole configuration. The quantized model is kept in
            the user's cache and found again. None: the adapter's own; else what USE_QUANTIZATION and
            QUANTIZATION_BITS say, in the environment or in .env; else the checkpoint as it is.
        quantization_config: The same in another library's words: a BitsAndBytesConfig, a torchao
            configuration, or a dictionary of their settings (see `quantization_from`).
        filter_fn: torchao's, (module, path) → whether it is quantized.
        offload: Leave layers that do not fit in memory in their files, and read each when it is called.
        offload_budget_gib: What the weights may take of memory then; None: 60 % of what is left.
        on_bytes: Called with (done, total) bytes while quantizing.
        on_note: Called with each line that says what a setting does here; None writes them to standard error.

    Raises:
        MlxQloraError: the model or the adapter cannot be used; the message says what to do.
    """
    translated = _translated(
        quantization, quantization_config, filter_fn, has_adapter=adapter_path is not None
    )
    for note in translated.notes if translated else ():
        (on_note or _say)(note)
    stored = None
    if translated is not None:
        stored = translated.config
        if translated.filter_fn is not None:
            if model is None:
                raise ConfigError(
                    "filter_fn is asked about the layers of a model; name it.", run="mq.load(MODEL, …)"
                )
            source = resolve_model(model, revision, trust_remote_code)
            stored = stored if source.is_quantized else translated.for_model(skeleton(source))
    assistant = load_assistant(
        model,
        adapter_path=adapter_path,
        quantization=stored,
        dtype=translated.dtype if translated else None,
        revision=revision,
        trust_remote_code=trust_remote_code,
        offload=offload,
        offload_budget_gib=offload_budget_gib,
        on_bytes=on_bytes,
    )
    for note in assistant.base.notes:
        (on_note or _say)(note)
    assistant.model.system_prompt = assistant.adapter.system_prompt if assistant.adapter else None
    return assistant.model, assistant.tokenizer


def _translated(
    quantization: str | QuantizationConfig | None,
    settings: Any,
    filter_fn: Filter | None,
    *,
    has_adapter: bool,
) -> Translation | None:
    if quantization is not None and settings is not None:
        raise ConfigError("quantization and quantization_config say the same thing; give one of them.")
    said = settings if settings is not None else quantization
    if said is not None:
        return quantization_from(said, filter_fn=filter_fn)
    if filter_fn is not None:
        raise ConfigError(
            "filter_fn chooses layers for a scheme, and there is none.",
            run='mq.load(MODEL, quantization="int8", filter_fn=…)',
        )
    return None if has_adapter else quantization_from_environment()


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def generate(model: Any, tokenizer: Any, prompt: str, *, system: str | None = None, **sampling: Any) -> str:
    """The answer to one question, as text.

    Args:
        sampling: max_tokens, temperature, top_p, seed (see `Sampling`).
    """
    return "".join(stream(model, tokenizer, prompt, system=system, **sampling))


def stream(
    model: Any, tokenizer: Any, prompt: str, *, system: str | None = None, **sampling: Any
) -> Iterator[str]:
    """The answer to one question, piece by piece; the prompt is rendered as in training.

    Args:
        system: System prompt; None takes the one the adapter was trained with, if any.
    """
    system = system if system is not None else getattr(model, "system_prompt", None)
    tokens = render_prompt(tokenizer, [{"role": "user", "content": prompt}], system)
    for piece, _ in generate_pieces(model, tokenizer, tokens, Sampling(**sampling)):
        yield piece


@_session_kept()
def quantize(
    model: str,
    output: str | Path,
    quantization: str | QuantizationConfig = "int4",
    *,
    calibration: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_bytes: Progress | None = None,
) -> QuantizeResult:
    """Write a quantized copy of a checkpoint, without ever holding the model in memory.

    Args:
        calibration: Rows by which ``bits_per_weight`` judges layers: by what becomes of the model's answers,
            which takes the model in memory and chooses better. None judges them by their weights' error.
    """
    config = QuantizationConfig(scheme=quantization) if isinstance(quantization, str) else quantization
    source = resolve_model(model, revision, trust_remote_code)
    asked = ModelConfig(path=model, revision=revision, trust_remote_code=trust_remote_code)
    if calibration is not None:
        rows = DataConfig(path=str(calibration), valid_fraction=0.0)
        config = settle_by_answers(asked, config, rows, on_bytes=on_bytes).config
    recipe = recipe_of(settled(asked, config, on_bytes))
    if recipe is None:
        raise ConfigError(f"{config.scheme} is no quantization.", run="mlx-qlora quantize --help")
    return quantize_checkpoint(source, Path(output), recipe, on_bytes=on_bytes)


@_session_kept()
def train(
    config: RunConfig | dict[str, Any],
    adapter_path: str | Path,
    *,
    resume: bool = False,
    observers: Iterable[Observer] | None = None,
    on_bytes: Progress | None = None,
    force: bool = False,
) -> TrainedRun:
    """Train an adapter; see `mlx_qlora.training.run.train`.

    Args:
        config: A RunConfig, or a tree of its keys.
        resume: Go on if a run was begun in `adapter_path`; begin otherwise.
        observers: Told every event. None shows progress: a `LivePlot` in a notebook, lines on standard error
            elsewhere.
        force: Train although the memory plan does not fit.
    """
    run = build_config(config) if isinstance(config, dict) else config
    is_begun = (Path(adapter_path) / "run.yaml").is_file()
    shown = LivePlot(adapter_path=adapter_path, steps_per_report=run.training.steps_per_report)
    with closing(shown):
        watching = [shown] if observers is None else list(observers)
        return train_run(
            run, adapter_path, resume=resume and is_begun, observers=watching, on_bytes=on_bytes, force=force
        )


@_session_kept()
def plan(config: RunConfig | dict[str, Any], *, memory: str | None = None) -> RunPlan:
    """What a run's memory will be, from config.json and, where there is data and a tokenizer, its rows.

    Args:
        memory: Plan for a Mac with so much (``8GB``); None plans for this device.
    """
    run = build_config(config) if isinstance(config, dict) else config
    memory_bytes = parse_memory(memory) if memory is not None else None
    return plan_run(run, memory_bytes=memory_bytes, work=work_of(run))


def evaluate(model: Any, examples: list[Example], *, batch_size: int = 4) -> Evaluation:
    """Token-weighted loss of a model on rendered rows (`TrainedRun.dataset.valid`, say)."""
    return evaluate_batches(model, in_order(examples, batch_size))


__all__ = [
    "LivePlot",
    "evaluate",
    "generate",
    "load",
    "plan",
    "quantize",
    "resumed_config",
    "stream",
    "train",
]
