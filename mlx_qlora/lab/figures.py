"""Figures of the lab's findings: nothing is drawn that was not measured, but for rules that are named so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_qlora.lab import network_figures, theory_figures
from mlx_qlora.lab.drawing import finished
from mlx_qlora.lab.finding import Finding
from mlx_qlora.storage import write_file

DRAWERS: dict[str, Callable[[Finding], Any]] = {
    "linear": theory_figures.linear,
    "companding": theory_figures.companding,
    "codebooks": theory_figures.codebooks,
    "packing": theory_figures.packing,
    "accumulators": theory_figures.accumulators,
    "snr": theory_figures.snr,
    "noise": theory_figures.noise,
    "networks": network_figures.networks,
    "activations": network_figures.activations,
    "pruning": network_figures.pruning,
    "distillation": network_figures.distillation,
    "pillars": network_figures.pillars,
    "memory": network_figures.memory,
}


def figure_of(finding: Finding) -> Any:
    """A matplotlib figure; None for a topic that has none.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawer = DRAWERS.get(finding.topic)
    return finished(drawer(finding), finding.title) if drawer else None


def save_figure(finding: Finding, folder: Path) -> Path | None:
    """Draw into ``<topic>.png``; None for a topic that has no figure.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: the folder cannot be written to.
    """
    figure = figure_of(finding)
    if figure is None:
        return None
    path = folder / f"{finding.topic}.png"
    write_file(path, figure.canvas.print_png)
    return path
