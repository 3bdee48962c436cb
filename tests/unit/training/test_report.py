"""training/report.py: what a run leaves to read, and what it shows."""

import io
import json
import math
import re
import struct
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from mlx_qlora.config import build_config
from mlx_qlora.errors import StorageError
from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.presets import GIB
from mlx_qlora.training import plots
from mlx_qlora.training.display import ProgressDisplay
from mlx_qlora.training.events import (
    MemoryPressure,
    RolledBack,
    RunFinished,
    RunStarted,
    Saved,
    StepDone,
    Validated,
)
from mlx_qlora.training.metrics import MetricsLog, read_metrics
from mlx_qlora.training.plots import plot_losses
from mlx_qlora.training.report import write_report
from mlx_qlora.training.report_sections import Told


def memory(footprint_gib: float = 1.5, **fields) -> MemorySample:
    defaults = {
        "mlx_active_bytes": GIB,
        "mlx_cache_bytes": GIB // 8,
        "mlx_peak_bytes": 5 * GIB // 4,
        "footprint_bytes": int(footprint_gib * GIB),
        "system_available_bytes": 4 * GIB,
        "swap_growth_bytes": 0,
    }
    return MemorySample(**{**defaults, **fields})


def started(*, first_step=0, total_steps=10, steps_per_epoch=5, notes=()) -> RunStarted:
    return RunStarted(
        first_step=first_step,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        num_examples=20,
        trainable_parameters=1_500_000,
        total_parameters=3_000_000_000,
        budget_bytes=8 * GIB,
        notes=notes,
    )


def step_done(step: int, loss: float = 2.0, **fields) -> StepDone:
    defaults = {
        "step": step,
        "epoch": (step - 1) // 5 + 1,
        "loss_nats": loss,
        "target_tokens": 10,
        "tokens": 100,
        "tokens_seen": 100 * step,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "seconds": 0.5,
        "memory": memory(),
        "skipped": math.isnan(loss),
    }
    return StepDone(**{**defaults, **fields})


def validated(step: int, loss: float, *, is_best: bool = False) -> Validated:
    return Validated(step=step, loss_nats=loss, target_tokens=40, is_best=is_best, seconds=2.0)


def finished(steps: int = 10, **fields) -> RunFinished:
    defaults = {
        "steps": steps,
        "tokens": 100 * steps,
        "train_loss_nats": 2.0,
        "val_loss_nats": 1.0,
        "best_step": 5,
        "stopped_early": False,
        "skipped_updates": 0,
        "seconds": 9.0,
        "tokens_per_second": 200.0,
        "peak_memory_bytes": 3 * GIB,
        "adapter_path": Path("adapters/club"),
    }
    return RunFinished(**{**defaults, **fields})


def a_run(steps: int = 10) -> list:
    events = [started(total_steps=steps), validated(0, 4.0, is_best=True)]
    for step in range(1, steps + 1):
        events.append(step_done(step, 4.0 - 0.2 * step))
        if step % 5 == 0:
            events += [
                validated(step, 4.0 - 0.1 * step, is_best=True),
                Saved(step=step, path=Path("c"), is_best=True),
            ]
    return [*events, finished(steps)]


