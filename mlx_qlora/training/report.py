"""What a run leaves to read: progress on the screen, metrics.jsonl, loss.png and report.md."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.memory.monitor import MemorySample, device_limit_bytes
from mlx_qlora.presets import GIB
from mlx_qlora.storage import said_clearly, write_file, write_text
from mlx_qlora.training.events import (
    Event,
    MemoryPressure,
    RolledBack,
    RunFinished,
    RunStarted,
    Saved,
    StepDone,
    Validated,
)

METRICS, PICTURE, REPORT = "metrics.jsonl", "loss.png", "report.md"
PLOTS_HINT = "pip install 'mlx-qlora[plots]'"

Entry = dict[str, Any]
Row = tuple[str, ...]

# Where an event stands in the run; for all others it is their "step".
_POSITION = {"RunStarted": "first_step", "RolledBack": "to_step"}


# ---------------------------------------------------------------------------- metrics.jsonl


class MetricsLog:
    """An observer that appends each event to a file, one JSON object a line.

    A line is the event's fields with its name under ``event`` and an ISO 8601 ``time``; numbers that
    JSON does not know are null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, event: Event) -> None:
        """Append one line.

        Raises:
            StorageError: it could not be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"event": type(event).__name__, "time": now, **_plain(asdict(event))}
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        # Opened for each line: the run may delete or replace the file, and a kill loses nothing.
        with said_clearly(self.path), self.path.open("ab") as file:
            file.write(line.encode())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later updates, the end of the run and torn lines, by one rename."""
        if not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_bytes().splitlines()
            if (entry := _entry(line)) and entry["event"] != "RunFinished" and _position(entry) <= step
        ]
        write_file(self.path, lambda file: file.write(b"".join(line + b"\n" for line in kept)))


def read_metrics(path: str | Path) -> list[Entry]:
    """The lines of a metrics.jsonl that count, oldest first, each update once.

    What a roll-back or a resumption undid is left out, and so are torn lines. No file is an empty list.
    """
    path, standing = Path(path), list[Entry]()
    for line in path.read_bytes().splitlines() if path.exists() else []:
        entry = _entry(line)
        if entry is None:
            continue
        if entry["event"] in _POSITION:
            standing = [e for e in standing if e["event"] in _POSITION or _position(e) <= _position(entry)]
        standing.append(entry)
    return standing


