"""A whole training run: base model, data, trainer, and the folder that people ship."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qlora.blas import blas_is_fast
from mlx_qlora.config import RunConfig, TrainingConfig, build_config, read_config, to_yaml
from mlx_qlora.dataset import Batches, Dataset, Example, in_order, load_dataset, template_of
from mlx_qlora.errors import CheckpointError, ConfigError
from mlx_qlora.lora.adapter import WEIGHTS, AdapterInfo, save_adapter, text_sha256
from mlx_qlora.lora.initialisation import attach_initialised
from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.memory.monitor import MemoryMonitor
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.presets import GIB
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.storage import make_folder, said_clearly, sweep, write_text
from mlx_qlora.training.checkpoint import CheckpointStore, RunIdentity, saved_steps
from mlx_qlora.training.distributed import ALONE, Ranks
from mlx_qlora.training.distributed_checkpoint import SharedCheckpoints
from mlx_qlora.training.events import Observer, RunFinished, RunStarted
from mlx_qlora.training.guard import stop_on_signals
from mlx_qlora.training.metrics import METRICS, MetricsLog
from mlx_qlora.training.offload_gradient import PiecewiseGradient, offloaded_gradients
from mlx_qlora.training.optimizer import build_optimizer, warmup_length
from mlx_qlora.training.planning import RunPlan, admitted
from mlx_qlora.training.prefix_run import PrefixRun, prefix_run
from mlx_qlora.training.recompute import recomputed
from mlx_qlora.training.report import write_report
from mlx_qlora.training.trainer import Trainer, fan_out
from mlx_qlora.weights.loader import BaseModel, load_base, settled

RUN_FILE, CHECKPOINTS = "run.yaml", "checkpoints"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, with the model still in memory."""

    finished: RunFinished
    base: BaseModel
    dataset: Dataset


@dataclass(frozen=True)
class _Parts:
    """What one run is put together from."""

    config: RunConfig
    folder: Path
    base: BaseModel
    dataset: Dataset
    observers: Sequence[Observer]
    planned: RunPlan | None
    on_prefix_bytes: Callable[[int, int], None] | None = None
    ranks: Ranks = ALONE
    monitor: MemoryMonitor = field(default_factory=MemoryMonitor)

    @property
    def training(self) -> TrainingConfig:
        """With this rank's share of the machine's memory."""
        return _with_own_budget(self.config, self.ranks, self.monitor).training


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
        _check_folder(folder, resume=resume)
    is_begun = ranks.value_from_first(resume and any(saved_steps(folder / CHECKPOINTS)))
    monitor = MemoryMonitor()
    with ranks.in_turn():
        planned = admitted(_with_own_budget(config, ranks, monitor), is_begun=is_begun, force=force)
        config = config.model_copy(
            update={"quantization": settled(config.model, config.quantization, on_bytes)}
        )  # so that run.yaml and the adapter name each layer's scheme
        base = load_base(config.model, config.quantization, on_bytes=on_bytes)
        dataset = load_dataset(config.data, base.tokenizer, config.training.seed)
    with ranks.in_turn():  # what is decomposed is kept in files
        attach_initialised(base, config.lora, config.training.seed, on_init_bytes, is_restored=is_begun)
    parts = _Parts(config, folder, base, dataset, tuple(observers), planned, on_prefix_bytes, ranks, monitor)
    with memory_limits(monitor.budget_bytes(parts.training.memory_budget_gib)):
        finished = _run(parts, resume=resume)
    return TrainedRun(finished, base, dataset)


