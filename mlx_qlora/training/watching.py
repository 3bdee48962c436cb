"""How a run goes, seen from another process: its metrics.jsonl, and whether its own process is alive."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from mlx_qlora.errors import AdapterError, MlxQloraError, StorageError
from mlx_qlora.storage import make_folder, read_json, said_clearly, write_json
from mlx_qlora.training.metrics import METRICS, Entry, best_validation, events_named, mean_loss, read_metrics

PROCESS = "process.json"
"""Which process trains in an adapter's folder, and how it ended."""

RECENT_STEPS = 10
"""Loss and speed are means over as many updates."""

QUIET_SECONDS, QUIET_GAPS = 60.0, 10
"""Where the process is unknown: no news for so long, and for so many times the longest silence before."""

State = Literal["waiting", "running", "suspended", "quiet", "finished", "stopped", "died"]

_SAME_PROCESS_SECONDS = 60.0
"""Start times so near are of one process: clocks are set; a process's number comes again much later."""


@contextmanager
def announced(folder: Path, *, num_ranks: int = 1, is_on: bool = True) -> Iterator[None]:
    """While open, ``process.json`` in `folder` names this process; afterwards it says how the run ended.

    A process that is killed has no time for that: its name stays, and nobody answers to it.

    Args:
        folder: The adapter's; made when it is not there.
        num_ranks: Processes that train together. When there are several, a dead one may be started again.
        is_on: Whether to write at all; one of several ranks does.

    Raises:
        StorageError: it could not be written.
    """
    if not is_on:
        yield
        return
    own = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "created": psutil.Process().create_time(),
        "num_ranks": num_ranks,
    }
    with said_clearly(folder):
        make_folder(folder)
    write_json(folder / PROCESS, own)
    outcome = "finished"
    try:
        yield
    except BaseException as error:
        outcome = error.what if isinstance(error, MlxQloraError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        ended = {"ended": datetime.now(UTC).isoformat(timespec="milliseconds"), "outcome": outcome}
        with suppress(StorageError):  # what went wrong first is what counts
            write_json(folder / PROCESS, {**own, **ended})


@dataclass(frozen=True)
class RunProcess:
    """What is known of the process that trains, or trained, in a folder."""

    state: Literal["alive", "suspended", "ended", "gone", "unknown"]
    """gone: it is no more, and has not said why. unknown: nothing is written, or it is on another machine."""
    pid: int | None = None
    outcome: str = ""
    """How it says it ended."""
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run at one moment, as far as it has said."""

    state: State
    told: str
    """The state in a sentence."""
    run: str | None
    """The next command, if there is one."""
    may_come_back: bool
    """It died, but a supervisor may start it again."""
    step: int
    total_steps: int
    epoch: int
    num_epochs: int
    epoch_share: float
    """Of the current epoch's updates, those done: 0 to 1."""
    loss_nats: float | None
    """Mean per target token over the last updates."""
    validation_nats: float | None
    validation_step: int | None
    best_nats: float | None
    best_step: int | None
    learning_rate: float | None
    tokens_seen: int
    tokens_per_second: float | None
    footprint_bytes: int
    budget_bytes: int
    pressure: str | None
    skipped_updates: int
    """Those that a roll-back has undone do not count."""
    rollbacks: int
    memory_actions: int
    """How often something was done because memory was short."""
    note: str | None
    """The last thing the run noted beside its training."""
    saved_step: int | None
    elapsed_seconds: float
    """Since this session of the run began."""
    eta_seconds: float | None
    quiet_seconds: float
    """Since the last news."""
    losses: tuple[float | None, ...]
    """Of each update that stands, oldest first; None for one that was skipped."""
    validations: tuple[tuple[int, float | None], ...]
    learning_rates: tuple[float, ...]
    speeds: tuple[float, ...]
    """Tokens per second of each update."""

    @property
    def has_ended(self) -> bool:
        """Nothing more will come, unless somebody resumes it."""
        return self.state in ("finished", "stopped") or (self.state == "died" and not self.may_come_back)

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, without the series."""
        series = ("losses", "validations", "learning_rates", "speeds")
        return {name: value for name, value in vars(self).items() if name not in series}


def look_at_process(folder: Path) -> RunProcess:
    """Whether the process that trains in `folder` is alive; only looked at, never disturbed."""
    try:
        said = read_json(folder / PROCESS)
        pid, created, ranks = int(said["pid"]), float(said["created"]), int(said.get("num_ranks", 1))
    except (OSError, ValueError, KeyError, TypeError):
        return RunProcess("unknown")
    if "ended" in said:
        return RunProcess("ended", pid, str(said.get("outcome", "")), ranks)
    if said.get("host") != socket.gethostname():
        return RunProcess("unknown", pid, num_ranks=ranks)
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - created) < _SAME_PROCESS_SECONDS
        status = process.status()
    except psutil.Error:
        return RunProcess("gone", pid, num_ranks=ranks)
    if not is_same or status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return RunProcess("gone", pid, num_ranks=ranks)
    return RunProcess("suspended" if status == psutil.STATUS_STOPPED else "alive", pid, num_ranks=ranks)


def look_at_run(folder: str | Path, *, now: datetime | None = None) -> RunView:
    """How the run in `folder` stands. Neither folder nor metrics need be there yet.

    Raises:
        AdapterError: there is an adapter, but no run has left its metrics beside it.
    """
    folder = Path(folder)
    entries = read_metrics(folder / METRICS)
    if not entries and (folder / "adapters.safetensors").exists():
        raise AdapterError(
            f"There is an adapter here, but no {METRICS}: it was not trained here.",
            where=str(folder),
            run=f"mlx-qlora infer … --adapter-path {folder}",
        )
    return view_of(folder, entries, look_at_process(folder), now or datetime.now(UTC))


def view_of(folder: Path, entries: Sequence[Entry], process: RunProcess, now: datetime) -> RunView:
    """What the lines of a metrics.jsonl and the process say together.

    Args:
        entries: As `read_metrics` gives them.
        now: With a time zone; how long ago the last line was.
    """
    started = next(iter(reversed(events_named(entries, "RunStarted"))), {})
    steps, validations = events_named(entries, "StepDone"), events_named(entries, "Validated")
    last, recent = (steps[-1] if steps else {}), steps[-RECENT_STEPS:]
    step = int(last["step"] if last else started.get("first_step", 0))
    total, per_epoch = started.get("total_steps", 0), max(started.get("steps_per_epoch", 1), 1)
    best, quiet = best_validation(entries), _seconds_between(_time(entries[-1]), now) if entries else 0.0
    state, told, run = _state(folder, entries, process, quiet)
    session = [s for s in steps if started and s["time"] >= started["time"]]
    memory = last.get("memory", {})
    is_over = state in ("finished", "stopped", "died")
    elapsed = _seconds_between(_time(started), _time(entries[-1])) if started else 0.0
    return RunView(
        state=state,
        told=told,
        run=run,
        may_come_back=state == "died" and process.num_ranks > 1 and quiet < QUIET_SECONDS,
        step=step,
        total_steps=total,
        epoch=last.get("epoch", step // per_epoch + 1),
        num_epochs=-(-total // per_epoch),
        epoch_share=_epoch_share(step, per_epoch, total),
        loss_nats=_number(
            mean_loss((s["loss_nats"], s["target_tokens"]) for s in recent if not s["skipped"])
        ),
        validation_nats=validations[-1]["loss_nats"] if validations else None,
        validation_step=validations[-1]["step"] if validations else None,
        best_nats=best["loss_nats"] if best else None,
        best_step=best["step"] if best else None,
        learning_rate=last.get("learning_rate"),
        tokens_seen=last.get("tokens_seen", 0),
        tokens_per_second=_speed(recent),
        footprint_bytes=memory.get("footprint_bytes", 0),
        budget_bytes=started.get("budget_bytes", 0),
        pressure=memory.get("pressure"),
        skipped_updates=sum(bool(s["skipped"]) for s in steps),
        rollbacks=len(events_named(entries, "RolledBack")),
        memory_actions=len(events_named(entries, "MemoryPressure")),
        note=next((e["text"] for e in reversed(events_named(entries, "Noted"))), None),
        saved_step=max((e["step"] for e in events_named(entries, "Saved")), default=None),
        elapsed_seconds=elapsed + (0.0 if is_over else quiet),
        eta_seconds=None if is_over else _eta(session, total - step, now),
        quiet_seconds=quiet,
        losses=tuple(None if s["skipped"] else s["loss_nats"] for s in steps),
        validations=tuple((v["step"], v["loss_nats"]) for v in validations),
        learning_rates=tuple(s["learning_rate"] for s in steps),
        speeds=tuple(s["tokens"] / max(s["seconds"], 1e-9) for s in steps),
    )


def _state(
    folder: Path, entries: Sequence[Entry], process: RunProcess, quiet: float
) -> tuple[State, str, str | None]:
    """The state, in a sentence too, and the next command."""
    path = shlex.quote(str(folder))
    resume = f"mlx-qlora train --resume --adapter-path {path}"
    finished = events_named(entries, "RunFinished")
    if finished and finished[-1]["time"] >= events_named(entries, "RunStarted")[-1]["time"]:
        early = ", stopped early" if finished[-1]["stopped_early"] else ""
        return "finished", f"finished{early}", f'mlx-qlora infer "…" --adapter-path {path}'
    if process.state == "ended" and process.outcome != "finished":
        return "stopped", process.outcome.splitlines()[0] if process.outcome else "stopped", resume
    if process.state == "gone":
        told = f"its process ({process.pid}) is gone without a word: killed, or out of memory"
        return "died", told, resume
    if not entries:
        return "waiting", f"nothing there yet: no {METRICS} in {folder}", None
    if process.state == "suspended":
        return "suspended", f"its process ({process.pid}) is suspended", f"kill -CONT {process.pid}"
    if process.state == "alive":
        return "running", "running", None
    longest = max((s["seconds"] for s in events_named(entries, "StepDone")), default=0.0)
    if quiet > max(QUIET_SECONDS, QUIET_GAPS * longest):
        return "quiet", "no news for a while: slow, stopped, or on another machine", resume
    return "running", "running", None


def _eta(session: Sequence[Entry], steps_left: int, now: datetime) -> float | None:
    """Seconds to the end at this session's pace, validation and saving included."""
    if not session:
        return None
    began = _time(session[0]).timestamp() - session[0]["seconds"]
    last = _time(session[-1]).timestamp()
    pace = (last - began) / len(session)
    return max(0.0, steps_left * pace - max(0.0, now.timestamp() - last))


def _speed(steps: Sequence[Entry]) -> float | None:
    seconds = sum(s["seconds"] for s in steps)
    return sum(s["tokens"] for s in steps) / seconds if seconds else None


def _epoch_share(step: int, per_epoch: int, total: int) -> float:
    if not step:
        return 0.0
    first = (step - 1) // per_epoch * per_epoch
    return (step - first) / max(1, min(per_epoch, total - first))


def _time(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry["time"])


def _seconds_between(earlier: datetime, later: datetime) -> float:
    return max(0.0, (later - earlier).total_seconds())


def _number(value: float) -> float | None:
    return value if value == value else None  # NaN is unequal to itself
