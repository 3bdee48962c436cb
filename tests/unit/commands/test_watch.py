"""commands/watch.py"""

import io
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_qlora.__main__ import load_command, run
from mlx_qlora.commands import watch as command
from mlx_qlora.commands.watch import SPARKS, picture, sparkline
from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.training.events import RunFinished, RunStarted, Saved, StepDone, Validated
from mlx_qlora.training.metrics import MetricsLog
from mlx_qlora.training.watching import RunView, look_at_run

GIB = 1024**3
COLOUR = re.compile(r"\x1b\[(\d+;)*[34]\d[;m]")
MEMORY = MemorySample(
    mlx_active_bytes=0, mlx_cache_bytes=0, mlx_peak_bytes=0, footprint_bytes=8 * GIB,
    system_available_bytes=0, swap_growth_bytes=0,
)  # fmt: skip
FINISHED = RunFinished(
    steps=40, tokens=1, train_loss_nats=1.0, val_loss_nats=1.0, best_step=40, stopped_early=False,
    skipped_updates=0, seconds=1.0, tokens_per_second=1.0, peak_memory_bytes=1, adapter_path=Path("a"),
)  # fmt: skip


def log(folder, steps=range(1, 21), first_step=0):
    """What a run writes, by its own log."""
    folder.mkdir(exist_ok=True)
    emit = MetricsLog(folder / "metrics.jsonl")
    emit(
        RunStarted(
            first_step=first_step, total_steps=40, steps_per_epoch=20, num_examples=40,
            trainable_parameters=1, total_parameters=2, budget_bytes=10 * GIB,
        )
    )  # fmt: skip
    for step in steps:
        emit(
            StepDone(
                step=step, epoch=(step - 1) // 20 + 1, loss_nats=4 - step / 20, target_tokens=10, tokens=100,
                tokens_seen=100 * step, learning_rate=1e-4, grad_norm=1.0, seconds=0.5, memory=MEMORY,
                skipped=step == 7,
            )
        )  # fmt: skip
        if step % 10 == 0:
            emit(Validated(step=step, loss_nats=3.0 - step / 20, target_tokens=10, is_best=True, seconds=0.1))
            emit(Saved(step=step, path=folder / "checkpoints", is_best=True))
    return emit


def drawn(view, width, **settings):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False, **settings)
    console.print(picture(view, Path("adapters/farense")))
    return console.file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_picture_has_every_figure_and_fits(tmp_path, width):
    log(tmp_path / "a")
    text = plain(drawn(look_at_run(tmp_path / "a"), width))
    assert max(map(len, text.splitlines())) <= width
    figures = [
        "step 20 of 40, 50%", "1 of 2, 100%", "8.0 of 10.0 GiB, 80%", "2.000 at step 20, best 2.000 at 20",
        "1.0e-04", "200 tokens/s", "checkpoint     step 20", "1 update skipped",
    ]  # fmt: skip
    for figure in figures:
        assert figure in text
    assert "…" not in text


def test_bars_show_by_their_length_what_their_colour_does_too(tmp_path):
    log(tmp_path / "a")
    view = look_at_run(tmp_path / "a")
    full = plain(drawn(replace(view, step=40), 80, no_color=True)).splitlines()[1]
    half = plain(drawn(view, 80, no_color=True)).splitlines()[1]
    assert half.count("━") == pytest.approx(full.count("━") / 2, abs=1)


def test_without_colour_no_colour_is_sent(tmp_path):
    log(tmp_path / "a")
    view = look_at_run(tmp_path / "a")
    assert COLOUR.search(drawn(view, 80, color_system="standard"))
    assert not COLOUR.search(drawn(view, 80, color_system="standard", no_color=True))


