"""The libraries of trackers, each behind the same three calls; none is imported before it is used."""

from __future__ import annotations

import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

Rows = Sequence[tuple[int, Mapping[str, float]]]
"""(step, numbers by name), steps rising."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run."""

    name: str
    project: str
    folder: Path
    """Of the adapter; for trackers that write files."""
    id: str | None
    """Under which the tracker knows the run already; None for a new one."""
    settings: Mapping[str, str]


class Client(ABC):
    """One tracker's library. Any call may raise anything."""

    name: ClassVar[str]
    module: ClassVar[str]
    package: ClassVar[str]
    """What pip calls it."""

    @abstractmethod
    def open(self, run: TrackedRun) -> str:
        """Begin the tracker's run, or go on with `run.id`; returns its id."""

    @abstractmethod
    def log(self, rows: Rows) -> None:
        """Send numbers, and have them on their way when this returns."""

    @abstractmethod
    def close(self, *, is_finished: bool) -> None:
        """End the tracker's run.

        Args:
            is_finished: False when it was interrupted or failed.
        """


@final
class TensorBoard(Client):
    """Event files in ``tensorboard/`` beside the adapter: ``tensorboard --logdir ADAPTER/tensorboard``."""

    name = module = package = "tensorboard"

    def open(self, run: TrackedRun) -> str:
        """Begin another event file in the same folder: TensorBoard reads all of a folder as one run."""
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.folder / "tensorboard"))
        return "tensorboard"

    def log(self, rows: Rows) -> None:
        """Write scalars, and flush them."""
        for step, numbers in rows:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, is_finished: bool) -> None:  # noqa: ARG002
        """Close the event file."""
        self._writer.close()


@final
class WeightsAndBiases(Client):
    """Weights & Biases. ``WANDB_MODE=offline`` keeps all on disk, for ``wandb sync``."""

    name = module = package = "wandb"

    def open(self, run: TrackedRun) -> str:
        """Begin or resume; neither the machine, nor its folders, nor the program are told."""
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            host="-",
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id or secrets.token_hex(8),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=settings,
            reinit="create_new",
        )
        return str(self._run.id)

    def log(self, rows: Rows) -> None:
        """Hand numbers to wandb's own process, which sends them."""
        for step, numbers in rows:
            self._run.log(dict(numbers), step=step)

    def close(self, *, is_finished: bool) -> None:
        """Wait for what is on its way; an interrupted run is shown as failed until it is resumed."""
        self._run.finish(exit_code=0 if is_finished else 1)


@final
class MLflow(Client):
    """MLflow, at ``MLFLOW_TRACKING_URI``."""

    name = "mlflow"
    module = "mlflow"
    package = "mlflow"

    _MOST_METRICS = 1000
    """In one request, by MLflow's REST interface."""

    def open(self, run: TrackedRun) -> str:
        """Begin or resume. A server that does not answer is given up after about half a minute."""
        # MLflow's own settings would hold up the training for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        if run.id is not None:
            self._client.update_run(run.id, status="RUNNING")
            self._id = run.id
            return run.id
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        self._id = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        params = [Param(key, value) for key, value in run.settings.items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def log(self, rows: Rows) -> None:
        """Send numbers, many in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step) for step, numbers in rows for name, value in numbers.items()
        ]
        for first in range(0, len(metrics), self._MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + self._MOST_METRICS])

    def close(self, *, is_finished: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")


@final
class Trackio(Client):
    """Trackio: a local database, or a Space by ``TRACKIO_SPACE_ID``."""

    name = module = package = "trackio"

    def open(self, run: TrackedRun) -> str:
        """Begin or resume; a run is known by its name, so that gets a suffix no other has."""
        import trackio

        run_id = run.id or f"{run.name}-{secrets.token_hex(4)}"
        self._run: Any = trackio.init(
            project=run.project,
            name=run_id,
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return run_id

    def log(self, rows: Rows) -> None:
        """Hand numbers to trackio's own thread, which writes them."""
        for step, numbers in rows:
            self._run.log(dict(numbers), step=step)

    def close(self, *, is_finished: bool) -> None:  # noqa: ARG002
        """Wait for what is on its way."""
        import trackio

        trackio.finish()  # not the run's own: trackio would end it once more when Python ends, on stdout


CLIENTS: dict[str, type[Client]] = {c.name: c for c in (TensorBoard, WeightsAndBiases, MLflow, Trackio)}
"""By the name that ``training.trackers`` gives."""
