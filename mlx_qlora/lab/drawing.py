"""How the lab's figures look."""

from __future__ import annotations

from typing import Any

from mlx_qlora.lab.libraries import lab_library

# Okabe and Ito's colours, which are told apart with any colour vision (jfly.uni-koeln.de/color).
BLUE, SKY, VERMILION, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
PURPLE, ORANGE, GREY, BLACK = "#CC79A7", "#E69F00", "#767676", "#222222"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")


def panels(num_rows: int, num_columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, as ``Figure.subplots`` gives them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    # Not pyplot: that would change the backend of a notebook.
    figure = lab_library("matplotlib.figure").Figure(figsize=size, dpi=150, layout="constrained")
    lab_library("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, **options)


def dress(panel: Any, title: str, x: str, y: str, *, grid: str = "y") -> None:
    """Title, axes' names, and no more lines than needed."""
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=grid, color="#E5E5E5", linewidth=0.8)
    panel.set_axisbelow(True)


def finished(figure: Any, title: str) -> Any:
    """The figure under its title."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def below(panel: Any, num_columns: int, **options: Any) -> None:
    """A legend under the panel, clear of what is drawn."""
    panel.legend(
        frameon=False, fontsize=8.5, ncols=num_columns, loc="upper center",
        bbox_to_anchor=(0.5, -0.17), borderpad=0, **options,
    )  # fmt: skip


def grouped_bars(panel: Any, groups: list[str], series: dict[str, list[float]], **options: Any) -> None:
    """One group of bars per name, one bar of each group per series."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        places = [group + offset for group in range(len(groups))]
        panel.bar(places, values, width * 0.92, label=name, color=COLOURS[number], **options)
    panel.set_xticks(range(len(groups)), groups)