def resumed_config(adapter_path: str | Path) -> RunConfig:
    """The configuration that the run in `adapter_path` was started with.

    Raises:
        CheckpointError: no run was started there.
    """
    path = Path(adapter_path) / RUN_FILE
    if not path.is_file():
        raise CheckpointError(
            "There is no run to resume here.",
            where=str(path),
            run=f"mlx-qlora train --model M --data D --adapter-path {adapter_path}",
        )
    return build_config(read_config(path), where=str(path))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever folder it is resumed from; hub ids stay as they are.

    Raises:
        ConfigError: there is no model or no data.
    """
    for part, option in ((config.model, "--model"), (config.data, "--data")):
        if part.path is None:
            raise ConfigError(f"The run has no {option[2:]}.", run=f"mlx-qlora train {option} …")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": _absolute(config.model.path)}),
            "data": config.data.model_copy(update={"path": _absolute(config.data.path)}),
        }
    )


def data_fingerprint(dataset: Dataset) -> str:
    """Digest of all tokens and targets a run trains and validates on."""
    digest = hashlib.sha256()
    for examples in (dataset.train, dataset.valid):
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.tobytes())
            digest.update(example.targets_mask.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _run(parts: _Parts, *, resume: bool) -> RunFinished:
    training, folder, ranks = parts.training, parts.folder, parts.ranks
    started = time.perf_counter()
    identity = RunIdentity(parts.config, parts.base.fingerprint, data_fingerprint(parts.dataset))
    _check_same_run(identity, ranks)
    store = CheckpointStore(folder / CHECKPOINTS, identity, training.keep_checkpoints)
    checkpoints = SharedCheckpoints(store, ranks)
    metrics = MetricsLog(folder / METRICS)
    emit = fan_out([*([metrics] if ranks.is_first else []), *parts.observers])
    layers = list(parts.base.model.layers)
    is_recomputed = training.gradient_checkpointing and parts.base.offload is None
    with (
        stop_on_signals() as stop,
        _offloaded_gradients(parts.base) as gradient,
        recomputed(layers, enabled=is_recomputed),
        dense_products(parts.base.model),
    ):
        prefix = _prefix(parts, identity)
        objective = replace(prefix.objective, apart=gradient.loss) if gradient else prefix.objective
        layout = objective.layout(parts.config.data)
        train_rows, size, accumulation = (
            parts.dataset.train,
            training.batch_size,
            training.gradient_accumulation,
        )
        trainer = Trainer(
            objective,
            build_optimizer(training),
            Batches(train_rows, size, accumulation, training.seed, layout).shared(ranks.rank, ranks.size),
            list(in_order(_validation_rows(parts), size, layout)),
            training,
            checkpoints=checkpoints,
            publish=_publisher(parts),
            emit=emit,
            monitor=parts.monitor,
            stop=stop,
            ranks=ranks,
        )
        is_resumed = resume and bool(checkpoints.steps())
        notes = _restore(trainer, checkpoints, metrics) if is_resumed else _begin(parts)
        planned = [parts.planned.line] if parts.planned else []
        emit(_run_started(trainer, parts, [*planned, *notes, *parts.base.notes, *prefix.notes]))
        resume_command = f"mlx-qlora train --resume --adapter-path {folder}"
        prefix.fill(on_bytes=parts.on_prefix_bytes, stop=stop, run=resume_command)
        first_tokens = trainer.progress.tokens
        trainer.run()
        parts.base.model.eval()
        seconds = time.perf_counter() - started
        finished = _finished(trainer, parts, seconds=seconds, first_tokens=first_tokens)
        emit(finished)
        # Asked to stop only now, the run ends as it would have.
        if ranks.is_first:
            write_report(folder, parts.config, parts.dataset.report.lines())
    return finished


def _offloaded_gradients(base: BaseModel) -> AbstractContextManager[PiecewiseGradient | None]:
    return offloaded_gradients(base.offload) if base.offload is not None else nullcontext()


def _prefix(parts: _Parts, identity: RunIdentity) -> PrefixRun:
    objective = objective_for(parts.base.model.train())
    if not parts.config.training.cache_frozen_prefix:
        return PrefixRun(objective)
    if not parts.ranks.is_alone:
        return PrefixRun(objective, ["frozen prefix: not kept by several ranks; every layer is run"])
    return prefix_run(objective, parts.base, parts.dataset.train, identity.data_fingerprint)


def _restore(trainer: Trainer, checkpoints: SharedCheckpoints, metrics: MetricsLog) -> list[str]:
    checkpoint, broken = checkpoints.load_newest()
    checkpoints.drop_after(checkpoint.progress.step)
    trainer.restore(checkpoint)
    if trainer.ranks.is_first:
        metrics.truncate_after(checkpoint.progress.step)
    return [f"resumed from {checkpoint.path.name}", *(f"passed over {reason}" for reason in broken)]


def _begin(parts: _Parts) -> list[str]:
    if not parts.ranks.is_first:
        return []
    with said_clearly(parts.folder):
        make_folder(parts.folder / CHECKPOINTS)
        (parts.folder / METRICS).unlink(missing_ok=True)
    sweep(parts.folder)
    write_text(parts.folder / RUN_FILE, to_yaml(parts.config))
    return []


def _run_started(trainer: Trainer, parts: _Parts, notes: list[str]) -> RunStarted:
    model, training = parts.base.model, parts.config.training
    notes += trainer.objective.notes
    if not parts.ranks.is_alone:
        notes.append(f"{parts.ranks.size} ranks; memory figures are those of rank 0")
    if sys.platform.startswith("linux") and mx.default_device() == mx.cpu and not blas_is_fast():
        notes.append("this CPU trains several times faster with OpenBLAS: apt install libopenblas0")
    warmup = warmup_length(training, trainer.total_steps)
    if warmup != training.warmup_steps:
        notes.append(
            f"warm-up: {warmup} of {trainer.total_steps} steps (warmup_steps is longer than the run)"
        )
    return RunStarted(
        first_step=trainer.progress.step,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.batches.steps_per_epoch,
        num_examples=len(parts.dataset.train),
        trainable_parameters=sum(a.size for _, a in tree_flatten(model.trainable_parameters())),
        total_parameters=parts.base.num_parameters,
        budget_bytes=trainer.budget_bytes,
        notes=(*notes, *parts.dataset.report.lines()),
    )


def _publisher(parts: _Parts) -> Callable[[Mapping[str, mx.array]], None]:
    if not parts.ranks.is_first:
        return lambda _tensors: None
    config, template = parts.config, template_of(parts.base.tokenizer)
    info = AdapterInfo(
        model=config.model,
        quantization=config.quantization,
        lora=config.lora,
        system_prompt=config.data.system_prompt,
        fingerprint=parts.base.fingerprint,
        chat_template=template,
        chat_template_sha256=text_sha256(template),
    )
    return lambda tensors: save_adapter(parts.folder, tensors, info, num_layers=len(parts.base.model.layers))


def _finished(trainer: Trainer, parts: _Parts, *, seconds: float, first_tokens: int) -> RunFinished:
    progress = trainer.progress
    has_validation = progress.best_loss is not None
    (peak,) = parts.ranks.highest(parts.monitor.peak_footprint_bytes)
    return RunFinished(
        steps=progress.step,
        tokens=progress.tokens,
        train_loss_nats=progress.epoch_nll / max(progress.epoch_target_tokens, 1),
        val_loss_nats=progress.best_loss,
        best_step=progress.best_step if has_validation else progress.step,
        stopped_early=trainer.stopped_early,
        skipped_updates=progress.skipped_updates,
        seconds=seconds,
        tokens_per_second=(progress.tokens - first_tokens) / seconds,
        peak_memory_bytes=int(peak),
        adapter_path=parts.folder,
    )


def _with_own_budget(config: RunConfig, ranks: Ranks, monitor: MemoryMonitor) -> RunConfig:
    """With this rank's part of the machine's memory, where ranks share one; a given budget is each rank's."""
    training = config.training
    if ranks.num_local == 1 or training.memory_budget_gib:
        return config
    share = monitor.budget_bytes(None) / GIB / ranks.num_local
    return config.model_copy(update={"training": training.model_copy(update={"memory_budget_gib": share})})


def _check_same_run(identity: RunIdentity, ranks: Ranks) -> None:
    """Whether all ranks compute the same: paths may differ from machine to machine."""
    tree = identity.config.model_dump(mode="json")
    for part in ("model", "data"):
        del tree[part]["path"]
    ranks.check_same(
        configuration=json.dumps(tree, sort_keys=True),
        **{
            "base model": identity.base_fingerprint,
            "training data, as tokens": identity.data_fingerprint,
            "version of MLX": version("mlx"),
            "version of mlx-lm": version("mlx-lm"),
        },
    )


def _validation_rows(parts: _Parts) -> list[Example]:
    limit = parts.config.data.max_valid_examples
    return parts.dataset.valid[:limit]


def _check_folder(folder: Path, *, resume: bool) -> None:
    holds_a_run = (folder / WEIGHTS).exists() or any((folder / CHECKPOINTS).glob("step-*"))
    if holds_a_run and not resume:
        raise CheckpointError(
            "A run was already started here; nothing was touched.",
            where=str(folder),
            run=f"mlx-qlora train --resume --adapter-path {folder}   # or choose another --adapter-path",
        )


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
