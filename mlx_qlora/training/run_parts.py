"""What one run is put together from, and what it says of itself at its beginning and end."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qlora.blas import blas_is_fast
from mlx_qlora.config import RunConfig, TrainingConfig
from mlx_qlora.dataset import Dataset, Example, template_of, tokenizer_sha256
from mlx_qlora.lora.adapter import AdapterInfo, save_adapter, text_sha256
from mlx_qlora.memory.monitor import MemoryMonitor
from mlx_qlora.presets import GIB
from mlx_qlora.training.checkpoint import RunIdentity
from mlx_qlora.training.distributed import ALONE, Ranks
from mlx_qlora.training.events import Observer, RunFinished, RunStarted
from mlx_qlora.training.optimizer import warmup_length
from mlx_qlora.training.planning import RunPlan
from mlx_qlora.training.trainer import Trainer
from mlx_qlora.weights.loader import BaseModel


@dataclass(frozen=True)
class Parts:
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
        return with_own_budget(self.config, self.ranks, self.monitor).training

    @property
    def validation_rows(self) -> list[Example]:
        """The rows a validation looks at."""
        return self.dataset.valid[: self.config.data.max_valid_examples]

    @property
    def publish(self) -> Callable[[Mapping[str, mx.array]], None]:
        """Writes tensors as the run's adapter, on rank 0."""
        if not self.ranks.is_first:
            return lambda _tensors: None
        config, template = self.config, template_of(self.base.tokenizer)
        info = AdapterInfo(
            model=config.model,
            quantization=config.quantization,
            lora=config.lora,
            system_prompt=config.data.system_prompt,
            fingerprint=self.base.fingerprint,
            chat_template=template,
            chat_template_sha256=text_sha256(template),
            tokenizer_sha256=tokenizer_sha256(self.base.tokenizer),
        )
        layers = len(self.base.model.layers)
        return lambda tensors: save_adapter(self.folder, tensors, info, num_layers=layers)


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


def with_own_budget(config: RunConfig, ranks: Ranks, monitor: MemoryMonitor) -> RunConfig:
    """With this rank's part of the machine's memory, where ranks share one; a given budget is each rank's."""
    training = config.training
    if ranks.num_local == 1 or training.memory_budget_gib:
        return config
    share = monitor.budget_bytes(None) / GIB / ranks.num_local
    return config.model_copy(update={"training": training.model_copy(update={"memory_budget_gib": share})})


def check_same_run(identity: RunIdentity, ranks: Ranks) -> None:
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


def run_started(trainer: Trainer, parts: Parts, notes: list[str]) -> RunStarted:
    """What is told before the first step, with all that was decided without asking."""
    model, training = parts.base.model, parts.config.training
    notes = [*notes, *trainer.objective.notes]
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


def run_finished(trainer: Trainer, parts: Parts, *, seconds: float, first_tokens: int) -> RunFinished:
    """What is told at the end.

    Args:
        seconds: Since the run began or was resumed.
        first_tokens: Tokens that had been read then.
    """
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
