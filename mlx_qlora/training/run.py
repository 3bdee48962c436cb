"""A whole training run: base model, data, trainer, and the folder that people ship."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_qlora.config import RunConfig
from mlx_qlora.dataset import Batches, Dataset, in_order, load_dataset
from mlx_qlora.lora.initialisation import attach_initialised
from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.memory.monitor import MemoryMonitor
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.training.checkpoint import CheckpointStore, RunIdentity, saved_steps
from mlx_qlora.training.distributed import ALONE, Ranks
from mlx_qlora.training.distributed_checkpoint import SharedCheckpoints
from mlx_qlora.training.events import Event, Noted, Observer, RunFinished, fan_out
from mlx_qlora.training.guard import StopRequest, stop_on_signals
from mlx_qlora.training.metrics import METRICS, MetricsLog
from mlx_qlora.training.offload_gradient import PiecewiseGradient, offloaded_gradients
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.planning import admitted
from mlx_qlora.training.prefix_run import PrefixRun, prefix_run
from mlx_qlora.training.recompute import recomputed
from mlx_qlora.training.report import write_report
from mlx_qlora.training.report_sections import Told
from mlx_qlora.training.run_facts import plan_summary, run_facts
from mlx_qlora.training.run_folder import (
    CHECKPOINTS,
    RUN_FILE,
    begin_folder,
    check_folder,
    resumed_config,
    with_absolute_paths,
)
from mlx_qlora.training.run_parts import (
    Parts,
    check_same_run,
    data_fingerprint,
    run_finished,
    run_started,
    with_own_budget,
)
from mlx_qlora.training.samples import Sample, sampled_answers
from mlx_qlora.training.suggestion import Suggestion
from mlx_qlora.training.trackers import check_trackers, tracking
from mlx_qlora.training.trainer import Trainer
from mlx_qlora.training.watching import announced
from mlx_qlora.weights.loader import BaseModel, load_base, settled

__all__ = [
    "CHECKPOINTS",
    "RUN_FILE",
    "TrainedRun",
    "data_fingerprint",
    "resumed_config",
    "train",
    "with_absolute_paths",
]


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, with the model still in memory."""

    finished: RunFinished
    base: BaseModel
    dataset: Dataset
    suggestions: tuple[Suggestion, ...] = ()
    """For the next run, as the report has them; on rank 0."""