def test_a_run_over_its_budget_or_without_one_is_drawn(tmp_path):
    log(tmp_path / "a")
    view = look_at_run(tmp_path / "a")
    assert "16.0 of 10.0 GiB, 160%" in plain(drawn(replace(view, footprint_bytes=16 * GIB), 80))
    assert "8.0 of 0.0 GiB" in plain(drawn(replace(view, budget_bytes=0), 80))


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=200), st.integers(1, 60))
def test_a_sparkline_fits_and_keeps_the_order_of_its_values(values, width):
    line = sparkline(values, width)
    assert len(line) <= min(width, len(values))
    assert set(line) <= {*SPARKS, " "}
    if len(values) <= width and line:
        known = [
            (value, SPARKS.index(mark)) for value, mark in zip(values, line, strict=True) if value is not None
        ]
        assert all(low[1] <= high[1] for low in known for high in known if low[0] <= high[0])


def test_a_falling_loss_falls():
    assert sparkline([8.0, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, None, 2.0], 3) == "▁ █"
    assert sparkline([3.0, 3.0], 5) == "▁▁"
    assert sparkline([8.0, 6.0, 2.0, 0.0], 2) == "█▁"


def test_once_off_a_terminal_is_labelled_lines_without_drawings(tmp_path, capsys):
    log(tmp_path / "a")
    assert run(load_command("watch"), [str(tmp_path / "a"), "--once"]) == 0
    out = capsys.readouterr().out
    assert "run: step 20 of 40, 50%\n" in out
    assert "loss: " in out
    assert "validation: 2.000 at step 20, best 2.000 at 20\n" in out
    assert not set(out) & {*SPARKS, "━", "\x1b"}


def test_once_and_json_do_not_wait_for_a_run_that_is_not_there(tmp_path, capsys):
    assert run(load_command("watch"), [str(tmp_path / "a"), "--once"]) == 0
    assert "nothing there yet" in capsys.readouterr().out
    assert run(load_command("watch"), [str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "waiting"


def test_json_is_every_figure_by_name(tmp_path, capsys):
    log(tmp_path / "a")
    assert run(load_command("watch"), [str(tmp_path / "a"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    series = {"losses", "validations", "learning_rates", "speeds"}
    assert told.keys() == asdict(look_at_run(tmp_path / "a")).keys() - series
    assert (told["step"], told["best_step"], told["tokens_per_second"]) == (20, 20, 200.0)


def views(monkeypatch, *states):
    """Let the run be in these states, look by look."""
    blank = dict.fromkeys(RunView.__dataclass_fields__, 0)
    shown = iter(
        RunView(
            **{**blank, "state": state, "told": state, "run": None, "losses": (), "validations": (),
               "may_come_back": False, "validation_step": None, "loss_nats": None, "note": None}
        )
        for state in states
    )  # fmt: skip
    monkeypatch.setattr("mlx_qlora.training.watching.look_at_run", lambda _folder: next(shown))
    monkeypatch.setattr(command.time, "sleep", lambda _seconds: None)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["finished"], 0),
        (["waiting", "running", "quiet", "running", "finished"], 0),
        (["running", "stopped"], 0),
        (["running", "died"], 1),
        (["died", "died", "running", "finished"], 0),
        (["stopped", "running", "stopped"], 0),
    ],
)
def test_it_ends_when_the_run_ends_and_waits_for_one_that_had_ended_before(monkeypatch, capsys, states, code):
    views(monkeypatch, *states)
    assert run(load_command("watch"), ["a"]) == code
    out = capsys.readouterr().out
    assert ("waiting for it to go on" in out) == (states[0] in ("stopped", "died"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_watching_with_a_sentence(tmp_path, number):
    arguments = [sys.executable, "-m", "mlx_qlora", "watch", str(tmp_path / "a")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "nothing there yet" in process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err.startswith("No longer watching; the run itself was left alone.")


@pytest.mark.slow
def test_a_run_is_followed_as_it_grows_until_it_finishes(tmp_path):
    arguments = [sys.executable, "-m", "mlx_qlora", "watch", str(tmp_path / "a")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert "nothing there yet" in process.stdout.readline()
    emit = log(tmp_path / "a", range(1, 11))
    assert process.stdout.readline().endswith("running\n")
    assert "validation 2.500 at step 10" in process.stdout.readline()
    time.sleep(0.1)
    emit(FINISHED)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "finished" in rest
