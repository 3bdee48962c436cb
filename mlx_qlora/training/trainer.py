"""The training loop. Everything around it is injected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.config import TrainingConfig
from mlx_qlora.dataset.batches import Batch, Batches
from mlx_qlora.errors import CheckpointError, Interrupted
from mlx_qlora.lora.adapter import adapter_tensors, set_adapter_tensors
from mlx_qlora.memory.monitor import MemoryMonitor, MemorySample
from mlx_qlora.objective.evaluate import evaluate
from mlx_qlora.objective.loss import Objective
from mlx_qlora.training.checkpoint import Checkpoint, CheckpointStore, Progress
from mlx_qlora.training.diagnosis import diagnose
from mlx_qlora.training.distributed import ALONE, Ranks, fingerprint_of
from mlx_qlora.training.distributed_checkpoint import SharedCheckpoints
from mlx_qlora.training.events import MemoryPressure, Observer, RolledBack, Saved, StepDone, Validated
from mlx_qlora.training.guard import (
    BAD_UPDATES_IN_A_ROW,
    MAX_ROLLBACKS,
    StopRequest,
    diverged,
    out_of_memory,
)
from mlx_qlora.training.optimizer import learning_rate_at
from mlx_qlora.training.progress import after, total_steps, validated
from mlx_qlora.training.step import Outcome, TrainStep

PATIENCE = 3
"""So many updates in a row may be short of memory before a run of single rows stops."""

Publish = Callable[[Mapping[str, mx.array]], None]
"""Writes the given tensors as the run's adapter."""


