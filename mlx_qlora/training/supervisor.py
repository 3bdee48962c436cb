"""A run of several ranks, started again from the last checkpoint whenever one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlx_qlora.config import RunConfig
from mlx_qlora.training.attempt import Attempt, Job, Patience
from mlx_qlora.training.checkpoint import saved_steps
from mlx_qlora.training.distributed import RankError
from mlx_qlora.training.events import Observer, RunFinished
from mlx_qlora.training.guard import stop_on_signals
from mlx_qlora.training.launcher import Launcher, LocalLauncher
from mlx_qlora.training.run import CHECKPOINTS, with_absolute_paths


def train_on_ranks(
    config: RunConfig,
    adapter_path: str | Path,
    launcher: Launcher | int,
    *,
    resume: bool = False,
    force: bool = False,
    observers: Iterable[Observer] = (),
    on_bytes: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    max_restarts: int = 3,
    patience: Patience | None = None,
) -> RunFinished:
    """Train on several ranks; the updates are those of one, each rank doing a part of every one.

    Args:
        launcher: How the ranks are started; a number is so many on this machine.
        resume, force, observers, on_bytes: As `train`; observers are told what rank 0 sees.
        on_note: Told of each restart and its reason.
        max_restarts: How often the run is started again from its last checkpoint when a rank is killed,
            hangs, does not join, or fails. A mistake of the user's is not tried again.

    Raises:
        RankError: ranks failed once more than that; the message says how.
        MlxQloraError: what any rank raised.
        Interrupted: Ctrl-C or SIGTERM, to this process or to any rank; a checkpoint was saved.
    """
    launcher = LocalLauncher(launcher) if isinstance(launcher, int) else launcher
    job = Job(
        with_absolute_paths(config), Path(adapter_path).resolve(), force, tuple(observers), on_bytes, on_note
    )
    faults: list[str] = []
    with stop_on_signals() as stop:
        while True:
            attempt = Attempt(launcher, job, stop, patience or Patience(), resume=resume or bool(faults))
            outcome = attempt.run()
            if isinstance(outcome, RunFinished):
                return outcome
            faults.append(outcome)
            if len(faults) > max_restarts:
                raise _gave_up(faults, job)
            saved = list(saved_steps(job.adapter_path / CHECKPOINTS))
            begin = f"from step {saved[-1]}" if saved else "from the beginning"
            job.note(f"{outcome}\nAll ranks are started again {begin} ({len(faults)} of {max_restarts})")


def _gave_up(faults: Sequence[str], job: Job) -> RankError:
    told = "\n".join(f"  {number}. {what}" for number, what in enumerate(faults, 1))
    return RankError(
        f"The ranks failed {len(faults)} times; the last checkpoint is whole:\n{told}",
        where=str(job.adapter_path),
        run=f"mlx-qlora train --resume --adapter-path {job.adapter_path} --processes …   # or without it",
    )
