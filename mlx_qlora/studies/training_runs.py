"""One variant, one seed: trained, then asked, each in a process of its own; what was measured is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mlx_qlora.config import RunConfig
from mlx_qlora.errors import CheckpointError, MlxQloraError
from mlx_qlora.inference.comparison_process import measured
from mlx_qlora.inference.comparison_worker import Measured, Task
from mlx_qlora.inference.worker import ask
from mlx_qlora.lora.adapter import WEIGHTS
from mlx_qlora.storage import make_folder, new_folder, plain_json, read_json, said_clearly, write_json
from mlx_qlora.studies import training_worker
from mlx_qlora.studies.training_worker import BaseFigures
from mlx_qlora.training.distributed_events import event_of
from mlx_qlora.training.events import Event
from mlx_qlora.training.metrics import METRICS, Entry, best_validation, events_named, mean_loss, read_metrics

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class TrainingFigures:
    """What one training run took and came to, from its metrics.jsonl."""

    num_steps: int
    tokens: int
    seconds: float
    """In updates and validations."""
    seconds_per_step: float
    """The median update: the first, which compiles, does not count for more than the others."""
    tokens_per_second: float
    """Of updates."""
    peak_footprint_bytes: int
    """Of the process that loaded the base and trained, Python and all."""
    mlx_peak_bytes: int
    """Of MLX's arrays in any update, its cache of freed buffers left out; loading is not in it."""
    trainable_parameters: int
    adapter_bytes: int
    """Of its weight file."""
    train_loss_nats: float | None
    """Mean over the last epoch's updates."""
    val_loss_nats: float | None
    """Of the adapter that was kept; None without validation rows."""
    best_step: int | None
    curve: tuple[tuple[int, float], ...]
    """(update, loss) of each validation."""
    was_resumed: bool


@dataclass(frozen=True, kw_only=True)
class TrainedVariant:
    """One run's figures."""

    seed: int
    repeat: int
    """Counted from 1."""
    folder: str
    training: TrainingFigures
    answers: Measured | None
    """Of the trained model, on rows it is asked about; None where that failed."""
    problem: str | None = None
    """Why it could not be asked."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Who is told what happens."""

    phase: Callable[[str, str], None] = lambda _name, _phase: None
    """(variant, what happens now)."""
    event: Callable[[Event], None] = lambda _event: None
    """Each event of the run under way."""
    num_bytes: Callable[[int, int], None] = lambda _done, _total: None
    """(done, total) while a base is quantized."""


def weighed(config: RunConfig, name: str, kept: Path, work: Path, told: Told) -> BaseFigures:
    """The base of a run, loaded by a process of its own; or what is kept of it, while its copy is there.

    Args:
        kept: File for its figures.

    Raises:
        MlxQloraError: it cannot be.
    """
    try:
        figures = BaseFigures(**read_json(kept))
        if Path(figures.folder).is_dir():
            return figures
    except (OSError, ValueError, TypeError):
        pass
    told.phase(name, "loading the base")

    def hear(kind: str, value: Any) -> None:
        if kind == "bytes":
            told.num_bytes(*value)

    figures = BaseFigures(**_asked(config, None, work, hear))
    write_json(kept, asdict(figures))
    return figures


def trained(
    config: RunConfig, name: str, repeat: int, folder: Path, task: Task, work: Path, told: Told
) -> TrainedVariant:
    """One run's figures: kept ones where there are such, and what is missing measured.

    A run that was stopped goes on from its last checkpoint. Training that is done is not done again where
    only asking failed.

    Args:
        name: Of the variant, for a person.
        folder: The run's own; it ends with the adapter and `RESULT`.
        task: What the trained model is asked; its adapter_path is put in here.
        work: Folder for what lasts no longer than a process.

    Raises:
        MlxQloraError: it could not be trained.
    """
    kept = read_result(folder)
    if kept is not None and kept.problem is None:
        told.phase(name, "kept from before")
        return kept
    adapter = folder / "adapter"
    if kept is None:
        with said_clearly(folder):
            make_folder(folder)
        told.phase(name, "training")

        def hear(kind: str, value: Any) -> None:
            if kind == "event":
                told.event(event_of(value))

        _asked(config, adapter, work, hear)
    figures = kept.training if kept else _figures(adapter)
    answers, problem = None, None
    try:
        task = Task(**{**asdict(task), "adapter_path": str(adapter), "reference": str(_emptied(work))})
        answers = measured(task, work, lambda phase: told.phase(name, phase))
    except MlxQloraError as error:
        problem = error.what
    result = TrainedVariant(
        seed=config.training.seed,
        repeat=repeat,
        folder=folder.name,
        training=figures,
        answers=answers,
        problem=problem,
    )
    write_json(folder / RESULT, plain_json(asdict(result)))
    return result