class Trainer:
    """Steps, validations, checkpoints and roll-backs of one run.

    What the run computes is a function of the model, the batches and the configuration: neither
    checkpoints nor interruptions change it.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optim.Optimizer,
        batches: Batches,
        validation: Sequence[Batch],
        config: TrainingConfig,
        *,
        checkpoints: CheckpointStore | SharedCheckpoints,
        publish: Publish,
        emit: Observer,
        monitor: MemoryMonitor,
        stop: StopRequest,
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective, self.model, self.optimizer = objective, objective.model, optimizer
        self.batches, self.validation = batches, validation
        self.config, self.checkpoints, self.publish = config, checkpoints, publish
        self.emit, self.monitor, self.stop, self.ranks = emit, monitor, stop, ranks
        self.step = TrainStep(objective, optimizer, config, ranks)
        self.progress = Progress()
        self.total_steps = total_steps(config, batches)
        self.budget_bytes = monitor.budget_bytes(config.memory_budget_gib)
        self.kept: Mapping[str, mx.array] | None = None
        """The tensors that are published in the end: the best, or the last."""
        self._saved_step = -1
        self._short_updates = 0
        self._signal_of_all: int | None = None

    def run(self) -> Progress:
        """Train to the end, publish the adapter that is kept, and say where the run stands.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            DivergenceError: the numbers stayed non-finite after every roll-back.
        """
        while True:
            if self._validation_is_due():
                self._validate()
            if self._checkpoint_is_due():
                self._save()
            if self.is_finished:
                break
            self._stop_if_asked()
            self._update()
        self._publish_best()
        return self.progress

    @property
    def is_finished(self) -> bool:
        """All updates are done, or validation has stopped improving."""
        return self.progress.step >= self.total_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Validation has not improved for as long as the configuration allows."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.validations_without_best >= patience

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was made."""
        set_adapter_tensors(self.model, checkpoint.adapter, where=str(checkpoint.path))
        expected = dict(tree_flatten(self.optimizer.state))
        if expected.keys() != checkpoint.optimizer.keys():
            raise CheckpointError(
                "damaged (optimizer state of another optimizer)", where=str(checkpoint.path)
            )
        self.optimizer.state = tree_unflatten(list(checkpoint.optimizer.items()))
        self.progress = checkpoint.progress
        for _ in range(checkpoint.progress.halvings):
            self.batches = self.batches.halved() or self.batches
        self._saved_step = checkpoint.progress.step

    def _update(self) -> None:
        started, step = time.perf_counter(), self.progress.step + 1
        mx.reset_peak_memory()
        rate = learning_rate_at(step, self.total_steps, self.config) * self.progress.learning_rate_factor
        batches = self.batches.step(step - 1)
        outcome = self.step(batches, step, rate)
        diagnosis = self._diagnosed(outcome, batches) if outcome.skipped else ""
        self.progress = after(self.progress, outcome, starts_epoch=(step - 1) % self._epoch_steps == 0)
        sample = self.monitor.sample()
        self.emit(
            StepDone(
                step=step,
                epoch=(step - 1) // self._epoch_steps + 1,
                loss_nats=outcome.nll / max(outcome.target_tokens, 1),
                target_tokens=outcome.target_tokens,
                tokens=outcome.tokens,
                tokens_seen=self.progress.tokens,
                learning_rate=rate,
                grad_norm=outcome.grad_norm,
                seconds=time.perf_counter() - started,
                memory=sample,
                skipped=outcome.skipped,
                diagnosis=diagnosis,
                positions=sum(b.inputs_BT.size for b in batches) if self.ranks.is_alone else 0,
            )
        )
        self._relieve(sample, step, is_short=self._agreed(sample))
        if self.progress.bad_in_a_row >= BAD_UPDATES_IN_A_ROW:
            self._roll_back()

    def _diagnosed(self, outcome: Outcome, batches: Sequence[Batch]) -> str:
        if outcome.has_no_gradient:
            return (
                "a gradient is exactly zero and its loss is not, as after an error that a GPU did not report"
            )
        return diagnose(self.objective, batches)

    def _agreed(self, sample: MemorySample) -> bool:
        """Whether memory is short on any rank; and what signal any of them was sent is kept."""
        is_short = sample.needed_bytes > self.budget_bytes or sample.pressure == "critical"
        short, number = self.ranks.highest(is_short, self.stop.signal_number or 0)
        self._signal_of_all = int(number) or None
        return bool(short)

    def _relieve(self, sample: MemorySample, step: int, *, is_short: bool) -> None:
        """When memory is short: give back the cache, then halve the micro-batch, then save and stop.

        Halving changes no update: twice as many micro-batches have the same examples.
        """
        if not is_short:
            self._short_updates = 0
            return
        self._short_updates += 1
        mx.clear_cache()
        action = "cleared MLX's buffer cache"
        if self._short_updates > 1:
            smaller = self.batches.halved()
            if smaller is None:
                self._stop_for_memory(sample)
            else:
                self._use(smaller)
                size = smaller.batch_size
                action = f"halved the micro-batch to {size}, with twice the accumulation: the same updates"
        self.emit(MemoryPressure(step=step, memory=sample, budget_bytes=self.budget_bytes, action=action))

    def _use(self, smaller: Batches) -> None:
        self.batches = smaller
        self.progress = replace(self.progress, halvings=self.progress.halvings + 1)
        self._short_updates = 0

    def _stop_for_memory(self, sample: MemorySample) -> None:
        if self._short_updates <= PATIENCE:
            return
        self._save()
        raise out_of_memory(sample, self.budget_bytes, self.progress.step, self.checkpoints.folder.parent)

    def _validation_is_due(self) -> bool:
        step, every = self.progress.step, self.config.steps_per_validation
        is_time = step % every == 0 or self.is_finished
        return bool(self.validation) and is_time and self.progress.validated_step != step

    def _validate(self) -> None:
        started = time.perf_counter()
        own = evaluate(self.model, self.ranks.share(self.validation), self.objective)
        result = self.ranks.together(own)
        self.progress = validated(self.progress, result.loss_nats)
        is_best = self.progress.best_step == self.progress.step
        self.emit(
            Validated(
                step=self.progress.step,
                loss_nats=result.loss_nats,
                target_tokens=result.target_tokens,
                is_best=is_best,
                seconds=time.perf_counter() - started,
            )
        )
        if is_best:
            self._save(is_best=True)

    def _checkpoint_is_due(self) -> bool:
        step = self.progress.step
        is_time = step % self.config.steps_per_checkpoint == 0 or self.is_finished
        return is_time and self._saved_step != step

    def _save(self, *, is_best: bool = False) -> None:
        self._take_from_first()
        optimizer_state = dict(tree_flatten(self.optimizer.state))
        path = self.checkpoints.save(self.progress, adapter_tensors(self.model), optimizer_state)
        self._saved_step = self.progress.step
        self.emit(Saved(step=self.progress.step, path=path, is_best=is_best))
        if self.progress.step > 0 and (is_best or not self.validation):
            self.publish(adapter_tensors(self.model))

    def _take_from_first(self) -> None:
        """Where ranks on different chips have come apart by a rounding, all go on from rank 0's numbers.

        They get the same sums, but each makes its own update of them. What goes on after a checkpoint is then
        what a run resumed from it would do.
        """
        adapter = adapter_tensors(self.model)
        state = dict(tree_flatten(self.optimizer.state))
        prints = (
            self.ranks.table(fingerprint_of(adapter), fingerprint_of(state))
            if not self.ranks.is_alone
            else None
        )
        if prints is None or (prints == prints[0]).all():
            return
        set_adapter_tensors(self.model, self.ranks.tensors_from_first(adapter), where="rank 0")
        self.optimizer.state = tree_unflatten(list(self.ranks.tensors_from_first(state).items()))

    def _publish_best(self) -> None:
        if self.validation and self.progress.best_step != self.progress.step:
            self.kept = self.checkpoints.load(self.progress.best_step).adapter
        else:
            self.kept = adapter_tensors(self.model)
        self.publish(self.kept)

    def _stop_if_asked(self) -> None:
        signal_number = self.stop.signal_number if self.ranks.is_alone else self._signal_of_all
        if signal_number is None:
            return
        if self._saved_step != self.progress.step:
            self._save()
        raise Interrupted(
            f"Stopped after step {self.progress.step} of {self.total_steps}; the checkpoint is saved.",
            signal_number=signal_number,
            run=f"mlx-qlora train --resume --adapter-path {self.checkpoints.folder.parent}",
        )

    def _roll_back(self) -> None:
        failed = self.progress
        if failed.rollbacks >= MAX_ROLLBACKS:
            raise diverged(failed.step, failed.rollbacks, self.checkpoints.folder.parent)
        checkpoint, _ = self.checkpoints.load_newest()
        self.restore(checkpoint)
        self.progress = replace(
            self.progress,
            learning_rate_factor=failed.learning_rate_factor / 2,
            rollbacks=failed.rollbacks + 1,
            skipped_updates=failed.skipped_updates,
            bad_in_a_row=0,
        )
        self._save()  # a kill from here on resumes with the halved rate
        self.emit(
            RolledBack(
                from_step=failed.step,
                to_step=self.progress.step,
                learning_rate_factor=self.progress.learning_rate_factor,
            )
        )

    @property
    def _epoch_steps(self) -> int:
        return self.batches.steps_per_epoch
