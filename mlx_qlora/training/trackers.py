"""Metrics on their way to tensorboard, wandb, mlflow or trackio: each update once, and only when it stands.

An update after the newest checkpoint may still be undone, by a roll-back or by a kill and a resumption. So a
tracker is sent updates when a checkpoint makes them final; what it has been sent is kept in ``trackers.json``
beside the adapter, and a resumed run goes on from there, in the tracker's own run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mlx_qlora.config import RunConfig, TrainingConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.presets import GIB
from mlx_qlora.storage import plain_json, read_json, write_json
from mlx_qlora.training.events import Event, RolledBack, RunFinished, RunStarted, Saved, StepDone, Validated
from mlx_qlora.training.metrics import METRICS, Entry, read_metrics
from mlx_qlora.training.tracker_clients import CLIENTS, Client, TrackedRun

TRACKED = "trackers.json"

_LONGEST_SETTING = 400
_PRIVATE = ("data.system_prompt", "data.prompt_template", "training.trackers", "training.tracker_project")


def check_trackers(config: TrainingConfig) -> None:
    """Refuse trackers whose library is not installed, before anything is loaded.

    Raises:
        ConfigError: with the command that installs them.
    """
    missing = [CLIENTS[name] for name in config.trackers if find_spec(CLIENTS[name].module) is None]
    if missing:
        names = ", ".join(client.name for client in missing)
        raise ConfigError(
            f"Metrics are to go to {names}, which is not installed.",
            where="training.trackers",
            run=f"pip install {' '.join(client.package for client in missing)}"
            "   # or: pip install 'mlx-qlora[trackers]'",
        )


@contextmanager
def tracking(
    config: RunConfig, folder: Path, note: Callable[[str], None], *, is_on: bool = True
) -> Iterator[list[Tracker]]:
    """Observers that send metrics to the configured trackers; they are closed when the context ends.

    Args:
        folder: Of the adapter; its metrics.jsonl is what is sent.
        note: Told once of each tracker that fails, and why. The run goes on without it.
        is_on: False for ranks after the first.
    """
    names = dict.fromkeys(config.training.trackers) if is_on else ()
    trackers = [Tracker(CLIENTS[name](), config, folder, note) for name in names]
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


class Tracker:
    """An observer that sends a run's metrics to one tracker. No failure of it reaches the run.

    Args:
        client: The tracker's own library.
        note: Told once, when it fails.
    """

    def __init__(self, client: Client, config: RunConfig, folder: Path, note: Callable[[str], None]) -> None:
        self.client, self.config, self.folder, self.note = client, config, folder, note
        self._pending: list[Entry] = []
        self._sent_step = -1
        self._is_open = self._is_finished = False

    def __call__(self, event: Event) -> None:
        """Keep what the event measured; send what stands."""
        match event:
            case RunStarted():
                with self._noting():
                    self._open(event)
            case StepDone() | Validated():
                self._pending.append({"event": type(event).__name__, **plain_json(asdict(event))})
            case RolledBack():
                self._pending = [entry for entry in self._pending if entry["step"] <= event.to_step]
            case Saved():
                self._send()
            case RunFinished():
                self._is_finished = True
                self._send()

    def close(self) -> None:
        """End the tracker's run; what does not stand yet is not sent."""
        was_open, self._is_open = self._is_open, False
        if was_open:
            with self._noting(), redirect_stdout(sys.stderr):
                self.client.close(is_finished=self._is_finished)

    def _open(self, event: RunStarted) -> None:
        known = self._known()
        run = TrackedRun(
            name=self.folder.name,
            project=self.config.training.tracker_project,
            folder=self.folder,
            id=known.get("id"),
            settings=public_settings(self.config),
        )
        with redirect_stdout(sys.stderr):  # trackio prints; standard output is the command's own
            run_id = self.client.open(run)
        self._is_open, self._sent_step = True, known.get("sent_step", -1)
        self._remember(run_id)
        # A kill may have come between a checkpoint and its sending.
        before = [e for e in read_metrics(self.folder / METRICS) if e["event"] in ("StepDone", "Validated")]
        self._pending = [entry for entry in before if entry["step"] <= event.first_step]
        self._run_id = run_id
        self._send()

    def _send(self) -> None:
        if not self._is_open:
            return
        rows = [row for row in merged(self._pending) if row[0] > self._sent_step]
        self._pending = []
        if not rows:
            return
        with self._noting():
            self.client.log(rows)
            self._sent_step = rows[-1][0]
            self._remember(self._run_id)

    def _known(self) -> dict[str, Any]:
        try:
            known = read_json(self.folder / TRACKED)[self.client.name]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if isinstance(known, dict) else {}

    def _remember(self, run_id: str) -> None:
        path = self.folder / TRACKED
        try:
            kept = read_json(path)
        except (OSError, ValueError):
            kept = {}
        kept = kept if isinstance(kept, dict) else {}
        write_json(path, {**kept, self.client.name: {"id": run_id, "sent_step": self._sent_step}})

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library raises, the training is worth more
            was_open, self._is_open = self._is_open, False
            if was_open:
                with suppress(Exception), redirect_stdout(sys.stderr):
                    self.client.close(is_finished=False)
            self.note(
                f"{self.client.name} failed, and gets no more of this run until it is resumed "
                f"({METRICS} has everything): {_brief(error)}"
            )


def merged(entries: Sequence[Entry]) -> list[tuple[int, dict[str, float]]]:
    """The numbers of each step under a tracker's names, in the order of steps."""
    rows: dict[int, dict[str, float]] = {}
    for entry in entries:
        numbers = _of_update(entry) if entry["event"] == "StepDone" else _of_validation(entry)
        rows.setdefault(entry["step"], {}).update(
            {name: value for name, value in numbers.items() if value is not None}
        )
    return sorted(rows.items())


def _of_update(entry: Entry) -> dict[str, float | None]:
    seconds, memory = entry["seconds"], entry["memory"]
    return {
        "train/loss_nats": None if entry["skipped"] else entry["loss_nats"],
        "train/learning_rate": entry["learning_rate"],
        "train/grad_norm": entry["grad_norm"],
        "train/skipped": float(entry["skipped"]),
        "train/epoch": entry["epoch"],
        "train/tokens_seen": entry["tokens_seen"],
        "train/tokens_per_second": entry["tokens"] / seconds if seconds else None,
        "memory/footprint_gib": memory["footprint_bytes"] / GIB,
        "memory/mlx_peak_gib": memory["mlx_peak_bytes"] / GIB,
        "memory/swap_growth_gib": memory["swap_growth_bytes"] / GIB,
    }


def _of_validation(entry: Entry) -> dict[str, float | None]:
    return {"validation/loss_nats": entry["loss_nats"]}


def public_settings(config: RunConfig) -> dict[str, str]:
    """The configuration as names and short texts that may leave this machine: no prompts, no folders."""
    flat = dict(_flat(config.model_dump(mode="json")))
    return {key: _public(value) for key, value in flat.items() if key not in _PRIVATE and value is not None}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _public(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute():
            text = kind(text).name
    return text[:_LONGEST_SETTING]


def _brief(error: Exception) -> str:
    """One line without what servers may quote back: keys in addresses."""
    first = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"//[^/\s@]*@", "//…@", f"{type(error).__name__}: {first}")[:300]
