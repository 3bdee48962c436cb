"""What a training run tells its observers: typed, frozen facts. Observers only watch; a guard may raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_qlora.memory.monitor import MemorySample


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """Before the first step (or the first after a resume)."""

    first_step: int
    """Optimizer updates already done: 0 for a new run."""
    total_steps: int
    steps_per_epoch: int
    num_examples: int
    trainable_parameters: int
    total_parameters: int
    budget_bytes: int
    """What the process footprint should stay below."""
    notes: tuple[str, ...] = ()
    """What the trainer decided by itself and a person should know."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer update."""

    step: int
    """Updates done, counted from 1."""
    epoch: int
    """Counted from 1."""
    loss_nats: float
    """Mean negative log-likelihood per target token of this update's batches; NaN when it was skipped."""
    target_tokens: int
    """Tokens with a label in this update."""
    tokens: int
    """All real tokens read in this update, prompts included, padding excluded."""
    tokens_seen: int
    """`tokens`, summed over the run so far."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    memory: MemorySample
    skipped: bool = False
    """True when loss or gradient was not finite, or there was none, and nothing was updated."""
    diagnosis: str = ""
    """Then: which micro-batch, and where in the model it began."""
    positions: int = 0
    """Places in the update's rows, padding included; 0 where that is not counted (several ranks)."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A full pass over the fixed validation rows, after update `step`."""

    step: int
    loss_nats: float
    target_tokens: int
    is_best: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is on disk, whole."""

    step: int
    path: Path
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class RolledBack:
    """Three updates in a row were not finite: the run went back and halved its learning rate."""

    from_step: int
    to_step: int
    learning_rate_factor: float


@dataclass(frozen=True, kw_only=True)
class MemoryPressure:
    """The footprint passed its budget, or the system says it is short of memory."""

    step: int
    memory: MemorySample
    budget_bytes: int
    action: str
    """What was done about it."""


@dataclass(frozen=True, kw_only=True)
class Noted:
    """Something beside the training itself that a person should know, such as a tracker that failed."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The run ended by itself (not by a signal)."""

    steps: int
    tokens: int
    train_loss_nats: float
    """Mean over the last epoch's updates."""
    val_loss_nats: float | None
    """Of the adapter that was kept; None without validation rows."""
    best_step: int
    stopped_early: bool
    skipped_updates: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    """Peak process footprint."""
    adapter_path: Path


Event = RunStarted | StepDone | Validated | Saved | RolledBack | MemoryPressure | Noted | RunFinished
Observer = Callable[[Event], None]


def fan_out(observers: Iterable[Observer]) -> Observer:
    """One observer that tells them all, in order."""
    observers = tuple(observers)

    def emit(event: Event) -> None:
        for observer in observers:
            observer(event)

    return emit
