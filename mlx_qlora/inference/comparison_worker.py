"""One scheme, measured in a process of its own: what it costs to run, and how far its answers are off.

``python -m mlx_qlora.inference.comparison_worker``, see `mlx_qlora.inference.worker`; it tells its ``phase``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.config import DataConfig, QuantizationConfig
from mlx_qlora.errors import DataError
from mlx_qlora.inference.worker import Said, work

PROMPT_TOKENS = 32
WARM_UP_TOKENS = 4
REPETITIONS = 3
"""Generation is timed so many times, and the fastest counts: what disturbs it only makes it slower."""
SPLITS = ("test", "valid", "train")

OnPhase = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process is asked for."""

    folder: str
    """The model as it is stored in one scheme."""
    reference: str
    """Folder of what the reference says of each labelled token."""
    is_reference: bool
    """Whether it is this model that fills it."""
    data: dict[str, Any]
    """A DataConfig as JSON."""
    split: str | None
    """train, valid or test; None takes the first of `SPLITS` that has rows."""
    adapter_path: str | None = None
    trust_remote_code: bool = False
    max_rows: int | None = None
    batch_size: int = 4
    generated_tokens: int = 64
    max_questions: int = 100
    """Answers that are asked for, at most; 0 asks for none."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One scheme's figures."""

    load_seconds: float
    """From the folder to arrays in memory; imports are not in it, the system's file cache is."""
    tokens_per_second: float
    """Of greedy generation from a short prompt, after the first tokens; the fastest of some."""
    peak_footprint_bytes: int
    """Of the process that loaded and generated, Python and all; scoring came later."""
    mlx_peak_bytes: int
    """Of MLX's arrays alone, at the same time."""
    loss_nats: float
    divergence_nats: float
    agreement: float
    target_tokens: int
    split: str
    num_rows: int
    exact_match: float | None
    """Share of answers that are word for word the expected ones; None where the data has no answers."""
    num_questions: int
    dtype: str
    """Of activations."""


def measure(task: Task, on_phase: OnPhase) -> Measured:
    """Load, generate, look at memory, score and, where there are answers, ask.

    Raises:
        MlxQloraError: the model or the data cannot be used.
    """
    from mlx_qlora.dataset import in_order
    from mlx_qlora.inference.comparison_reference import score_against, write_reference
    from mlx_qlora.inference.generate import load_assistant
    from mlx_qlora.memory.monitor import MemoryMonitor
    from mlx_qlora.objective.loss import objective_for

    _import_what_loading_needs()
    import mlx.core as mx

    monitor, started = MemoryMonitor(), time.perf_counter()
    on_phase("loading")
    assistant = load_assistant(
        task.folder,
        adapter_path=task.adapter_path,
        quantization=QuantizationConfig(scheme="none"),
        trust_remote_code=task.trust_remote_code,
    )
    load_seconds = time.perf_counter() - started
    split, examples = _examples(task, assistant)
    on_phase("generating")
    prompt = [int(token) for token in examples[0].tokens[:PROMPT_TOKENS]]
    speed = _tokens_per_second(assistant.model, prompt, task.generated_tokens)
    monitor.sample()
    peaks = monitor.peak_footprint_bytes, mx.get_peak_memory()
    on_phase(f"scoring {len(examples)} rows")
    scored = write_reference if task.is_reference else score_against
    batches = in_order(examples, task.batch_size)
    score = scored(objective_for(assistant.model), batches, Path(task.reference))
    exact, num_questions = _exact_match(task, assistant, split, len(examples), on_phase)
    return Measured(
        load_seconds=load_seconds,
        tokens_per_second=speed,
        peak_footprint_bytes=peaks[0],
        mlx_peak_bytes=peaks[1],
        **asdict(score),
        split=split,
        num_rows=len(examples),
        exact_match=exact,
        num_questions=num_questions,
        dtype=assistant.base.dtype,
    )


def _import_what_loading_needs() -> None:
    import mlx_lm.generate
    import mlx_lm.utils
    import transformers

    del mlx_lm, transformers


def _examples(task: Task, assistant: Any) -> tuple[str, list[Any]]:
    """The split that is scored, and its rows.

    Raises:
        DataError: it has no rows, or no labelled token in them.
    """
    from mlx_qlora.dataset import load_dataset

    system = assistant.adapter.system_prompt if assistant.adapter else None
    config = DataConfig.model_validate({"system_prompt": system, **task.data, "valid_fraction": 0.0})
    dataset = load_dataset(config, assistant.tokenizer, seed=0)
    by_split = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
    split = task.split or next(name for name in SPLITS if by_split[name])
    examples = by_split[split][: task.max_rows]
    if not examples:
        there = ", ".join(name for name, rows in by_split.items() if rows)
        raise DataError(
            f"The data has no {split} rows; it has {there}.",
            where=str(config.path),
            run=f"mlx-qlora compare --split {there.partition(',')[0]} …",
        )
    if not any(example.targets_mask.any() for example in examples):
        raise DataError("No row has a labelled token, so there is nothing to score.", where=str(config.path))
    return split, examples


def _tokens_per_second(model: Any, prompt: list[int], num_tokens: int) -> float:
    """Greedy generation that no end-of-turn token stops."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mlx_qlora.quantization.dense import dense_products

    rates = []
    with dense_products(model):
        for _ in range(REPETITIONS):
            started = 0.0
            steps = generate_step(mx.array(prompt), model, max_tokens=WARM_UP_TOKENS + num_tokens)
            for number, _token in enumerate(steps, start=1):
                if number == WARM_UP_TOKENS:
                    started = time.perf_counter()
            rates.append(num_tokens / (time.perf_counter() - started))
    return max(rates)


def _exact_match(
    task: Task, assistant: Any, split: str, num_rows: int, on_phase: OnPhase
) -> tuple[float | None, int]:
    from mlx_qlora.dataset import read_conversations
    from mlx_qlora.dataset.files import find_files
    from mlx_qlora.inference.exact_match import exact_match

    if task.max_questions == 0:
        return None, 0
    try:
        conversations = read_conversations(find_files(task.data["path"])[split])
    except DataError:
        return None, 0  # plain text; a row that is broken was told of before
    conversations = conversations[: min(num_rows, task.max_questions)]
    on_phase(f"asking {len(conversations)} questions")
    return exact_match(assistant, conversations).share, len(conversations)


def _do(task: dict[str, Any], tell: Said) -> dict[str, Any]:
    return asdict(measure(Task(**task), lambda phase: tell("phase", phase)))


if __name__ == "__main__":
    work(_do)
