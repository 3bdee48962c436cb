"""``mlx-qlora watch``."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_qlora.commands.output import Json, print_json
from mlx_qlora.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_qlora.training.watching import RunView

SECONDS_BETWEEN_LOOKS = 1.0
READING_SHARE = 20
"""A look takes at most one part in so many of the time, however long the run's metrics grow."""
SECONDS_BETWEEN_LINES = 10.0
SPARKS = "▁▂▃▄▅▆▇█"
GIB = 1024**3
# Okabe and Ito's; each row has its own label and figure too.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
STATE_STYLES = {"running": GREEN, "finished": GREEN, "died": f"bold {VERMILION}"}


def watch(
    adapter: Annotated[Path, typer.Argument(help="Folder the run writes to: its --adapter-path.")],
    once: Annotated[bool, typer.Option("--once", help="Show how it stands now, and end.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines of text, as for a screen reader; so off a terminal.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch a training run from another terminal: progress, loss, speed, memory, time left.

    Example: mlx-qlora watch adapters/farense

    The run is only looked at. It need not have begun; one that was stopped is waited for. This ends when the
    run ends, or by Ctrl-C, which the run does not notice. The exit code is 1 when the run's process has died.
    """
    from rich.console import Console

    from mlx_qlora.training.watching import look_at_run

    if as_json:
        print_json(look_at_run(adapter).as_dict())
        return
    console = Console(highlight=False, markup=False, emoji=False)
    is_plain = plain or not console.is_terminal or console.is_dumb_terminal
    if once:
        show(look_at_run(adapter), adapter, console, is_plain=is_plain)
        return
    with _stopped_clearly(adapter):
        last = _follow_in_lines(adapter) if is_plain else _follow(adapter, console)
    if last.run:
        print(f"Run: {last.run}")
    if last.state == "died":
        raise typer.Exit(1)


def show(view: RunView, adapter: Path, console: Console, *, is_plain: bool) -> None:
    """One picture of a run, or its figures in labelled lines."""
    if not is_plain:
        console.print(picture(view, adapter))
    else:
        for label, text in _figures(view, adapter):
            print(f"{label}: {text}")
    if view.run:
        print(f"Run: {view.run}")


def picture(view: RunView, adapter: Path) -> Any:
    """What a terminal shows, as something that rich can draw; it takes the whole width."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    style = STATE_STYLES.get(view.state, ORANGE)
    head = Text(f"{adapter}  ", style="bold") + Text(view.told, style=style)
    if not view.total_steps:
        return Group(head)
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    over = view.budget_bytes and view.footprint_bytes > view.budget_bytes
    bars = {
        "run": (view.step, view.total_steps, BLUE),
        "epoch": (view.epoch_share, 1.0, BLUE),
        "memory": (view.footprint_bytes, view.budget_bytes or 1, VERMILION if over else GREEN),
    }
    series = {
        "loss": view.losses,
        "validation": tuple(loss for _, loss in view.validations),
        "learning rate": view.learning_rates,
        "speed": view.speeds,
    }
    for label, text in _figures(view, adapter):
        if label in bars:
            done, total, colour = bars[label]
            bar = ProgressBar(
                total, min(done, total), style="grey50", complete_style=colour, finished_style=colour
            )
            table.add_row(label, bar, text)
        elif label in series:
            table.add_row(label, Sparkline(series[label]), text)
    rest = Table.grid(padding=(0, 2))
    rest.add_column(no_wrap=True, min_width=max(map(len, (*bars, *series))))
    rest.add_column()
    for label, text in _figures(view, adapter):
        if label in ("time", "checkpoint", "events", "note"):
            rest.add_row(label, text)
    return Group(head, table, rest)


class Sparkline:
    """Numbers as a line of small bars, as wide as there is room; the mean of those that share a bar.

    Args:
        values: In order; None leaves a gap.
    """

    def __init__(self, values: Sequence[float | None]) -> None:
        self.values = values

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Any]:
        """Draw it for rich."""
        from rich.text import Text

        yield Text(
            sparkline(self.values, options.max_width, SPARKS), style=BLUE, no_wrap=True, overflow="crop"
        )


def sparkline(values: Sequence[float | None], width: int, marks: str = SPARKS) -> str:
    """`values` in at most `width` characters of `marks`, lowest first; a space where there is no number."""
    groups = min(width, len(values))
    means: list[float | None] = []
    for index in range(groups):
        part = values[index * len(values) // groups : (index + 1) * len(values) // groups]
        known = [value for value in part if value is not None]
        means.append(sum(known) / len(known) if known else None)
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, spread = min(known), max(known) - min(known)
    return "".join(
        " " if mean is None else marks[round((mean - low) / spread * (len(marks) - 1)) if spread else 0]
        for mean in means
    )


def _figures(view: RunView, adapter: Path) -> list[tuple[str, str]]:
    """Label and text of all there is to say; the same on a terminal and off it."""
    lines = [("adapter", str(adapter)), ("state", view.told)]
    if not view.total_steps:
        return lines
    lines += [
        ("run", f"step {view.step} of {view.total_steps}, {view.step / view.total_steps:.0%}"),
        ("epoch", f"{view.epoch} of {view.num_epochs}, {view.epoch_share:.0%}"),
    ]
    if view.footprint_bytes:
        gib, budget = view.footprint_bytes / GIB, view.budget_bytes / GIB
        pressure = f", {view.pressure} pressure" if view.pressure not in (None, "normal") else ""
        lines.append(("memory", f"{gib:.1f} of {budget:.1f} GiB, {gib / max(budget, 1e-9):.0%}{pressure}"))
    if view.loss_nats is not None:
        lines.append(("loss", f"{view.loss_nats:.3f} nats per token"))
    if view.validation_nats is not None:
        best = f", best {view.best_nats:.3f} at {view.best_step}" if view.best_nats is not None else ""
        lines.append(("validation", f"{view.validation_nats:.3f} at step {view.validation_step}{best}"))
    if view.learning_rate is not None:
        lines.append(("learning rate", f"{view.learning_rate:.1e}"))
    if view.tokens_per_second is not None:
        lines.append(("speed", f"{view.tokens_per_second:.0f} tokens/s"))
    left = f"{_clock(view.eta_seconds)} left, " if view.eta_seconds else ""
    lines.append(("time", f"{left}{_clock(view.elapsed_seconds)} elapsed"))
    if view.saved_step is not None:
        lines.append(("checkpoint", f"step {view.saved_step}"))
    if events := _events(view):
        lines.append(("events", ", ".join(events)))
    return [*lines, ("note", view.note)] if view.note else lines


def _events(view: RunView) -> list[str]:
    counted = (
        (view.skipped_updates, "update skipped", "updates skipped"),
        (view.rollbacks, "roll-back", "roll-backs"),
        (view.memory_actions, "time short of memory", "times short of memory"),
    )
    return [f"{number} {one if number == 1 else many}" for number, one, many in counted if number]


def _follow(adapter: Path, console: Console) -> RunView:
    """Redraw the picture until the run ends."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for view in _looks(adapter):
            live.update(picture(view, adapter), refresh=True)
    return view


def _follow_in_lines(adapter: Path) -> RunView:
    """Say what is new, one line at a time, until the run ends."""
    said_at, said_step, said_state, said_validation = -SECONDS_BETWEEN_LINES, -1, "", -1
    for view in _looks(adapter):
        if view.told != said_state:
            said_state = view.told
            _say(f"{adapter}: {view.told}")
        if view.validation_step not in (None, said_validation):
            said_validation = view.validation_step or 0
            _say(dict(_figures(view, adapter))["validation"].join(("validation ", "")))
        is_time = time.monotonic() - said_at >= SECONDS_BETWEEN_LINES or view.has_ended
        if view.step != said_step and view.total_steps and is_time:
            said_at, said_step = time.monotonic(), view.step
            wanted = ("run", "epoch", "loss", "speed", "memory", "time", "events")
            told = dict(_figures(view, adapter))
            _say("; ".join(f"{label} {told[label]}" for label in wanted if label in told))
    return view


def _looks(adapter: Path) -> Iterator[RunView]:
    """The run again and again, until it ends. One that had been stopped before is waited for."""
    from mlx_qlora.training.watching import look_at_run

    is_first, waits_for_it = True, False
    while True:
        began = time.monotonic()
        view = look_at_run(adapter)
        took = time.monotonic() - began
        if is_first:
            waits_for_it = view.state in ("stopped", "died")
        is_first, waits_for_it = False, waits_for_it and view.state in ("stopped", "died")
        yield replace(view, told=f"{view.told}; waiting for it to go on") if waits_for_it else view
        if view.has_ended and not waits_for_it:
            return
        time.sleep(max(SECONDS_BETWEEN_LOOKS, READING_SHARE * took))


@contextmanager
def _stopped_clearly(adapter: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the watching with a sentence, and leave the terminal as it was."""

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(
            "No longer watching; the run itself was left alone.",
            signal_number=number,
            run=f"mlx-qlora watch {shlex.quote(str(adapter))}",
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