def _entry(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def _position(entry: Entry) -> int:
    return entry.get(_POSITION.get(entry["event"], "step"), 0)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------------------- the screen


class ProgressDisplay:
    """An observer that shows a run: a bar per epoch on a terminal, plain lines off it. No colours.

    Args:
        steps_per_report: Updates between two lines; loss and speed are means over as many.
        stream: Where to; standard error when not given.
        is_terminal: Whether it can draw a bar; asked of the stream when not given.
        budget_bytes: What the footprint is shown against; the device's own limit when not given.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        steps_per_report: int,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
        *,
        budget_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps_per_report, self.stream = steps_per_report, stream or sys.stderr
        self.is_terminal = self.stream.isatty() if is_terminal is None else is_terminal
        self.budget_bytes = budget_bytes or device_limit_bytes()
        self._clock = clock
        self._recent: deque[StepDone] = deque(maxlen=steps_per_report)
        self._run: RunStarted | None = None
        self._began: float | None = None
        self._steps_timed = 0
        self._pressure_step: int | None = None
        self._bar: Any = None
        self._epoch = 0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case Validated():
                self._say(f"Val loss {event.loss_nats:.4f} (step {event.step})")
            case Saved():
                self._say(f"✓ Checkpoint saved (step {event.step})")
                if event.is_best and event.step > 0:  # before the first update there is nothing to keep
                    self._say(f"✓ Best model saved (step {event.step})")
            case RolledBack():
                self._roll_back(event)
            case MemoryPressure():
                self._press(event)
            case RunFinished():
                self._finish(event)

    def close(self) -> None:
        """Leave the terminal's cursor on a line of its own; for a run that ends by an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _start(self, event: RunStarted) -> None:
        self._run = event
        self._recent.clear()
        self._began, self._steps_timed, self._pressure_step = None, 0, None
        share = event.trainable_parameters / max(event.total_parameters, 1)
        self._say(
            f"Training {_count(event.trainable_parameters)} of {_count(event.total_parameters)} parameters "
            f"({share:.2%}) on {event.num_examples} examples: "
            f"{event.total_steps} steps, {event.steps_per_epoch} an epoch"
        )
        for note in event.notes:
            self._say(f"  {note}")

    def _step(self, event: StepDone) -> None:
        if self._began is None:
            self._began = self._clock() - event.seconds
        self._steps_timed += 1
        self._recent.append(event)
        if event.skipped:
            self._say(f"! Update skipped: loss or gradient is not finite (step {event.step})")
        if self.is_terminal:
            self._draw(event)
        elif event.step % self.steps_per_report == 0 or event.step == self._total_steps:
            total = f"/{self._total_steps}" if self._run else ""
            epochs = f"/{self._num_epochs}" if self._run else ""
            self._say(f"step {event.step}{total}  epoch {event.epoch}{epochs}  {'  '.join(self._figures())}")

    def _draw(self, event: StepDone) -> None:
        if self._bar is None or event.epoch != self._epoch:
            self._new_bar(event)
        self._bar.set_postfix_str(" ".join(self._figures(speed_unit="tok/s")), refresh=False)
        self._bar.update(event.step - self._first_step_of(event.epoch) - self._bar.n)

    def _new_bar(self, event: StepDone) -> None:
        self.close()
        self._epoch, first = event.epoch, self._first_step_of(event.epoch)
        length = min(self._run.steps_per_epoch, self._total_steps - first) if self._run else None
        self._bar = tqdm(
            total=length,
            initial=event.step - 1 - first,
            desc=f"Epoch {event.epoch}/{self._num_epochs}",
            postfix=" ".join(self._figures(speed_unit="tok/s")),
            file=self.stream,
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def _figures(self, speed_unit: str = "tokens/s") -> list[str]:
        last = self._recent[-1]
        speed = sum(s.tokens for s in self._recent) / max(sum(s.seconds for s in self._recent), 1e-9)
        parts = [
            f"loss {_mean_loss((s.loss_nats, s.target_tokens) for s in self._recent if not s.skipped):.3f}",
            f"{speed:.0f} {speed_unit}",
            f"lr {last.learning_rate:.1e}",
            f"{last.memory.footprint_bytes / GIB:.1f}/{self.budget_bytes / GIB:.1f} GiB",
        ]
        if self._run and self._began is not None:
            pace = (self._clock() - self._began) / self._steps_timed  # includes validation and saving
            parts.append(f"ETA {_duration((self._total_steps - last.step) * pace)}")
        return parts

    def _roll_back(self, event: RolledBack) -> None:
        self._recent.clear()
        self._say(
            f"! Back from step {event.from_step} to step {event.to_step}: updates were not finite. "
            f"The learning rate is now {event.learning_rate_factor:g} of the configured one"
        )

    def _press(self, event: MemoryPressure) -> None:
        last = self._pressure_step
        if last is not None and event.step - last < self.steps_per_report:
            return
        self._pressure_step = event.step
        self._say(
            f"! Memory {event.memory.footprint_bytes / GIB:.1f} GiB of {event.budget_bytes / GIB:.1f} GiB"
            f"{_system_state(event.memory)} (step {event.step}): {event.action}"
        )

    def _finish(self, event: RunFinished) -> None:
        self.close()
        if event.stopped_early:
            self._say(f"Stopped early at step {event.steps}: step {event.best_step} stayed the best")

    def _say(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self.is_terminal:
            tqdm.write(text, file=self.stream)  # keeps the bar below
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    @property
    def _total_steps(self) -> int:
        return self._run.total_steps if self._run else 0

    @property
    def _num_epochs(self) -> int:
        return -(-self._run.total_steps // self._run.steps_per_epoch) if self._run else 0

    def _first_step_of(self, epoch: int) -> int:
        return (epoch - 1) * self._run.steps_per_epoch if self._run else 0


def _system_state(memory: MemorySample) -> str:
    pressure = f", system pressure {memory.pressure}" if memory.pressure not in (None, "normal") else ""
    swap = f", swap grew {memory.swap_growth_bytes / GIB:.1f} GiB" if memory.swap_growth_bytes else ""
    return pressure + swap


def _count(number: int) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---------------------------------------------------------------------------- figures


def _mean_loss(losses: Iterable[tuple[float | None, int]]) -> float:
    """Mean of (nats per target token, target tokens), weighted by tokens; NaN and None do not count."""
    finite = [(loss, tokens) for loss, tokens in losses if loss is not None and math.isfinite(loss)]
    total = sum(tokens for _, tokens in finite)
    return sum(loss * tokens for loss, tokens in finite) / total if total else math.nan


def _of(entries: Sequence[Entry], name: str) -> list[Entry]:
    return [entry for entry in entries if entry["event"] == name]


def best_validation(entries: Sequence[Entry]) -> Entry | None:
    """The validation with the lowest loss, the earliest of equals; None when there is none with a number."""
    finite = [v for v in _of(entries, "Validated") if v["loss_nats"] is not None]
    return min(finite, key=lambda v: v["loss_nats"], default=None)


# ---------------------------------------------------------------------------- loss.png

# Okabe and Ito's colours, which are told apart with any colour vision (jfly.uni-koeln.de/color).
_BLUE, _SKY, _VERMILION, _GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
_PURPLE, _GREY = "#CC79A7", "#767676"


def plot_losses(metrics_path: str | Path, png_path: str | Path) -> bool:
    """Draw loss, learning rate and memory over the updates of a run.

    Returns:
        False, and no file, without matplotlib or without a single update in the log.
    """
    entries = read_metrics(metrics_path)
    steps = _of(entries, "StepDone")
    if not steps or find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: that would change the backend of a notebook.
    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1.2, 1.6))
    _draw_losses(panels[0], entries)
    _draw_learning_rate(panels[1], steps)
    _draw_memory(panels[2], steps)
    _dress(panels, steps)
    write_file(Path(png_path), canvas.print_png)
    return True


def _draw_losses(panel: Any, entries: Sequence[Entry]) -> None:
    steps, validations = _of(entries, "StepDone"), _of(entries, "Validated")
    x = np.array([s["step"] for s in steps])
    losses = np.array([s["loss_nats"] if not s["skipped"] else None for s in steps], float)
    panel.plot(x, losses, color=_SKY, alpha=0.55, linewidth=0.8, label="train, each update")
    weights = np.array([s["target_tokens"] for s in steps], float)
    panel.plot(x, _smoothed(losses, weights), color=_BLUE, linewidth=2, label="train, smoothed")
    if validations:
        panel.plot(
            [v["step"] for v in validations],
            np.array([v["loss_nats"] for v in validations], float),
            color=_VERMILION, marker="o", markersize=5, linestyle="--", linewidth=1.2, label="validation",
        )  # fmt: skip
    best = best_validation(entries)
    if best:
        label = f"best: {best['loss_nats']:.4f} at step {best['step']}"
        panel.plot(
            best["step"], best["loss_nats"], color=_GREEN, marker="*", markersize=16,
            markeredgecolor="white", linestyle="none", zorder=5, label=label,
        )  # fmt: skip
    skipped = [s["step"] for s in steps if s["skipped"]]
    if skipped:
        panel.plot(
            skipped, np.full(len(skipped), 0.02), color=_PURPLE, marker="x", linestyle="none",
            transform=panel.get_xaxis_transform(), label="skipped (not finite)",
        )  # fmt: skip
    panel.set_title("Loss", loc="left")
    panel.set_ylabel("nats per target token")
    panel.legend(frameon=False, fontsize=9)


def _draw_learning_rate(panel: Any, steps: Sequence[Entry]) -> None:
    panel.plot([s["step"] for s in steps], [s["learning_rate"] for s in steps], color=_PURPLE, linewidth=1.5)
    panel.set_title("Learning rate", loc="left")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylim(bottom=0)


def _draw_memory(panel: Any, steps: Sequence[Entry]) -> None:
    x = [s["step"] for s in steps]
    for key, label, colour, style in (
        ("footprint_bytes", "process footprint", _BLUE, "-"),
        ("mlx_peak_bytes", "MLX peak, without its cache", _VERMILION, "--"),
        ("mlx_active_bytes", "MLX active", _GREEN, "-"),
    ):
        gib = [s["memory"][key] / GIB for s in steps]
        panel.plot(x, gib, color=colour, linestyle=style, linewidth=1.5, label=label)
    panel.set_title("Memory", loc="left")
    panel.set_ylabel("GiB")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98), borderpad=0)