def read_result(folder: Path) -> TrainedVariant | None:
    """What was measured in a run's folder; None where it has not come to its end."""
    try:
        return variant_of(read_json(folder / RESULT))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def variant_of(tree: dict[str, Any]) -> TrainedVariant:
    """A run's figures from their JSON; KeyError, TypeError or ValueError where it is something else."""
    figures, answers = tree["training"], tree["answers"]
    curve = tuple((int(step), float(loss)) for step, loss in figures["curve"])
    training = TrainingFigures(**{**figures, "curve": curve})
    return TrainedVariant(
        **{**tree, "training": training, "answers": Measured(**answers) if answers else None}
    )


def _asked(
    config: RunConfig, adapter: Path | None, work: Path, hear: Callable[[str, Any], None]
) -> dict[str, Any]:
    task = {
        "run": config.model_dump(mode="json"),
        "adapter_path": str(adapter) if adapter is not None else None,
    }
    return ask(
        training_worker.__name__,
        task,
        work / "training.log",
        hear,
        where=str(config.model.path),
        waits_on_stop=adapter is not None,
    )


def _emptied(work: Path) -> Path:
    """A folder that a scored model may leave its hidden states in."""
    with new_folder(work / "reference"):
        pass
    return work / "reference"


def _figures(adapter: Path) -> TrainingFigures:
    """Read a finished run.

    Raises:
        CheckpointError: it did not update once.
    """
    entries = read_metrics(adapter / METRICS)
    steps, validations = events_named(entries, "StepDone"), events_named(entries, "Validated")
    started = events_named(entries, "RunStarted")
    finished = events_named(entries, "RunFinished")
    if not steps or not started or not finished:
        raise CheckpointError("The run left no update in its log.", where=str(adapter / METRICS))
    seconds, best = sum(step["seconds"] for step in steps), best_validation(entries)
    tokens = sum(step["tokens"] for step in steps)
    return TrainingFigures(
        num_steps=len(steps),
        tokens=tokens,
        seconds=seconds + sum(each["seconds"] for each in validations),
        seconds_per_step=median(step["seconds"] for step in steps),
        tokens_per_second=tokens / max(seconds, 1e-9),
        peak_footprint_bytes=max(
            *(step["memory"]["footprint_bytes"] for step in steps),
            *(each["peak_memory_bytes"] for each in finished),
        ),
        mlx_peak_bytes=max(step["memory"]["mlx_peak_bytes"] for step in steps),
        trainable_parameters=started[-1]["trainable_parameters"],
        adapter_bytes=(adapter / WEIGHTS).stat().st_size,
        train_loss_nats=_last_epoch(steps),
        val_loss_nats=best["loss_nats"] if best else None,
        best_step=best["step"] if best else None,
        curve=tuple(
            (each["step"], each["loss_nats"]) for each in validations if each["loss_nats"] is not None
        ),
        was_resumed=any(each["first_step"] > 0 for each in started),
    )


def _last_epoch(steps: Sequence[Entry]) -> float | None:
    last = [step for step in steps if step["epoch"] == steps[-1]["epoch"] and not step["skipped"]]
    loss = mean_loss((step["loss_nats"], step["target_tokens"]) for step in last)
    return loss if last and loss == loss else None
