"""One figure of a comparison of training runs: what each costs, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from mlx_qlora.storage import write_file
from mlx_qlora.studies.training_comparison import Row, TrainingComparison
from mlx_qlora.studies.training_table import (
    answer_speed,
    are_times_rough,
    exact_match,
    largest,
    middle,
    name_of,
    split_of,
    values,
)

FIGURE = "comparison.png"

# Okabe and Ito's, as in training.plots; plain LoRA is hatched too, so that no colour is needed to tell it.
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_CURVES = (("#0072B2", "o"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
_MIB = 1024**2


def save_figure(found: TrainingComparison, path: Path) -> bool:
    """Draw memory, time and quality of every scheme, and how validation went.

    Returns:
        False, and no file, without matplotlib or without a run.

    Raises:
        StorageError: it cannot be written.
    """
    rows = [row for row in found.rows if row.runs]
    if not rows or find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: that would change the backend of a notebook.
    figure = Figure(figsize=(10, 2.2 + 2 * (0.45 * len(rows) + 0.8)), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels, rough = figure.subplots(2, 3), " (rough)" if are_times_rough(found) else ""
    figure.suptitle(f"LoRA and QLoRA of {found.model}", x=0.01, ha="left", fontweight="bold")
    _bars(panels[0][0], rows, "base in memory, MiB", [_base(row) for row in rows])
    _bars(
        panels[0][1], rows, "MLX's peak in an update, MiB",
        [_scaled(largest(row, lambda run: run.training.mlx_peak_bytes)) for row in rows],
    )  # fmt: skip
    _bars(
        panels[0][2], rows, f"one update, seconds{rough}",
        [middle(row, lambda run: run.training.seconds_per_step) for row in rows],
    )  # fmt: skip
    _bars(panels[1][0], rows, f"answering, tokens/s{rough}", [middle(row, answer_speed) for row in rows])
    _points(panels[1][1], rows, found)
    _curves(panels[1][2], rows)
    write_file(path, canvas.print_png)
    return True


def _base(row: Row) -> float | None:
    return _scaled(row.base.bytes_in_memory) if row.base else None


def _scaled(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / _MIB


def _bars(panel: Any, rows: Sequence[Row], title: str, lengths: Sequence[float | None]) -> None:
    """One bar a row, its figure beside it."""
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if length is None:
            continue
        colour, hatch = (_VERMILION, "///") if row.is_lora else (_BLUE, None)
        panel.barh(place, length, color=colour, hatch=hatch, edgecolor="white", height=0.68)
        panel.annotate(
            f"{length:,.0f}" if length >= 100 else f"{length:.3g}", (length, place),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    panel.set_xlim(0, max((length for length in lengths if length), default=1) * 1.22)
    _dress(panel, rows, title)


def _points(panel: Any, rows: Sequence[Row], found: TrainingComparison) -> None:
    """Exact match where there are questions, else validation loss: a point a run, a bar: the median."""
    has_answers = any(values(row, exact_match) for row in rows)
    figure = exact_match if has_answers else (lambda run: run.training.val_loss_nats)
    for place, row in enumerate(rows):
        numbers = values(row, figure)
        if not numbers:
            continue
        colour, marker = (_VERMILION, "s") if row.is_lora else (_BLUE, "o")
        panel.plot(numbers, [place] * len(numbers), marker, color=colour, alpha=0.6, markersize=7)
        panel.plot([median(numbers)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    title = f"exact match, {split_of(found)} rows" if has_answers else "validation loss, nats per token"
    _dress(panel, rows, title)
    panel.margins(x=0.15)
    if has_answers:
        panel.xaxis.set_major_formatter(lambda share, _position: f"{100 * share:.3g} %")


def _curves(panel: Any, rows: Sequence[Row]) -> None:
    """Validation loss over the updates, of the first seed."""
    others = cycle(_CURVES)
    for row in rows:
        curve = row.runs[0].training.curve
        colour, marker = (_VERMILION, "s") if row.is_lora else next(others)
        if curve:
            panel.plot(
                [step for step, _ in curve], [loss for _, loss in curve], marker=marker, color=colour,
                markersize=4, linewidth=1.2, linestyle="--" if row.is_lora else "-", label=name_of(row),
            )  # fmt: skip
    panel.set_title("validation loss by update, nats", loc="left", fontsize=10)
    if panel.lines:
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E5E5E5", linewidth=0.8)


def _dress(panel: Any, rows: Sequence[Row], title: str) -> None:
    panel.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=9)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_title(title, loc="left", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    panel.set_axisbelow(True)
