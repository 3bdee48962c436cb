"""loss.png: loss, learning rate and memory over the steps of a run."""

from __future__ import annotations

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


def plot_losses(metrics_path: str | Path, png_path: str | Path) -> bool:
    """Draw loss, learning rate and memory over the updates of a run.

    Returns:
        False, and no file, without matplotlib or without a single update in the log.
    """
    entries = read_metrics(metrics_path)
    steps = events_named(entries, "StepDone")
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
