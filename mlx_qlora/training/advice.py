"""Which storage format for a machine: to train on, or only to run. Predicted memory, measured quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.config import QuantizationConfig, RunConfig
from mlx_qlora.errors import ConfigError, MlxQloraError
from mlx_qlora.memory.plan import CONSTANTS, Budget, Workload
from mlx_qlora.quantization.nf4_layers import NF4Embedding
from mlx_qlora.quantization.policy import read_scheme
from mlx_qlora.quantization.schemes import UNQUANTIZED
from mlx_qlora.storage import read_json
from mlx_qlora.training.model_shape import MicroBatch, planned_model, planned_objective, workload
from mlx_qlora.training.planning import Work, config_source, plan_run

CANDIDATES = (
    "fp16",
    "int8",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "nf4",
    "nf4-dq",
)
CONTEXT_TOKENS = 4096
"""Tokens of conversation that running is planned for, where the model knows so many."""
PREFILL_TOKENS = 2048
"""Tokens of a prompt that mlx-lm takes at once."""

RUN_LOSS_NATS = 0.01
"""A divergence per token that is not felt: the likelihood of a token changes by one per cent."""
TRAIN_LOSS_NATS = 0.05
"""The same for a frozen base: the adapter is trained on the quantized weights, and makes up for some of it
(Dettmers et al. 2023, arXiv:2305.14314, section 4)."""


@dataclass(frozen=True)
class Quality:
    """What a format did to a model's answers."""

    divergence_nats: float
    """Mean Kullback-Leibler divergence from the float model per token."""
    perplexity_change: float
    """Share: 0.01 is one per cent more."""


RECORDED: Mapping[str, Quality] = {
    "fp16": Quality(0.0, 0.0),
    "int8": Quality(7.23e-05, 7.23e-05),
    "int6": Quality(0.000752, 0.000752),
    "int5": Quality(0.00265, 0.00265),
    "int4": Quality(0.0141, 0.0142),
    "int3": Quality(0.094, 0.0986),
    "int2": Quality(1.42, 3.14),
    "mxfp8": Quality(0.00108, 0.00108),
    "mxfp4": Quality(0.026, 0.0263),
    "nvfp4": Quality(0.0173, 0.0175),
    "nf4": Quality(0.0178, 0.018),
    "nf4-dq": Quality(0.0185, 0.0187),
}
"""The geometric mean of two tiny models' divergences, which are 10 to 90 times apart: their order is what
is of use. The change of perplexity is what that divergence makes, exp(KL) - 1."""
RECORDED_FILES = ("demo.json", "stories260k.json")
RECORDED_SOURCE = (
    "a rough guide, the mean of two tiny models (docs/compare/COMPARE.md). Of this one: "
    "mlx-qlora compare --model M --data D --json > FILE, then --measured FILE"
)


@dataclass(frozen=True)
class Option:
    """One format on one machine."""

    scheme: str
    weights_bytes: int
    """Of the base in memory."""
    run_bytes: int
    """Predicted peak of a process that answers."""
    can_run: bool
    train_bytes: int
    """Predicted peak of the configured training run."""
    can_train: bool
    quality: Quality | None
    """None where it was not measured."""


@dataclass(frozen=True)
class Choice:
    """The format for one use, and why."""

    scheme: str | None
    """None where none fits."""
    reason: str


@dataclass(frozen=True)
class Advice:
    """Every format with its figures, and one choice for each use."""

    options: tuple[Option, ...]
    to_run: Choice
    to_train: Choice
    budget: Budget
    context_tokens: int
    source: str
    """Where the qualities come from."""
    notes: tuple[str, ...]


def advise(
    config: RunConfig,
    *,
    memory_bytes: int | None = None,
    work: Work | None = None,
    measured: Mapping[str, Quality] | None = None,
    source: str = "",
) -> Advice:
    """Plan the configured run in each format, and answering; then choose by quality among what fits.

    Args:
        config: Model and training settings; its quantization is not looked at.
        memory_bytes: Of the Mac it is planned for; None: this device.
        work: What `planning.work_of` says of the data.
        measured: Scheme → quality, by `read_measured`; None takes `RECORDED`.
        source: Where `measured` comes from.

    Raises:
        ConfigError: there is no model.
        ModelError: there is no config.json, or the model is quantized already: there is nothing to choose.
    """
    model = config_source(config)
    if model.is_quantized:
        raise ConfigError(
            "This model is quantized already: its format is not up for choice.",
            where=model.name,
            run=f"mlx-qlora plan --model {model.name} …   # what it takes as it is",
        )
    known = RECORDED if measured is None else measured
    names = list(dict.fromkeys([*CANDIDATES, *known]))
    options, notes, planned = [], list[str](), None
    for name in names:
        tried = config.model_copy(update={"quantization": _quantization(name)})
        try:
            planned = plan_run(tried, memory_bytes=memory_bytes, work=work)
        except MlxQloraError as error:
            notes.append(f"{name}: {error.what}")
            continue
        run_bytes, context = _running(tried, on_cpu=memory_bytes is None and _is_cpu())
        budget = planned.plan.budget
        options.append(
            Option(
                scheme=name,
                weights_bytes=planned.numbers.weights_bytes,
                run_bytes=run_bytes,
                can_run=run_bytes <= budget.num_bytes,
                train_bytes=planned.plan.needed_bytes,
                can_train=planned.plan.fits,
                quality=known.get(name),
            )
        )
    if planned is None:
        raise ConfigError(f"No format can be planned for this model: {notes[0]}", where=model.name)
    return Advice(
        options=tuple(options),
        to_run=choose(options, RUN_LOSS_NATS, is_training=False),
        to_train=choose(options, TRAIN_LOSS_NATS, is_training=True),
        budget=planned.plan.budget,
        context_tokens=context,
        source=RECORDED_SOURCE if measured is None else source,
        notes=tuple(dict.fromkeys([*notes, *planned.notes])),
    )


