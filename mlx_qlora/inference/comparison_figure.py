"""One figure of a comparison: how far each format's answers are off, against its size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_qlora.errors import ConfigError
from mlx_qlora.inference.comparison import Comparison, Row
from mlx_qlora.storage import write_file

# Okabe and Ito's colours, as in training.plots: one for each family of formats.
_FAMILIES = {
    "affine integers": (("int",), "#0072B2", "o"),
    "small floats, 8-bit scales": (("mxfp", "nvfp"), "#D55E00", "s"),
    "NF4": (("nf4",), "#009E73", "^"),
}
_GREY = "#767676"
_LABEL_PIXELS = (190, 26)
"""Room for one label: width and height."""
_LEADER = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 3}


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn, before anything is measured.

    Raises:
        ConfigError: matplotlib is not installed, the name is no picture's, or its folder is not there.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "A figure needs matplotlib, which is not installed.",
            where="--figure",
            run="pip install 'mlx-qlora[plots]'",
        )
    if path.suffix.lower() != ".png":
        raise ConfigError("A figure's name ends in .png.", where=f"--figure {path}")
    if not path.absolute().parent.is_dir():
        raise ConfigError("There is no such folder.", where=f"--figure {path}", run=f"mkdir -p {path.parent}")


def save_figure(comparison: Comparison, path: Path) -> None:
    """Draw divergence and perplexity of every measured format against its bits per weight.

    Raises:
        StorageError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: that would change the backend of a notebook.
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panel = figure.subplots()
    _draw(panel, comparison)
    write_file(path, canvas.print_png)


def _draw(panel: Any, comparison: Comparison) -> None:
    reference = comparison.reference
    others = [row for row in comparison.rows if row.measured and not row.is_reference]
    points = [row for row in others if row.measured and row.measured.divergence_nats > 0]
    for family, (starts, colour, marker) in _FAMILIES.items():
        own = [row for row in points if row.scheme.startswith(starts)]
        x, y = (
            [row.bits_per_weight for row in own],
            [row.measured.divergence_nats for row in own if row.measured],
        )
        panel.plot(x, y, marker=marker, color=colour, linestyle="none", markersize=7, label=family)
    panel.set_yscale("log")
    best = _best(points)
    panel.step(
        [row.bits_per_weight for row in best], [_divergence(row) for row in best], where="post",
        color="#BBBBBB", linewidth=1, zorder=0, label="nothing smaller is nearer",
    )  # fmt: skip
    panel.set_title(
        f"What each format does to the answers of {comparison.model}", loc="left", fontweight="bold"
    )
    panel.set_xlabel(
        f"bits per weight as stored (the reference, {reference.scheme}: {reference.bits_per_weight:.1f})"
    )
    panel.set_ylabel("KL divergence from the reference, nats per token")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E5E5E5", linewidth=0.8)
    panel.set_axisbelow(True)
    _make_room(panel, points)
    panel.legend(frameon=False, fontsize=9, title="beside each name: change of perplexity", title_fontsize=9)
    panel.figure.draw_without_rendering()  # settles where everything is
    _label(panel, comparison, points)


def _make_room(panel: Any, rows: list[Row]) -> None:
    """Limits that leave room for a label to the right of the last point, and above the highest."""
    if not rows:
        return
    sizes, heights = [row.bits_per_weight or 0.0 for row in rows], [_divergence(row) for row in rows]
    spread = max(max(sizes) - min(sizes), 0.5)
    panel.set_xlim(min(sizes) - 0.05 * spread, max(sizes) + 0.22 * spread)
    panel.set_ylim(min(heights) / 2, max(heights) * 3)


def _divergence(row: Row) -> float:
    return row.measured.divergence_nats if row.measured else 0.0


def _best(rows: list[Row]) -> list[Row]:
    """Rows that no smaller one is as near as, by size."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bits_per_weight or 0.0, _divergence(row))):
        if not best or _divergence(row) < _divergence(best[-1]):
            best.append(row)
    return best


def _label(panel: Any, comparison: Comparison, rows: list[Row]) -> None:
    """Name and change of perplexity to the right of each point; pushed up where one would cover another."""
    size = panel.figure.dpi * panel.figure.get_size_inches()
    row_height, width = _LABEL_PIXELS[1] / size[1], _LABEL_PIXELS[0] / size[0]
    to_share = (panel.transData + panel.figure.transFigure.inverted()).transform
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (_divergence(row), -(row.bits_per_weight or 0.0))):
        x, y = to_share((row.bits_per_weight, _divergence(row)))
        beside = [other for at, other in taken if abs(at - x) < width]
        place = y
        while any(abs(other - place) < row_height for other in beside):
            place += row_height / 8
        taken.append((x, place))
        up = (place - y) * size[1] * 72 / panel.figure.dpi
        change = comparison.perplexity_change(row) or 0.0
        panel.annotate(
            f"{row.scheme}  {_change(change)}", (row.bits_per_weight, _divergence(row)),
            xytext=(24 if up > 1 else 8, up), textcoords="offset points", va="center", fontsize=8.5,
            arrowprops=_LEADER if up > 1 else None,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )  # fmt: skip


def _change(share: float) -> str:
    return f"{share:+.1%}" if share < 10 else f"× {1 + share:.0f}"