def _dress(panels: Sequence[Any], steps: Sequence[Entry]) -> None:
    starts = [b["step"] - 0.5 for a, b in pairwise(steps) if a["epoch"] != b["epoch"]]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        panel.set_axisbelow(True)
        for start in starts if len(starts) <= 20 else []:
            panel.axvline(start, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    suffix = " (dotted: a new epoch begins)" if 0 < len(starts) <= 20 else ""
    panels[-1].set_xlabel(f"optimizer updates{suffix}")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)


def _smoothed(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Centred, token-weighted moving mean over a twentieth of the run; NaN values do not count."""
    half = max(1, len(values) // 40)
    weights = np.where(np.isfinite(values), weights, 0.0)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.nan_to_num(values) * weights, kernel)[half:-half]
    weight = np.convolve(weights, kernel)[half:-half]
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


# ---------------------------------------------------------------------------- report.md


def write_report(folder: str | Path, config: RunConfig, data_lines: Sequence[str] = ()) -> Path:
    """Draw loss.png and write report.md, from the metrics.jsonl in the adapter's folder.

    Args:
        folder: The adapter.
        config: The run's configuration.
        data_lines: What is to be said about the rows, a sentence each.
    """
    folder = Path(folder)
    has_picture = plot_losses(folder / METRICS, folder / PICTURE)
    entries = read_metrics(folder / METRICS)
    picture = f"![Loss, learning rate and memory over the run]({PICTURE})"
    sections = [
        f"# {folder.name}",
        _headline(config, entries),
        picture if has_picture else f"There is no picture of the loss: it needs matplotlib, `{PLOTS_HINT}`.",
        "## Use it",
        f'```\npython -m mlx_qlora.infer "…" --adapter-path {shlex.quote(str(folder))}\n```',
        "## Losses",
        _loss_table(entries),
        "## Time and memory",
        _table(("", ""), _cost_rows(entries)),
        "## Data",
        "\n".join(f"- {line}" for line in [*_data_counts(entries), *data_lines]),
        "## Configuration",
        f"```yaml\n{to_yaml(config)}```",
        "## Environment",
        _table(("", ""), environment().items()),
    ]
    write_text(folder / REPORT, "\n\n".join(sections) + "\n")
    return folder / REPORT


def environment() -> dict[str, str]:
    """Versions and device, by name."""
    packages = {name: _version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")}
    device = f"{mx.default_device().type.name}, {mx.device_info().get('device_name', platform.machine())}"
    return {
        **packages,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "device": device,
        "device memory limit": f"{device_limit_bytes() / GIB:.1f} GiB",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _headline(config: RunConfig, entries: Sequence[Entry]) -> str:
    steps, best = _of(entries, "StepDone"), best_validation(entries)
    done = f"{steps[-1]['step']} updates" if steps else "no update yet"
    text = (
        f"A rank-{config.lora.rank} LoRA adapter for `{config.model.path}` "
        f"({config.quantization.scheme}), {done}."
    )
    if best:
        text += f" Best validation loss: **{best['loss_nats']:.4f}** nats per token, at step {best['step']}."
    return text


def _loss_table(entries: Sequence[Entry]) -> str:
    steps, validations, best = _of(entries, "StepDone"), _of(entries, "Validated"), best_validation(entries)
    ends = {v["step"]: v for v in validations}
    if steps:
        ends.setdefault(steps[-1]["step"], {"loss_nats": None})
    rows, begin = list[Row](), 0
    for end in sorted(ends):
        loss = ends[end]["loss_nats"]
        since = [s for s in steps if begin < s["step"] <= end and not s["skipped"]]
        train = _mean_loss((s["loss_nats"], s["target_tokens"]) for s in since)
        perplexity = None if loss is None or loss > 50 else math.exp(loss)
        mark = "best" if best and best["step"] == end else ""
        rows.append((str(end), _number(train), _number(loss), _number(perplexity, 2), mark))
        begin = end
    shown = _thinned(rows)
    note = "Nats per target token; train is the mean over the updates since the validation before."
    if rows != shown:
        note += f" {len(rows) - len(shown)} rows are left out; all are in `{METRICS}`."
    head = ("step", "train loss", "validation loss", "validation perplexity", "")
    return f"{_table(head, shown)}\n\n{note}"


def _thinned(rows: Sequence[Row], limit: int = 24) -> list[Row]:
    """At most about `limit` rows, evenly spread, with the first, the best and the last."""
    every = -(-len(rows) // limit) if rows else 1
    last = len(rows) - 1
    return [row for i, row in enumerate(rows) if i % every == 0 or i == last or row[-1] == "best"]


def _cost_rows(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    steps, finished = _of(entries, "StepDone"), _of(entries, "RunFinished")
    memory = [s["memory"] for s in steps]
    training = sum(s["seconds"] for s in steps)
    tokens = sum(s["tokens"] for s in steps)
    peaks = [m["footprint_bytes"] for m in memory] + [f["peak_memory_bytes"] for f in finished]
    resumed = [str(r["first_step"]) for r in _of(entries, "RunStarted") if r["first_step"] > 0]
    rows = [
        ("updates", f"{len(steps)} ({sum(s['skipped'] for s in steps)} skipped)"),
        ("tokens read", f"{tokens:,} ({sum(s['target_tokens'] for s in steps):,} of them targets)"),
        ("time in updates", _duration(training)),
        ("time in validation", _duration(sum(v["seconds"] for v in _of(entries, "Validated")))),
        ("tokens per second", f"{tokens / training:.0f}" if training else "–"),
        ("peak process footprint", _gib(max(peaks, default=0))),
        ("MLX peak, without its cache", _gib(max((m["mlx_peak_bytes"] for m in memory), default=0))),
        ("swap growth, whole system", _gib(max((m["swap_growth_bytes"] for m in memory), default=0))),
        ("updates over the memory budget", str(len(_of(entries, "MemoryPressure")))),
    ]
    rows += [("resumed after step", ", ".join(resumed))] if resumed else []
    back = [f"{r['from_step']} → {r['to_step']}" for r in _of(entries, "RolledBack")]
    rows += [("went back, with half the rate", ", ".join(back))] if back else []
    if finished and finished[-1]["stopped_early"]:
        rows.append(("stopped early", f"best step {finished[-1]['best_step']}"))
    return rows


def _data_counts(entries: Sequence[Entry]) -> list[str]:
    validations = _of(entries, "Validated")
    lines = [f"{r['num_examples']} training examples" for r in _of(entries, "RunStarted")[-1:]]
    return lines + [f"{v['target_tokens']:,} target tokens in validation" for v in validations[-1:]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
