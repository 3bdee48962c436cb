"""training/watching.py"""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from mlx_qlora.errors import AdapterError, Interrupted
from mlx_qlora.training.watching import PROCESS, RunProcess, announced, look_at_process, look_at_run, view_of

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
ALIVE, UNKNOWN = RunProcess("alive", 7), RunProcess("unknown")
HOLDS = """
import sys, time
from pathlib import Path
from mlx_qlora.training.watching import announced
with announced(Path(sys.argv[1]), num_ranks=int(sys.argv[2])):
    print("here", flush=True)
    time.sleep(60)
"""


def at(seconds):
    return BEGAN + timedelta(seconds=seconds)


def entry(event, when, **fields):
    return {"event": event, "time": at(when).isoformat(timespec="milliseconds"), **fields}


def started(seconds=0.0, first_step=0, total=20, per_epoch=8):
    numbers = {"first_step": first_step, "total_steps": total, "steps_per_epoch": per_epoch}
    return entry("RunStarted", seconds, **numbers, budget_bytes=1000)


def done(step, when, loss=2.0, skipped=False, **fields):
    settled = {"learning_rate": 1e-4, "tokens_seen": 50 * step, "tokens": 50, "target_tokens": 10}
    memory = {"footprint_bytes": 400, "pressure": None}
    numbers = {
        "loss_nats": None if skipped else loss,
        "skipped": skipped,
        "seconds": 1.0,
        **settled,
        **fields,
    }
    return entry("StepDone", when, step=step, epoch=(step - 1) // 8 + 1, memory=memory, **numbers)


def finished(seconds, early=False):
    return entry("RunFinished", seconds, steps=20, stopped_early=early)


def view(entries, process=ALIVE, seconds=10.0, folder="a"):
    return view_of(Path(folder), entries, process, at(seconds))


def write(folder, entries, torn=b""):
    folder.mkdir(exist_ok=True)
    lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
    (folder / "metrics.jsonl").write_bytes(lines + torn)


@pytest.fixture
def holder(tmp_path):
    """Start a process that announces itself in a folder: holder(num_ranks)."""
    processes = []

    def hold(num_ranks=1):
        command = [sys.executable, "-c", HOLDS, str(tmp_path), str(num_ranks)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "here\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------- figures


def test_step_epoch_and_means_are_those_of_the_last_updates():
    steps = [done(step, step, loss=float(step)) for step in range(1, 13)]
    seen = view([started(), *steps], seconds=12)
    assert (seen.step, seen.total_steps, seen.epoch, seen.num_epochs) == (12, 20, 2, 3)
    assert seen.epoch_share == pytest.approx(4 / 8)
    assert seen.loss_nats == pytest.approx(sum(range(3, 13)) / 10)
    assert seen.tokens_per_second == pytest.approx(50)
    assert (seen.footprint_bytes, seen.budget_bytes, seen.tokens_seen) == (400, 1000, 600)


def test_the_last_epoch_may_be_short():
    seen = view([started(), done(19, 19)], seconds=19)
    assert (seen.epoch, seen.epoch_share) == (3, pytest.approx(3 / 4))


def test_a_full_epoch_is_full_and_the_next_has_not_begun():
    assert view([started(), done(8, 8)]).epoch_share == 1.0
    assert view([started(), done(9, 9)]).epoch_share == pytest.approx(1 / 8)


def test_the_time_left_goes_by_this_sessions_pace_and_runs_while_nothing_is_said():
    before = [started(), done(1, 1), done(2, 2)]
    session = [started(100, first_step=2), done(3, 104, seconds=2.0), done(4, 106, seconds=2.0)]
    seen = view([*before, *session], seconds=106)
    assert seen.eta_seconds == pytest.approx(16 * 2.0)  # from 102 to 106 two updates
    assert view([*before, *session], seconds=116).eta_seconds == pytest.approx(16 * 2.0 - 10)
    assert view([*before, *session], seconds=900).eta_seconds == 0
    assert seen.elapsed_seconds == pytest.approx(6)


def test_skipped_updates_are_counted_and_leave_a_gap():
    seen = view([started(), done(1, 1), done(2, 2, skipped=True), done(3, 3, loss=4.0)])
    assert (seen.skipped_updates, seen.losses) == (1, (2.0, None, 4.0))
    assert seen.loss_nats == pytest.approx(3.0)


def test_validations_and_the_best_of_them_are_told_apart():
    points = [(0, 3.0), (2, 1.0), (4, 1.5)]
    lines = [entry("Validated", step, step=step, loss_nats=loss) for step, loss in points]
    seen = view([started(), *lines])
    assert seen.validations == tuple(points)
    assert (seen.validation_step, seen.validation_nats, seen.best_step, seen.best_nats) == (4, 1.5, 2, 1.0)


def test_what_else_happened_is_counted():
    lines = [
        entry("RolledBack", 3, from_step=2, to_step=1, learning_rate_factor=0.5),
        entry("MemoryPressure", 4, step=1),
        entry("Saved", 5, step=1),
        entry("Noted", 6, step=1, text="wandb cannot be reached"),
    ]
    seen = view([started(), done(1, 1), *lines])
    assert (seen.rollbacks, seen.memory_actions, seen.saved_step) == (1, 1, 1)
    assert seen.note == "wandb cannot be reached"


def test_before_the_first_update_there_are_no_figures_and_no_error():
    seen = view([started()])
    assert (seen.step, seen.loss_nats, seen.eta_seconds, seen.learning_rate) == (0, None, None, None)
    assert (seen.epoch, seen.epoch_share) == (1, 0.0)


# ---------------------------------------------------------------- states


def test_no_file_yet_is_waited_for_and_said(tmp_path):
    seen = look_at_run(tmp_path / "none")
    assert (seen.state, seen.has_ended) == ("waiting", False)
    assert "metrics.jsonl" in seen.told


def test_an_adapter_that_no_run_left_here_is_an_error(tmp_path):
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="not trained here"):
        look_at_run(tmp_path)


@pytest.mark.parametrize(
    ("entries", "process", "seconds", "state", "has_ended"),
    [
        ([started(), done(1, 1)], ALIVE, 9000, "running", False),
        ([started(), done(1, 1)], RunProcess("suspended", 7), 5, "suspended", False),
        ([started(), done(1, 1)], UNKNOWN, 30, "running", False),
        ([started(), done(1, 1)], UNKNOWN, 70, "quiet", False),
        ([started(), done(1, 1, seconds=20.0)], UNKNOWN, 70, "running", False),
        ([started(), done(20, 1), finished(2)], UNKNOWN, 9000, "finished", True),
        ([started(), finished(2), entry("Noted", 3, step=20, text="x")], ALIVE, 5, "finished", True),
        ([started(), done(20, 1), finished(2), started(5, 20)], ALIVE, 6, "running", False),
        ([started(), done(1, 1)], RunProcess("ended", 7, "Stopped after step 1"), 5, "stopped", True),
        ([started(), done(1, 1)], RunProcess("gone", 7), 5, "died", True),
        ([started(), done(1, 1)], RunProcess("gone", 7, num_ranks=2), 5, "died", False),
        ([started(), done(1, 1)], RunProcess("gone", 7, num_ranks=2), 500, "died", True),
        ([], RunProcess("gone", 7), 5, "died", True),
    ],
)
def test_the_state_is_told_from_lines_and_process(entries, process, seconds, state, has_ended):
    seen = view(entries, process, seconds)
    assert (seen.state, seen.has_ended) == (state, has_ended)


def test_a_run_that_did_not_finish_can_be_resumed():
    assert view([started()], RunProcess("gone", 7)).run == "mlx-qlora train --resume --adapter-path a"
    assert view([started(), finished(1)]).run.startswith("mlx-qlora infer")
    assert view([started()], RunProcess("gone", 7), folder="my a").run.endswith("--adapter-path 'my a'")
    assert view([started()], ALIVE).run is None


def test_a_run_that_stopped_early_says_so():
    assert view([started(), finished(1, early=True)]).told == "finished, stopped early"


# ---------------------------------------------------------------- the file, as a run leaves it


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    lines = [started(), done(1, 1)]
    write(tmp_path, lines, torn=json.dumps(done(2, 2)).encode()[:30])
    assert look_at_run(tmp_path).step == 1
    write(tmp_path, [*lines, done(2, 2)])
    assert look_at_run(tmp_path).step == 2


def test_a_file_that_a_resumption_rewrote_counts_as_it_is_now(tmp_path):
    write(tmp_path, [started(), *(done(step, step) for step in range(1, 7))])
    assert look_at_run(tmp_path).step == 6
    write(tmp_path, [started(), *(done(step, step) for step in range(1, 5)), started(9, 4)])
    seen = look_at_run(tmp_path)
    assert (seen.step, len(seen.losses)) == (4, 4)


# ---------------------------------------------------------------- the process


def test_a_process_is_alive_while_it_runs_suspended_when_stopped_and_gone_when_killed(holder, tmp_path):
    process = holder(num_ranks=2)
    assert look_at_process(tmp_path) == RunProcess("alive", process.pid, num_ranks=2)
    process.send_signal(signal.SIGSTOP)
    psutil.wait_procs([], timeout=0)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        pass
    assert look_at_process(tmp_path).state == "suspended"
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert look_at_process(tmp_path).state == "gone"  # nobody has waited for it yet
    process.wait()
    assert look_at_process(tmp_path).state == "gone"


def test_how_it_ended_is_kept(tmp_path):
    with announced(tmp_path / "a"):
        assert look_at_process(tmp_path / "a").state == "alive"
    assert look_at_process(tmp_path / "a") == RunProcess("ended", os.getpid(), "finished")
    with pytest.raises(Interrupted), announced(tmp_path / "a"):
        raise Interrupted("Stopped after step 3", signal_number=15)
    assert look_at_process(tmp_path / "a").outcome == "Stopped after step 3"
    with pytest.raises(ValueError, match="odd"), announced(tmp_path / "a"):
        raise ValueError("odd")
    assert look_at_process(tmp_path / "a").outcome == "ValueError: odd"


def test_ranks_but_the_first_write_nothing(tmp_path):
    with announced(tmp_path / "a", is_on=False):
        pass
    assert not (tmp_path / "a").exists()


def test_another_process_of_the_same_number_is_not_the_run(tmp_path):
    with announced(tmp_path):
        said = json.loads((tmp_path / PROCESS).read_text())
        (tmp_path / PROCESS).write_text(json.dumps({**said, "created": said["created"] - 3600}))
        assert look_at_process(tmp_path).state == "gone"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": 1}'])
def test_a_file_that_says_nothing_leaves_the_process_unknown(tmp_path, text):
    (tmp_path / PROCESS).write_text(text)
    assert look_at_process(tmp_path).state == "unknown"


def test_a_process_on_another_machine_is_unknown(tmp_path):
    with announced(tmp_path):
        said = json.loads((tmp_path / PROCESS).read_text())
        (tmp_path / PROCESS).write_text(json.dumps({**said, "host": "another"}))
        assert look_at_process(tmp_path).state == "unknown"
