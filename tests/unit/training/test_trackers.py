"""training/trackers.py: each real library, offline, is read back and compared with metrics.jsonl."""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError
from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.presets import GIB
from mlx_qlora.training import trackers
from mlx_qlora.training.events import RolledBack, RunFinished, RunStarted, Saved, StepDone, Validated
from mlx_qlora.training.metrics import METRICS, MetricsLog, events_named, read_metrics
from mlx_qlora.training.tracker_clients import CLIENTS, Client
from mlx_qlora.training.trackers import (
    TRACKED,
    Tracker,
    check_trackers,
    merged,
    public_settings,
    tracking,
)

SECRET = "um segredo do clube"
CONFIG = build_config(
    {
        "model": {"path": "/home/ana/models/mistral-7b"},
        "data": {"path": "/home/ana/club", "system_prompt": SECRET},
        "lora": {"rank": 4},
        "training": {"trackers": ["tensorboard"], "tracker_project": "club"},
    }
)

Numbers = dict[tuple[int, str], float]


def memory(step: int) -> MemorySample:
    return MemorySample(
        mlx_active_bytes=GIB,
        mlx_cache_bytes=0,
        mlx_peak_bytes=GIB + step,
        footprint_bytes=2 * GIB,
        system_available_bytes=GIB,
        swap_growth_bytes=0,
    )


def started(first_step: int = 0) -> RunStarted:
    return RunStarted(
        first_step=first_step,
        total_steps=8,
        steps_per_epoch=4,
        num_examples=8,
        trainable_parameters=1,
        total_parameters=2,
        budget_bytes=GIB,
    )


def step(number: int, loss: float) -> StepDone:
    return StepDone(
        step=number,
        epoch=(number - 1) // 4 + 1,
        loss_nats=loss,
        target_tokens=10,
        tokens=64,
        tokens_seen=64 * number,
        learning_rate=1e-4,
        grad_norm=loss / 2,
        seconds=0.5,
        memory=memory(number),
        skipped=loss != loss,
    )


def validated(number: int, loss: float) -> Validated:
    return Validated(step=number, loss_nats=loss, target_tokens=40, is_best=True, seconds=0.1)


def saved(number: int) -> Saved:
    return Saved(step=number, path=Path("c"), is_best=False)


def finished() -> RunFinished:
    return RunFinished(
        steps=8, tokens=512, train_loss_nats=1.0, val_loss_nats=1.0, best_step=8, stopped_early=False,
        skipped_updates=0, seconds=9.0, tokens_per_second=9.0, peak_memory_bytes=GIB, adapter_path=Path("a"),
    )  # fmt: skip


NAN = float("nan")
UNTIL_KILLED = [
    started(), validated(0, 4.0), saved(0), step(1, 3.5), step(2, 3.0), step(3, 2.5), saved(3),
    step(4, 77.0), step(5, NAN), step(6, NAN), RolledBack(from_step=6, to_step=3, learning_rate_factor=0.5),
    step(4, 2.25), validated(4, 2.5), saved(4), step(5, 55.0),
]  # fmt: skip
RESUMED = [
    started(4), step(5, 2.0), step(6, NAN), step(7, 1.5), step(8, 1.25), validated(8, 1.75), saved(8),
    finished(),
]  # fmt: skip


def run(folder: Path, events: list, notes: list[str], *clients: str) -> None:
    """What `train` does with these events: the log first, then the trackers, each open for one process."""
    log = MetricsLog(folder / METRICS)
    if isinstance(events[0], RunStarted) and events[0].first_step:
        log.truncate_after(events[0].first_step)
    config = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"trackers": clients})})
    with tracking(config, folder, notes.append) as observers:
        for event in events:
            for observer in (log, *observers):
                observer(event)


def logged(folder: Path) -> Numbers:
    """What a tracker must hold, from metrics.jsonl."""
    entries = read_metrics(folder / METRICS)
    rows = merged([*events_named(entries, "StepDone"), *events_named(entries, "Validated")])
    return {(at, name): value for at, numbers in rows for name, value in numbers.items()}


# ---------------------------------------------------------------- the real libraries


