"""loss.png, and the same for a page: loss, learning rate and memory over the steps of a run."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.presets import GIB
from mlx_qlora.storage import write_file
from mlx_qlora.training.metrics import Entry, best_validation, events_named, read_metrics

PICTURE = "loss.png"
PLOTS_HINT = "pip install 'mlx-qlora[plots]'"


# Okabe and Ito's colours, which are told apart with any colour vision (jfly.uni-koeln.de/color).
_BLUE, _SKY, _VERMILION, _GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
_PURPLE, _GREY = "#CC79A7", "#767676"
_GRID, _PAPER, _INK = "#E5E5E5", "#FFFFFE", "#010101"

_PAGE_COLOURS = {
    _BLUE: "--blue", _SKY: "--sky", _VERMILION: "--vermilion", _GREEN: "--green", _PURPLE: "--purple",
    _GREY: "--soft", _GRID: "--line", _PAPER: "--paper", _INK: "--ink",
}  # fmt: skip
"""What a page calls them: it has others for the dark."""

FAR_ABOVE = 2.5
"""A budget so many times the memory in use is told in words: to draw it would press all else flat."""


def plot_losses(
    metrics_path: str | Path, png_path: str | Path, *, predicted_bytes: int | None = None
) -> bool:
    """Draw loss, learning rate and memory over the updates of a run.

    Args:
        predicted_bytes: The plan's peak, drawn beside what was measured.

    Returns:
        False, and no file, without matplotlib or without a single update in the log.
    """
    entries = read_metrics(metrics_path)
    if not events_named(entries, "StepDone") or find_spec("matplotlib") is None:
        return False
    figure = _figure(entries, (8, 7), predicted_bytes)
    figure.set_dpi(150)
    write_file(Path(png_path), figure.canvas.print_png)
    return True


def svg_of_losses(entries: Sequence[Entry], *, predicted_bytes: int | None = None) -> str | None:
    """The same as an ``<svg>`` element in the colours of a page, by its CSS variables.

    It is narrower, so that its letters can be read on a phone.

    Returns:
        None without matplotlib or without a single update.
    """
    if not events_named(entries, "StepDone") or find_spec("matplotlib") is None:
        return None
    from matplotlib import rc_context

    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"),
        _INK,
    )
    drawn = io.BytesIO()
    with rc_context({**ink, "axes.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "mlx-qlora"}):
        figure = _figure(entries, (5.2, 7.6), predicted_bytes)
        figure.canvas.print_figure(
            drawn, format="svg", facecolor="none", metadata={"Date": None, "Creator": None}
        )
    text = drawn.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in _PAGE_COLOURS.items():
        text = re.sub(colour, f"var({name})", text, flags=re.IGNORECASE)
    return re.sub(r"font: ([0-9.]+px)[^\"]*?(;|\")", r"font: \1 system-ui, sans-serif\2", text)


def _figure(entries: Sequence[Entry], inches: tuple[float, float], predicted_bytes: int | None) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: that would change the backend of a notebook.
    figure, steps = Figure(figsize=inches, layout="constrained"), events_named(entries, "StepDone")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1.2, 1.9))
    _draw_losses(panels[0], entries)
    _draw_learning_rate(panels[1], steps)
    starts = events_named(entries, "RunStarted")
    _draw_memory(panels[2], steps, starts[-1]["budget_bytes"] if starts else None, predicted_bytes)
    _dress(panels, steps)
    return figure


def _draw_losses(panel: Any, entries: Sequence[Entry]) -> None:
    steps, validations = events_named(entries, "StepDone"), events_named(entries, "Validated")
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
            markeredgecolor=_PAPER, linestyle="none", zorder=5, label=label,
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


def _draw_memory(
    panel: Any, steps: Sequence[Entry], budget_bytes: int | None, predicted_bytes: int | None
) -> None:
    x = [s["step"] for s in steps]
    highest = max([s["memory"]["footprint_bytes"] for s in steps] + [predicted_bytes or 0])
    for key, label, colour, style in (
        ("footprint_bytes", "process footprint", _BLUE, "-"),
        ("mlx_peak_bytes", "MLX peak, without its cache", _VERMILION, "--"),
        ("mlx_active_bytes", "MLX active", _GREEN, "-"),
    ):
        gib = [s["memory"][key] / GIB for s in steps]
        panel.plot(x, gib, color=colour, linestyle=style, linewidth=1.5, label=label)
    title = "Memory"
    if predicted_bytes:
        panel.axhline(
            predicted_bytes / GIB, color=_PURPLE, linestyle="-.", linewidth=1.2, label="peak, as planned"
        )
    if budget_bytes and budget_bytes <= FAR_ABOVE * highest:
        panel.axhline(budget_bytes / GIB, color=_GREY, linestyle=":", linewidth=1.8, label="budget")
    elif budget_bytes:
        title += f" (the budget, {budget_bytes / GIB:.1f} GiB, is far above)"
    panel.set_title(title, loc="left")
    panel.set_ylabel("GiB")
    panel.set_ylim(bottom=0)
    panel.margins(y=0.15)
    columns = 3 if panel.figure.get_figwidth() > 6 else 2
    panel.legend(
        frameon=False, fontsize=8, ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.32), borderpad=0
    )


def _dress(panels: Sequence[Any], steps: Sequence[Entry]) -> None:
    starts = [b["step"] - 0.5 for a, b in pairwise(steps) if a["epoch"] != b["epoch"]]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=_GRID, linewidth=0.8)
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
