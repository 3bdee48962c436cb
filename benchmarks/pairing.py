"""Sides measured in turn, each time in a process of its own, and the ratios of their medians."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Figures = dict[str, float]


@dataclass(frozen=True)
class Finished:
    """A command that came to its end."""

    output: str
    """What it wrote to stdout."""
    seconds: float
    first_output_seconds: float
    """From the start to the first byte on stdout behind the heading."""
    peak_rss_bytes: int
    """Largest resident set, as the kernel counts it (ru_maxrss): file-backed pages are in it."""


def finished(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, heading: str = ""
) -> Finished:
    """Run a command in a process of its own.

    The kernel's count of memory starts at what this process has resident, so nothing large is imported here.

    Args:
        heading: What the command writes before its first output.

    Raises:
        SystemExit: the command failed; with the end of what it wrote to stderr.
    """
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        assert process.stdout is not None
        output = process.stdout.read(len(heading) + 1)
        first_output_seconds = time.perf_counter() - started
        output += process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            said = (errors.read() or output).decode(errors="replace")[-2000:]
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(output.decode(), seconds, first_output_seconds, usage.ru_maxrss * unit)


def environment(*, has_blas: bool) -> dict[str, str]:
    """For a child process: whether our side may load the system's BLAS; nobody asks the hub."""
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    switch = {} if has_blas else {"MLX_QLORA_BLAS": "off"}
    return {**inherited, "HF_HUB_OFFLINE": "1", **switch}


def in_turn(
    sides: Sequence[str], repetitions: int, measure: Callable[[str], Figures], title: str = ""
) -> dict[str, list[Figures]]:
    """Figures of each side, one measurement of each in a round; every other round goes backwards."""
    figures: dict[str, list[Figures]] = {side: [] for side in sides}
    for repetition in range(repetitions):
        for side in sides if repetition % 2 == 0 else reversed(sides):
            figures[side].append(measure(side))
            print(f"{title} {side}: {figures[side][-1]}".strip(), file=sys.stderr, flush=True)
    return figures


def compared(figures: Mapping[str, Sequence[Figures]], baseline: str) -> dict[str, Any]:
    """By side: medians, their ratios to the baseline's, and every repetition's figures."""
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in figures.items()
    }
    return {
        side: {
            "median": median,
            "ratio": {
                key: value / medians[baseline][key]
                for key, value in median.items()
                if medians[baseline].get(key)
            },
            "repetitions": list(figures[side]),
        }
        for side, median in medians.items()
    }


def print_table(title: str, sides: Mapping[str, Any], columns: Mapping[str, tuple[str, float, int]]) -> None:
    """For a person: medians and, in brackets, their ratios to the baseline's.

    Args:
        columns: Key of a figure → its heading, its unit and the decimals to show.
    """
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading, _, _ in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for side, result in sides.items():
        cells = []
        for key, (_, unit, decimals) in columns.items():
            ratio = result["ratio"].get(key)
            shown = f"{result['median'][key] / unit:,.{decimals}f}" if key in result["median"] else "–"
            cells.append(shown if ratio is None else f"{shown} (×{ratio:.2f})")
        table.add_row(side, *cells)
    console = Console()
    console.width = max(console.width, 110)  # off a terminal it would be 80
    console.print(table)