def train(
    config: RunConfig,
    adapter_path: str | Path,
    *,
    resume: bool = False,
    observers: Iterable[Observer] = (),
    on_bytes: Callable[[int, int], None] | None = None,
    on_prefix_bytes: Callable[[int, int], None] | None = None,
    on_init_bytes: Callable[[int, int], None] | None = None,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> TrainedRun:
    """Train an adapter and leave it in `adapter_path`, with its metrics, curve and report.

    Args:
        config: The run. To go on with one, read it back with `resumed_config`.
        resume: Go on from the newest whole checkpoint, or begin where there is none yet; the result is
            that of a run never interrupted.
        observers: Told every event, in order.
        on_bytes: Called with (done, total) while the base is being quantized.
        on_prefix_bytes: Called with (done, total) while hidden states of frozen layers are being computed
            (``training.cache_frozen_prefix``); after RunStarted, whose notes say how large they are.
        on_init_bytes: Called with (done, total) while weights are decomposed (``lora.init``).
        force: Go on although the memory plan does not fit. A run that has done steps is never refused.
        ranks: This process's place among those that train together; each calls this with the same `config`.
            Only rank 0 touches `adapter_path`. Use `train_on_ranks`, which starts and watches them.

    Raises:
        MemoryBudgetError: the run cannot fit; the message says what to change.
        MlxQloraError: the model, the data, the checkpoint or the disk is not as it must be.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    config, folder = with_absolute_paths(config), Path(adapter_path).resolve()
    if ranks.is_first:
        check_folder(folder, resume=resume)
        check_trackers(config.training)
    is_begun = ranks.value_from_first(resume and any(saved_steps(folder / CHECKPOINTS)))
    monitor = MemoryMonitor()
    with ranks.in_turn():
        planned = admitted(with_own_budget(config, ranks, monitor), is_begun=is_begun, force=force)
        config = config.model_copy(
            update={"quantization": settled(config.model, config.quantization, on_bytes)}
        )  # so that run.yaml and the adapter name each layer's scheme
        base = load_base(config.model, config.quantization, on_bytes=on_bytes)
        dataset = load_dataset(config.data, base.tokenizer, config.training.seed)
    with ranks.in_turn():  # what is decomposed is kept in files
        attach_initialised(base, config.lora, config.training.seed, on_init_bytes, is_restored=is_begun)
    parts = Parts(config, folder, base, dataset, tuple(observers), planned, on_prefix_bytes, ranks, monitor)
    with memory_limits(monitor.budget_bytes(parts.training.memory_budget_gib)):
        finished, suggestions = _run(parts, resume=resume)
    return TrainedRun(finished, base, dataset, suggestions)


def _run(parts: Parts, *, resume: bool) -> tuple[RunFinished, tuple[Suggestion, ...]]:
    metrics, later = MetricsLog(parts.folder / METRICS), list[Observer]()
    is_first = parts.ranks.is_first
    emit = fan_out([*([metrics] if is_first else []), *parts.observers, lambda event: _tell(later, event)])
    with stop_on_signals() as stop:
        trained = _Training(parts, metrics, emit, stop)
        with tracking(parts.config, parts.folder, trained.note, is_on=is_first) as trackers:
            later += trackers
            finished = trained.run(resume=resume)
        # Asked to stop only now, the run ends as it would have.
        return finished, trained.report(stop) if is_first else ()


def _tell(observers: list[Observer], event: Event) -> None:
    for observer in observers:
        observer(event)


class _Training:
    """One run from its first step, or from where it was resumed, to its report."""

    def __init__(self, parts: Parts, metrics: MetricsLog, emit: Observer, stop: StopRequest) -> None:
        self.parts, self.metrics, self.emit, self.stop = parts, metrics, emit, stop
        self.identity = RunIdentity(parts.config, parts.base.fingerprint, data_fingerprint(parts.dataset))
        check_same_run(self.identity, parts.ranks)
        store = CheckpointStore(parts.folder / CHECKPOINTS, self.identity, parts.training.keep_checkpoints)
        self.checkpoints = SharedCheckpoints(store, parts.ranks)
        self.trainer: Trainer | None = None

    def note(self, text: str) -> None:
        """Tell what a person should know, though it is none of the training."""
        self.emit(Noted(step=self.trainer.progress.step if self.trainer else 0, text=text))

    def run(self, *, resume: bool) -> RunFinished:
        """Train to the end."""
        parts, started = self.parts, time.perf_counter()
        is_recomputed = parts.training.gradient_checkpointing and parts.base.offload is None
        with (
            _offloaded_gradients(parts.base) as gradient,
            recomputed(list(parts.base.model.layers), enabled=is_recomputed),
            dense_products(parts.base.model),
        ):
            prefix = _prefix(parts, self.identity)
            objective = replace(prefix.objective, apart=gradient.loss) if gradient else prefix.objective
            layout = objective.layout(parts.config.data)
            training, ranks = parts.training, parts.ranks
            size, accumulation = training.batch_size, training.gradient_accumulation
            batches = Batches(parts.dataset.train, size, accumulation, training.seed, layout)
            self.trainer = trainer = Trainer(
                objective,
                build_optimizer(training),
                batches.shared(ranks.rank, ranks.size),
                list(in_order(parts.validation_rows, size, layout)),
                training,
                checkpoints=self.checkpoints,
                publish=parts.publish,
                emit=self.emit,
                monitor=parts.monitor,
                stop=self.stop,
                ranks=ranks,
            )
            is_resumed = resume and bool(self.checkpoints.steps())
            notes = self._restore(trainer) if is_resumed else self._begin()
            planned = [parts.planned.line] if parts.planned else []
            with announced(parts.folder, num_ranks=ranks.size, is_on=ranks.is_first):
                self.emit(run_started(trainer, parts, [*planned, *notes, *parts.base.notes, *prefix.notes]))
                command = f"mlx-qlora train --resume --adapter-path {parts.folder}"
                prefix.fill(on_bytes=parts.on_prefix_bytes, stop=self.stop, run=command)
                first_tokens = trainer.progress.tokens
                trainer.run()
                parts.base.model.eval()
                seconds = time.perf_counter() - started
                finished = run_finished(trainer, parts, seconds=seconds, first_tokens=first_tokens)
                self.emit(finished)
        return finished

    def report(self, stop: StopRequest) -> tuple[Suggestion, ...]:
        """Write the report, with what the base and the adapter answer."""
        parts, trainer = self.parts, self.trainer
        if trainer is None:
            return ()
        told = Told(
            facts=run_facts(trainer, parts),
            plan=plan_summary(parts.planned),
            samples=self._samples(trainer, stop),
            data_lines=parts.dataset.report.lines(),
        )
        return write_report(parts.folder, parts.config, told)

    def _samples(self, trainer: Trainer, stop: StopRequest) -> list[Sample]:
        base, dataset = self.parts.base, self.parts.dataset
        held_out = (dataset.test or dataset.valid)[: self.parts.config.training.report_samples]
        if not held_out or trainer.kept is None:
            return []
        try:
            with dense_products(base.model):
                return sampled_answers(
                    base.model, base.tokenizer, held_out, adapter=trainer.kept, should_stop=lambda: stop
                )
        except Exception as error:  # the adapter is there: a report without answers is better than none
            self.note(f"the report has no answers: {type(error).__name__}: {error}")
            return []

    def _restore(self, trainer: Trainer) -> list[str]:
        checkpoint, broken = self.checkpoints.load_newest()
        self.checkpoints.drop_after(checkpoint.progress.step)
        trainer.restore(checkpoint)
        if self.parts.ranks.is_first:
            self.metrics.truncate_after(checkpoint.progress.step)
        return [f"resumed from {checkpoint.path.name}", *(f"passed over {reason}" for reason in broken)]

    def _begin(self) -> list[str]:
        if self.parts.ranks.is_first:
            begin_folder(self.parts.folder, self.parts.config)
        return []


def _offloaded_gradients(base: BaseModel) -> AbstractContextManager[PiecewiseGradient | None]:
    return offloaded_gradients(base.offload) if base.offload is not None else nullcontext()


def _prefix(parts: Parts, identity: RunIdentity) -> PrefixRun:
    objective = objective_for(parts.base.model.train())
    if not parts.config.training.cache_frozen_prefix:
        return PrefixRun(objective)
    if not parts.ranks.is_alone:
        return PrefixRun(objective, ["frozen prefix: not kept by several ranks; every layer is run"])
    return prefix_run(objective, parts.base, parts.dataset.train, identity.data_fingerprint)