def of_tensorboard(folder: Path) -> Iterator[tuple[int, str, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted((folder / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                yield event.step, value.tag, value.tensor.float_val[0]


def of_wandb(folder: Path) -> Iterator[tuple[int, str, float]]:
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            numbers = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, value in numbers.items():
                if not name.startswith("_"):
                    yield numbers["_step"], name, value


def wandb_records(folder: Path) -> Iterator:
    """The records of wandb's offline files: LevelDB's log format after seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                yield record
                whole = b""


def of_mlflow(folder: Path) -> Iterator[tuple[int, str, float]]:
    from mlflow.tracking import MlflowClient

    client, run_id = MlflowClient(), json.loads((folder / TRACKED).read_text())["mlflow"]["id"]
    for name in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, name):
            yield metric.step, name, metric.value


def of_trackio(folder: Path) -> Iterator[tuple[int, str, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((folder / TRACKED).read_text())["trackio"]["id"]
    for row in SQLiteStorage.get_logs("club", name):
        for key, value in row.items():
            if key not in ("step", "timestamp"):
                yield row["step"], key, value


READERS: dict[str, Callable[[Path], Iterator[tuple[int, str, float]]]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


def eventually(read: Callable[[], list], count: int) -> list:
    """What is read when it is all there: wandb's own process writes for a moment after the run has ended."""
    until = time.monotonic() + 20
    while len(found := read()) < count and time.monotonic() < until:
        time.sleep(0.05)
    return found


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    ["tensorboard", "trackio", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "mlflow"))],
)
def test_a_run_that_went_back_was_killed_and_resumed_is_in_the_tracker_once_as_in_its_metrics(
    name, offline, monkeypatch, capfd
):
    pytest.importorskip(CLIENTS[name].module)
    if name == "trackio":  # its folder is decided when it is first imported
        from trackio import sqlite_storage, utils

        for module in (sqlite_storage, utils):
            if hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", offline.parent / "trackio")
    notes: list[str] = []
    run(offline, UNTIL_KILLED, notes, name)
    first_id = json.loads((offline / TRACKED).read_text())[name]["id"]
    run(offline, RESUMED, notes, name)
    assert notes == []
    assert json.loads((offline / TRACKED).read_text())[name] == {"id": first_id, "sent_step": 8}
    expected = logged(offline)
    read = eventually(lambda: list(READERS[name](offline)), len(expected))
    assert len(read) == len({(at, key) for at, key, _ in read}), "a number was logged twice"
    assert {(at, key): value for at, key, value in read} == pytest.approx(expected, rel=1e-6)
    assert expected[4, "train/loss_nats"] == 2.25
    assert (6, "train/loss_nats") not in expected
    assert capfd.readouterr().out == "", "standard output is the command's own"
    for path in offline.parent.rglob("*"):
        if path.is_file() and "logs" not in path.parts and not path.name.startswith("debug"):
            assert not any(word in path.read_bytes() for word in (b"/home/ana", SECRET.encode())), path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_is_told_neither_the_machine_nor_its_folders(offline):
    pytest.importorskip("wandb")
    import platform

    run(offline, RESUMED, [], "wandb")
    records = eventually(lambda: list(wandb_records(offline)), 8)
    told = b"".join(record.SerializeToString() for record in records)
    assert b"mistral-7b" in told
    for private in (platform.node(), str(Path.cwd()), str(offline.parent), sys.executable):
        assert private.encode() not in told or len(private) < 3, private


def test_a_tracker_that_cannot_write_is_said_once_and_changes_nothing_else(offline):
    pytest.importorskip("tensorboard")
    (offline / "tensorboard").write_text("a file where a folder is to be")
    notes: list[str] = []
    run(offline, UNTIL_KILLED, notes, "tensorboard")
    assert len(notes) == 1
    assert notes[0].startswith("tensorboard failed, and gets no more of this run until it is resumed")
    assert len(read_metrics(offline / METRICS)) > 8


@pytest.mark.slow
def test_a_server_that_is_not_there_is_said_once(offline, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret-key@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notes: list[str] = []
    run(offline, UNTIL_KILLED, notes, "mlflow")
    assert len(notes) == 1
    assert notes[0].startswith("mlflow failed")
    assert "secret-key" not in notes[0]


# ---------------------------------------------------------------- what any library is told


class Recorder(Client):
    """A tracker that writes down what it is told, and fails where it is asked to."""

    name = module = package = "recorder"

    def __init__(self, fails: str = ""):
        self.fails, self.rows, self.runs, self.closed = fails, [], [], []

    def open(self, run):
        self._may_fail("open")
        self.runs.append(run)
        return run.id or "first"

    def log(self, rows):
        self._may_fail("log")
        self.rows += rows

    def close(self, *, is_finished):
        self.closed.append(is_finished)
        self._may_fail("close")

    def _may_fail(self, where: str):
        if where == self.fails:
            raise ConnectionError(f"https://key@host/{where}\nwith details")


def tell(tracker: Tracker, events: list) -> None:
    log = MetricsLog(tracker.folder / METRICS)
    for event in events:
        log(event)
        tracker(event)


def steps_told(client: Recorder) -> list[int]:
    return [at for at, _ in client.rows]


def test_nothing_is_sent_before_a_checkpoint_makes_it_final(tmp_path):
    client = Recorder()
    tracker = Tracker(client, CONFIG, tmp_path, pytest.fail)
    tell(tracker, UNTIL_KILLED[:6])
    assert steps_told(client) == [0]
    tell(tracker, [saved(3)])
    assert steps_told(client) == [0, 1, 2, 3]


def test_what_a_kill_between_checkpoint_and_sending_left_out_is_sent_by_the_next_process(tmp_path):
    (tmp_path / TRACKED).write_text(json.dumps({"recorder": {"id": "r", "sent_step": 1}}))
    log = MetricsLog(tmp_path / METRICS)
    for event in (started(), step(1, 3.0), step(2, 2.5), step(3, 2.0), saved(3)):
        log(event)
    client = Recorder()
    tell(Tracker(client, CONFIG, tmp_path, pytest.fail), [started(3)])
    assert client.runs[0].id == "r"
    assert steps_told(client) == [2, 3]


def test_steps_of_an_older_checkpoint_are_not_sent_again(tmp_path):
    (tmp_path / TRACKED).write_text(json.dumps({"recorder": {"id": "r", "sent_step": 3}}))
    client = Recorder()
    tell(
        Tracker(client, CONFIG, tmp_path, pytest.fail),
        [started(1), *(step(n, 1.0) for n in (2, 3, 4)), saved(4)],
    )
    assert steps_told(client) == [4]


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_failure_anywhere_is_noted_once_without_keys_and_never_raised(tmp_path, where):
    client, notes = Recorder(where), []
    tracker = Tracker(client, CONFIG, tmp_path, notes.append)
    tell(tracker, [*UNTIL_KILLED, *RESUMED[1:]])
    tracker.close()
    assert len(notes) == 1
    assert notes[0].endswith(f"ConnectionError: https://…@host/{where}")


def test_the_end_is_told_as_it_was(tmp_path):
    for events, is_finished in ((UNTIL_KILLED, False), ([started(), finished()], True)):
        client = Recorder()
        tracker = Tracker(client, CONFIG, tmp_path, pytest.fail)
        tell(tracker, events)
        tracker.close()
        assert client.closed == [is_finished]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"recorder": 7}'])
def test_a_broken_state_file_begins_a_new_tracker_run(tmp_path, text):
    (tmp_path / TRACKED).write_text(text)
    client = Recorder()
    tell(Tracker(client, CONFIG, tmp_path, pytest.fail), [started()])
    assert client.runs[0].id is None


def test_settings_leave_without_folders_or_prompts():
    settings = public_settings(CONFIG)
    assert settings["model.path"] == "mistral-7b"
    assert settings["data.path"] == "club"
    assert settings["lora.rank"] == "4"
    assert "data.system_prompt" not in settings
    assert SECRET not in str(settings)
    assert "/home" not in str(settings)
    assert public_settings(build_config({"model": {"path": "org/name"}}))["model.path"] == "org/name"


def test_a_library_that_is_not_installed_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="wandb, mlflow") as error:
        check_trackers(build_config({"training": {"trackers": ["wandb", "mlflow"]}}).training)
    assert error.value.run.startswith("pip install wandb mlflow ")
    check_trackers(build_config().training)


def test_ranks_after_the_first_have_no_tracker(tmp_path):
    with tracking(CONFIG, tmp_path, pytest.fail, is_on=False) as observers:
        assert observers == []


def test_no_library_is_imported_for_a_run_without_trackers():
    code = (
        "import sys, mlx_qlora.training.run; "
        "print([m for m in ('wandb', 'mlflow', 'trackio', 'tensorboard', 'matplotlib') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