@pytest.fixture
def log(tmp_path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl")


def steps_in(log: MetricsLog) -> list[int]:
    """The updates in the file as it lies there, line by line."""
    entries = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    return [entry["step"] for entry in entries if entry["event"] == "StepDone"]


# ---------------------------------------------------------------- metrics.jsonl


def test_each_event_is_one_line_with_its_name_its_time_and_all_its_fields(log):
    events = [
        started(notes=("a note",)),
        step_done(1),
        validated(1, 1.5),
        Saved(step=1, path=Path("checkpoints/step-0000001"), is_best=True),
        RolledBack(from_step=3, to_step=1, learning_rate_factor=0.5),
        MemoryPressure(step=1, memory=memory(), budget_bytes=GIB, action="cleared"),
        finished(),
    ]
    for event in events:
        log(event)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == [type(event).__name__ for event in events]
    for line, event in zip(lines, events, strict=True):
        assert line.keys() == {"event", "time"} | event.__dataclass_fields__.keys()
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert lines[1]["memory"] == memory().as_dict()
    assert lines[3]["path"] == "checkpoints/step-0000001"


def test_a_line_is_on_disk_before_the_next_event(log):
    log(step_done(1))
    assert log.path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_are_null(log, value):
    log(step_done(1, loss=value, grad_norm=value, skipped=True))
    line = json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["loss_nats"] is None
    assert line["grad_norm"] is None


def test_the_log_goes_on_after_the_file_was_deleted(log):
    log(step_done(1))
    log.path.unlink()
    log(step_done(2))
    assert steps_in(log) == [2]


def test_a_log_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    log = MetricsLog(tmp_path / "gone" / "metrics.jsonl")
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        log(step_done(1))


@pytest.mark.parametrize("step", range(11))
def test_a_resumed_log_has_each_step_exactly_once(log, step):
    for event in a_run():
        log(event)
    log.truncate_after(step)
    assert steps_in(log) == list(range(1, step + 1))
    log(started(first_step=step))
    for later in range(step + 1, 11):
        log(step_done(later))
    assert steps_in(log) == list(range(1, 11))


def test_truncating_drops_validations_checkpoints_and_the_end_of_the_run_too(log):
    for event in a_run():
        log(event)
    log.truncate_after(7)
    kept = [(e["event"], e.get("step")) for e in map(json.loads, log.path.read_text().splitlines())]
    assert ("Validated", 5) in kept
    assert ("Saved", 5) in kept
    assert not {("Validated", 10), ("Saved", 10), ("RunFinished", None)} & set(kept)


def test_truncating_drops_a_torn_last_line_so_that_the_next_one_is_whole(log):
    log(step_done(1))
    with log.path.open("ab") as file:
        file.write('{"event": "StepDone", "step": 2, "note": "é'.encode()[:-1])
    log.truncate_after(5)
    log(step_done(2))
    assert steps_in(log) == [1, 2]


def test_truncating_keeps_the_lines_before_byte_for_byte(log):
    for event in a_run():
        log(event)
    before = log.path.read_bytes()
    log.truncate_after(4)
    assert before.startswith(log.path.read_bytes())


def test_a_truncation_that_fails_leaves_the_old_log_whole(log, monkeypatch):
    for event in a_run():
        log(event)
    before = log.path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(StorageError):
        log.truncate_after(4)
    assert log.path.read_bytes() == before


def test_truncating_a_log_that_was_never_written_does_nothing(log):
    log.truncate_after(3)
    assert not log.path.exists()


def test_truncating_keeps_the_news_of_a_roll_back_that_still_holds(log):
    for event in [*map(step_done, (1, 2, 3)), RolledBack(from_step=3, to_step=1, learning_rate_factor=0.5)]:
        log(event)
    log.truncate_after(1)
    assert [e["event"] for e in read_metrics(log.path)] == ["StepDone", "RolledBack"]


def test_what_a_roll_back_undid_is_in_the_file_but_not_among_the_metrics(log):
    for event in [
        started(),
        *(step_done(step, 1.0) for step in (1, 2, 3, 4)),
        validated(4, 9.0),
        RolledBack(from_step=4, to_step=2, learning_rate_factor=0.5),
        step_done(3, 7.0),
    ]:
        log(event)
    metrics = read_metrics(log.path)
    assert steps_in(log) == [1, 2, 3, 4, 3]
    assert [(m["step"], m["loss_nats"]) for m in metrics if m["event"] == "StepDone"] == [
        (1, 1.0),
        (2, 1.0),
        (3, 7.0),
    ]
    assert not [m for m in metrics if m["event"] == "Validated"]


def test_a_log_that_was_resumed_without_truncating_is_read_with_each_step_once(log):
    for event in [
        started(),
        *map(step_done, (1, 2, 3, 4)),
        started(first_step=2),
        *map(step_done, (3, 4, 5)),
    ]:
        log(event)
    metrics = read_metrics(log.path)
    assert [m["step"] for m in metrics if m["event"] == "StepDone"] == [1, 2, 3, 4, 5]
    assert [m["first_step"] for m in metrics if m["event"] == "RunStarted"] == [0, 2]


@pytest.mark.parametrize("junk", [b"", b"{", b"[1]", b"7", b"{}", b"\xff\xfe"])
def test_lines_that_are_no_metrics_are_passed_over(log, junk):
    log(step_done(1))
    with log.path.open("ab") as file:
        file.write(junk + b"\n")
    log(step_done(2))
    assert [m["step"] for m in read_metrics(log.path)] == [1, 2]


def test_metrics_of_a_run_without_a_log_are_empty(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# ---------------------------------------------------------------- the screen


class Screen:
    """A display on a stream that is kept, with a clock that is told the time."""

    def __init__(self, *, is_terminal: bool = False, steps_per_report: int = 5, stream=None):
        self.stream, self.now = stream or io.StringIO(), 100.0
        self.show = ProgressDisplay(steps_per_report, self.stream, is_terminal, clock=lambda: self.now)

    def __call__(self, *events):
        for event in events:
            self.show(event)
        return self

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def drawn(self) -> str:
        """All that was drawn, each state of a bar on a line of its own."""
        return self.stream.getvalue().replace("\r", "\n")


def test_off_a_terminal_there_is_a_line_each_steps_per_report_and_one_at_the_end():
    screen = Screen(steps_per_report=4)(started(), *map(step_done, range(1, 11)))
    assert [line.split()[1] for line in screen.lines[1:]] == ["4/10", "8/10", "10/10"]


def test_a_line_tells_loss_speed_rate_memory_against_budget_and_time_left():
    screen = Screen(steps_per_report=2)
    screen(started(), step_done(1, 2.0, target_tokens=30))
    screen.now += 3
    screen(step_done(2, 4.0, target_tokens=10, learning_rate=3e-5, memory=memory(2.5)))
    # (0.5 s for the first update and 3 s until the second) / 2 for each of the 8 that are left
    assert screen.lines[-1] == (
        "step 2/10  epoch 1/2  loss 2.500  200 tokens/s  lr 3.0e-05  2.5/8.0 GiB  ETA 0:14"
    )


def test_the_time_left_is_counted_from_where_a_run_was_resumed():
    screen = Screen(steps_per_report=1)(started(first_step=6), step_done(7, seconds=2.0))
    assert screen.lines[-1].endswith("ETA 0:06")


def test_a_skipped_update_is_said_and_does_not_spoil_the_mean():
    screen = Screen(steps_per_report=2)(started(), step_done(1, 3.0), step_done(2, math.nan))
    assert "skipped" in screen.lines[-2]
    assert "loss 3.000" in screen.lines[-1]


def test_the_start_says_what_is_trained_and_what_was_decided():
    screen = Screen()(started(notes=("warm-up: 1 of 10 steps",)))
    assert screen.lines == [
        "Training 1.5 M of 3 B parameters (0.05%) on 20 examples: 10 steps, 5 an epoch",
        "  warm-up: 1 of 10 steps",
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_happens_between_updates_has_a_line_of_its_own(is_terminal):
    screen = Screen(is_terminal=is_terminal)(
        started(total_steps=300, steps_per_epoch=300),
        step_done(199, epoch=1),
        step_done(200, epoch=1),
        validated(200, 1.234, is_best=True),
        Saved(step=200, path=Path("c"), is_best=True),
        RolledBack(from_step=203, to_step=200, learning_rate_factor=0.25),
        MemoryPressure(step=201, memory=memory(9), budget_bytes=8 * GIB, action="cleared MLX's buffer cache"),
    )
    screen.show.close()
    lines = [line.strip() for line in screen.drawn().splitlines()]
    assert "Val loss 1.2340 (step 200)" in lines
    assert "✓ Checkpoint saved (step 200)" in lines
    assert "✓ Best model saved (step 200)" in lines
    assert any(re.search(r"from step 203 to step 200.*0\.25", line) for line in lines)
    assert "! Memory 9.0 GiB of 8.0 GiB (step 201): cleared MLX's buffer cache" in lines


def test_a_checkpoint_that_is_not_the_best_does_not_claim_to_be():
    screen = Screen()(
        Saved(step=3, path=Path("c"), is_best=False), Saved(step=0, path=Path("c"), is_best=True)
    )
    assert screen.lines == ["✓ Checkpoint saved (step 3)", "✓ Checkpoint saved (step 0)"]


def test_memory_pressure_at_every_update_is_not_said_at_every_update():
    def press(step):
        return MemoryPressure(step=step, memory=memory(9), budget_bytes=8 * GIB, action="cleared")

    screen = Screen(steps_per_report=5)(*map(press, range(1, 12)))
    assert len(screen.lines) == 3


def test_memory_pressure_tells_swap_and_what_the_system_says():
    event = MemoryPressure(
        step=1,
        memory=memory(9, swap_growth_bytes=GIB, pressure="critical"),
        budget_bytes=GIB,
        action="cleared",
    )
    assert "system pressure critical, swap grew 1.0 GiB" in Screen()(event).lines[0]


def test_an_early_stop_is_said_with_the_best_step():
    screen = Screen()(finished(8, stopped_early=True, best_step=5))
    assert screen.lines == ["Stopped early at step 8: step 5 stayed the best"]
    assert Screen()(finished()).lines == []


def test_on_a_terminal_each_epoch_has_a_bar_that_ends_full(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen(is_terminal=True)(*[e for e in a_run(12) if not isinstance(e, Saved | Validated)])
    drawn = screen.drawn()
    for epoch, steps in ((1, 5), (2, 5), (3, 2)):  # the last is cut by total_steps
        assert re.search(rf"Epoch {epoch}/3 \|[█#]+\| {steps}/{steps}, loss \d\.\d+ ", drawn), drawn
    assert drawn.endswith("\n")


def test_a_bar_shows_all_figures_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen(is_terminal=True)(started(total_steps=600, steps_per_epoch=300))
    screen(*(step_done(step, epoch=1) for step in range(1, 12)))
    screen.show.close()
    assert re.search(
        r"\| 11/300, loss 2\.000 200 tok/s lr 1\.0e-04 1\.5/8\.0 GiB ETA \d+:\d\d", screen.drawn()
    )


def test_a_bar_of_a_resumed_epoch_begins_where_the_run_went_on():
    screen = Screen(is_terminal=True)(started(first_step=7), step_done(8))
    screen.show.close()
    assert "3/5" in screen.drawn()
    assert "1/5" not in screen.drawn()


def test_after_a_roll_back_into_an_earlier_epoch_the_bar_stands_where_the_run_does():
    back = RolledBack(from_step=7, to_step=3, learning_rate_factor=0.5)
    screen = Screen(is_terminal=True)(started(), *map(step_done, range(1, 8)), back, step_done(4))
    screen.show.close()
    assert "4/5" in screen.drawn().splitlines()[-1]


def test_closing_leaves_the_cursor_on_a_new_line_and_may_be_done_twice():
    screen = Screen(is_terminal=True)(started(), step_done(1))
    screen.show.close()
    screen.show.close()
    assert screen.stream.getvalue().endswith("\n")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_there_are_no_ansi_codes_and_off_a_terminal_no_carriage_returns(is_terminal):
    screen = Screen(is_terminal=is_terminal)(*a_run())
    assert "\x1b" not in screen.stream.getvalue()
    assert is_terminal or "\r" not in screen.stream.getvalue()


def test_a_stream_that_is_no_terminal_is_noticed():
    assert not ProgressDisplay(5, io.StringIO()).is_terminal


def test_standard_error_is_the_stream_unless_told(capsys):
    ProgressDisplay(5)(validated(1, 1.0))
    assert capsys.readouterr() == ("", "Val loss 1.0000 (step 1)\n")


def test_a_stream_that_cannot_write_a_tick_gets_a_plainer_line():
    raw = io.BytesIO()
    screen = Screen(stream=io.TextIOWrapper(raw, encoding="ascii"))
    screen(Saved(step=3, path=Path("c"), is_best=False))
    assert raw.getvalue() == b"? Checkpoint saved (step 3)\n"


# ---------------------------------------------------------------- loss.png


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_the_picture_of_a_run_is_drawn(log):
    for event in a_run():
        log(event)
    assert plot_losses(log.path, log.path.with_name("loss.png"))
    width, height = png_size(log.path.with_name("loss.png"))
    assert (width, height) == (1200, 1050)


@pytest.mark.parametrize(
    "events",
    [
        [step_done(1)],
        [step_done(1, math.nan), step_done(2, math.nan)],
        [started(), step_done(1), validated(1, math.nan)],
        [started(), step_done(1), validated(1, 3.0)],
        [step_done(3), step_done(4), started(first_step=3), step_done(4)],
    ],
    ids=["one update", "only skipped updates", "validation is not a number", "never finished", "resumed"],
)
@pytest.mark.filterwarnings("error")
def test_the_picture_of_an_odd_run_is_drawn(log, events):
    for event in events:
        log(event)
    assert plot_losses(log.path, log.path.with_name("loss.png"))


def test_there_is_no_picture_of_a_run_without_updates(log):
    log(started())
    assert not plot_losses(log.path, log.path.with_name("loss.png"))
    assert not log.path.with_name("loss.png").exists()


def test_without_matplotlib_there_is_no_picture_and_the_report_says_how_to_get_it(log, monkeypatch):
    for event in a_run():
        log(event)
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot_losses(log.path, log.path.with_name("loss.png"))
    write_report(log.path.parent, build_config())
    text = (log.path.parent / "report.md").read_text()
    assert "pip install 'mlx-qlora[plots]'" in text
    assert "loss.png" not in text


def test_smoothing_is_a_token_weighted_mean_that_passes_over_skipped_updates():
    np = plots.np
    smooth = plots._smoothed(np.array([1.0, np.nan, 4.0, 1.0]), np.array([1.0, 5.0, 2.0, 6.0]))
    np.testing.assert_allclose(smooth, [1.0, 9 / 3, 14 / 8, 14 / 8])


# ---------------------------------------------------------------- report.md


def report_of(log: MetricsLog, *events, config=None, data_lines=()) -> str:
    for event in events:
        log(event)
    write_report(log.path.parent, config or build_config(), Told(data_lines=data_lines))
    return (log.path.parent / "report.md").read_text(encoding="utf-8")


def rows_of(text: str, first: str) -> list[list[str]]:
    """Cells of the table rows whose first cell matches."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return [row for row in rows if re.fullmatch(first, row[0])]


def test_the_report_has_losses_between_validations_with_the_best_marked(log):
    text = report_of(
        log, started(), validated(0, 4.0), step_done(1, 3.0, target_tokens=30), step_done(2, 2.0),
        validated(2, 1.0), step_done(3, 0.5), step_done(4, math.nan), validated(4, 1.25), step_done(5, 0.25),
    )  # fmt: skip
    assert rows_of(text, r"\d") == [
        ["0", "–", "4.0000", "54.60", ""],
        ["2", "2.7500", "1.0000", "2.72", "best"],
        ["4", "0.5000", "1.2500", "3.49", ""],
        ["5", "0.2500", "–", "–", ""],
    ]
    assert "Best validation loss: **1.0000** nats per token, at step 2" in text


def test_the_report_counts_time_speed_tokens_and_peak_memory(log):
    text = report_of(log, *a_run())
    cost = {row[0]: row[1] for row in rows_of(text, ".+") if len(row) == 2}
    assert cost["updates"] == "10 (0 skipped)"
    assert cost["tokens read"] == "1,000 (100 of them targets)"
    assert cost["time in updates"] == "0:05"
    assert cost["time in validation"] == "0:06"
    assert cost["tokens per second"] == "200"
    assert cost["peak process footprint"] == "3.00 GiB"
    assert cost["MLX peak, without its cache"] == "1.25 GiB"


def test_the_report_of_a_resumed_run_is_that_of_the_whole_run(log):
    for event in a_run():
        log(event)
    log.truncate_after(5)
    text = report_of(log, started(first_step=5), *a_run()[9:-1], finished(seconds=1.0))
    cost = {row[0]: row[1] for row in rows_of(text, ".+") if len(row) == 2}
    assert cost["updates"] == "10 (0 skipped)"
    assert cost["time in updates"] == "0:05"
    assert cost["resumed after step"] == "5"
    assert [row[0] for row in rows_of(text, r"\d+")] == ["0", "5", "10"]


def test_the_report_tells_of_roll_backs_skipped_updates_and_pressure(log):
    text = report_of(
        log, started(), step_done(1), step_done(2, math.nan), step_done(3),
        RolledBack(from_step=3, to_step=2, learning_rate_factor=0.5), step_done(3),
        MemoryPressure(step=3, memory=memory(), budget_bytes=GIB, action="cleared"),
        finished(3, stopped_early=True, best_step=1),
    )  # fmt: skip
    cost = {row[0]: row[1] for row in rows_of(text, ".+") if len(row) == 2}
    assert cost["updates"] == "3 (1 skipped)"
    assert cost["went back, with half the rate"] == "3 → 2"
    assert cost["updates over the memory budget"] == "1"
    assert cost["stopped early"] == "best step 1"


def test_the_report_holds_a_configuration_that_can_be_run_again(log):
    config = build_config({"model": {"path": "org/model"}, "lora": {"rank": 3}})
    text = report_of(log, *a_run(), config=config)
    block = re.search(r"```yaml\n(.*?)```", text, re.S).group(1)
    assert build_config(yaml.safe_load(block)) == config
    assert "A rank-3 LoRA adapter for `org/model`" in text


def test_the_report_says_how_to_use_the_adapter_even_in_a_folder_with_spaces(tmp_path):
    folder = tmp_path / "my club"
    folder.mkdir()
    text = report_of(MetricsLog(folder / "metrics.jsonl"), *a_run())
    assert f"python -m mlx_qlora.infer \"…\" --adapter-path '{folder}'" in text
    assert "![Loss, learning rate and memory over the run](loss.png)" in text
    assert (folder / "loss.png").exists()


def test_the_report_tells_data_counts_and_what_is_said_about_the_rows(log):
    text = report_of(log, *a_run(), data_lines=["3 rows were cut to 512 tokens"])
    assert "- 20 training examples\n- 40 target tokens in validation\n- 3 rows were cut to 512 tokens" in text


def test_the_report_names_versions_and_device(log):
    text = report_of(log, *a_run())
    environment = {row[0] for row in rows_of(text, ".+") if len(row) == 2 and row[1]}
    assert {"mlx-qlora", "mlx", "mlx-lm", "Python", "system", "device"} <= environment


def test_a_long_table_of_losses_is_thinned_but_keeps_first_best_and_last(log):
    events = [started(total_steps=200)]
    for step in range(1, 201):
        events += [step_done(step), validated(step, 1.0 + abs(step - 102) / 100)]
    rows = rows_of(report_of(log, *events), r"\d+")
    assert len(rows) < 30
    assert rows[0][0] == "1"
    assert rows[-1][0] == "200"
    assert [row[0] for row in rows if row[-1] == "best"] == ["102"]


def test_a_report_without_a_log_is_still_a_report(tmp_path):
    write_report(tmp_path, build_config())
    text = (tmp_path / "report.md").read_text()
    assert "no update yet" in text