def choose(options: list[Option], tolerance_nats: float, *, is_training: bool) -> Choice:
    """The smallest format that fits and is near enough to the float model; else the nearest that fits.

    Smaller is faster too: a generated token reads all weights once. NF4 is the exception, for MLX has no
    product with it: it is chosen only where no other format that is near enough fits.
    """
    size = (lambda option: option.train_bytes) if is_training else (lambda option: option.run_bytes)
    fitting = [option for option in options if (option.can_train if is_training else option.can_run)]
    if not fitting:
        least = min(options, key=size)
        return Choice(None, f"none fits: even {least.scheme} is predicted to take {_gib(size(least))}")
    judged = [option for option in fitting if option.quality is not None]
    if not judged:
        largest = max(fitting, key=lambda option: option.weights_bytes)
        return Choice(largest.scheme, "the largest that fits; no quality was measured")
    near = [option for option in judged if _divergence(option) <= tolerance_nats]
    if near:
        best = min(
            near, key=lambda each: (each.scheme.startswith("nf4"), each.weights_bytes, _divergence(each))
        )
        why = f"the smallest (NF4 last) that fits within {tolerance_nats:g} nats a token of the float model"
    else:
        best = min(judged, key=lambda option: (_divergence(option), option.weights_bytes))
        why = f"the nearest to the float model that fits; none that fits is within {tolerance_nats:g} nats"
    change = best.quality.perplexity_change if best.quality else 0.0
    return Choice(
        best.scheme,
        f"{why} ({_divergence(best):.4f}; perplexity {change:+.1%}), at {_gib(size(best))}",
    )


def read_measured(path: Path) -> dict[str, Quality]:
    """Scheme → quality, from what ``mlx-qlora compare --json`` printed.

    Raises:
        ConfigError: it is no such file, or nothing in it was measured.
    """
    run = "mlx-qlora compare --model M --data D --json > FILE"
    try:
        rows = read_json(path)["rows"]
        found = {
            _name(row): Quality(float(row["divergence_nats"]), float(row["perplexity_change"]))
            for row in rows
            if row["problem"] is None
        }
    except OSError as error:
        raise ConfigError(f"Cannot read it: {error.strerror}.", where=f"--measured {path}", run=run) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"This is no comparison's JSON ({type(error).__name__}: {error}).",
            where=f"--measured {path}",
            run=run,
        ) from None
    for name in found:
        read_scheme(name, f"--measured {path}")
    if not found:
        raise ConfigError("Nothing was measured in it.", where=f"--measured {path}", run=run)
    return found


def _name(row: Any) -> str:
    """A scheme's name; the float checkpoint has one whatever it was called."""
    name = str(row["scheme"])
    return CANDIDATES[0] if name in UNQUANTIZED or name in ("fp32", "float32") else name


def _quantization(name: str) -> QuantizationConfig:
    scheme = read_scheme(name, "--measured")
    if scheme is None:
        return QuantizationConfig(scheme="none")
    return QuantizationConfig(scheme=scheme.name, group_size=scheme.group_size)


def _running(config: RunConfig, *, on_cpu: bool) -> tuple[int, int]:
    """Predicted peak of answering, and the tokens of conversation it is for.

    Weights, the keys and values of all tokens, the work on one chunk of the prompt, and Python.
    """
    source, notes = config_source(config), list[str]()
    model = planned_model(source, config, notes, on_cpu=on_cpu)
    for _, layer in model.named_modules():
        if isinstance(layer, NF4Embedding):
            layer.dtype = _activations(model)  # as the loader does
    objective = planned_objective(model, source, notes)
    longest = int(getattr(model.args, "max_position_embeddings", None) or CONTEXT_TOKENS)
    context = min(CONTEXT_TOKENS, longest)
    chunk = min(PREFILL_TOKENS, context)
    numbers: Workload = workload(objective, MicroBatch(1, chunk, 1, chunk), config, on_cpu=on_cpu)
    step, constants = numbers.step, CONSTANTS
    vocabulary = int(getattr(model.args, "vocab_size", 0))
    # Only a CPU makes attention's scores; a GPU's fused attention never has them.
    scores = step.scores if on_cpu else 0
    return round(
        constants.interpreter_bytes
        + constants.layer_bytes * numbers.num_layers
        + numbers.weights_bytes
        + _cache_bytes(model, context)
        + 2 * step.hidden
        + step.outputs
        + scores
        + 4 * vocabulary
    ), context


def _activations(model: nn.Module) -> mx.Dtype:
    """Their type: that of a norm, which no format changes."""
    norms = [
        m for _, m in model.named_modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm) and "weight" in m
    ]
    return norms[0].weight.dtype if norms else mx.float32


def _cache_bytes(model: nn.Module, context: int) -> int:
    """Keys and values of so many tokens, as mlx-lm allots them; they get shapes, and are never made."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.zeros((1, context), mx.int32), cache=cache)
    return sum(layer.nbytes for layer in cache)


def _is_cpu() -> bool:
    return mx.default_device() == mx.cpu


def _divergence(option: Option) -> float:
    return option.quality.divergence_nats if option.quality is not None else float("inf")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.2f} GiB"
