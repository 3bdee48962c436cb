"""Figures of the topics about numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_qlora.lab.drawing import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    SKY,
    VERMILION,
    below,
    dress,
    grouped_bars,
    panels,
)
from mlx_qlora.lab.finding import Finding
from mlx_qlora.lab.signal import DB_PER_BIT


def linear(finding: Finding) -> Any:
    """Both staircases; error by bits per weight and granularity; error on values of one sign."""
    figure, (stairs, granularity, sign) = panels(1, 3, (12.5, 4.2))
    line = finding.curves["line"]
    stairs.plot(line, line, color=GREY, linewidth=1, linestyle="--", label="r itself")
    for colour, (name, values) in zip((BLUE, VERMILION), finding.curves["stairs"].items(), strict=True):
        stairs.plot(line, values, color=colour, linewidth=1.8, label=name)
    dress(stairs, "3 bits over r from -0.5 to 2", "r", "S · (Q - Z)", grid="both")
    below(stairs, 3)
    table = finding.tables[1]
    for colour, marker, per in zip(COLOURS, MARKERS, ("tensor", "channel", "group"), strict=False):
        points = [(row[4], row[2]) for row in table.rows if row[1] == per]
        label = "group of 32" if per == "group" else per
        granularity.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    granularity.set_yscale("log")
    dress(granularity, "Symmetric, by what shares a scale", "bits per weight, scales included",
          "relative error", grid="both")  # fmt: skip
    below(granularity, 3)
    rows = finding.tables[2].rows
    grouped_bars(sign, [str(row[0]) for row in rows],
                 {"symmetric": [row[1] for row in rows], "asymmetric": [row[2] for row in rows]})  # fmt: skip
    sign.set_yscale("log")
    dress(sign, "Values after a ReLU", "bits", "RMS error")
    below(sign, 2)
    return figure


def companding(finding: Finding) -> Any:
    """The curves, their levels, and SNR over level."""
    figure, (curves, levels) = panels(1, 2, (11, 4.6), width_ratios=(1, 1.4))
    x = finding.curves["x"]
    for colour, (name, values) in zip(
        (GREY, BLUE, VERMILION), finding.curves["compressed"].items(), strict=True
    ):
        style = "--" if name.startswith("A") else "-"
        curves.plot(x, values, color=colour, linestyle=style, linewidth=1.8, label=name)
    curves.locator_params(nbins=5)
    dress(curves, "What is applied before the even steps", "x", "F(x)", grid="both")
    below(curves, 3)
    table = finding.tables[0]
    for colour, marker, name in zip((GREY, BLUE, VERMILION), MARKERS, table.columns[1:], strict=False):
        levels.plot(
            table.column(table.columns[0]), table.column(name), color=colour, marker=marker, label=name
        )
    levels.axhline(finding.curves["plateau_db"], color=BLACK, linestyle=":", linewidth=1,
                   label="rule for μ-law, loud signals")  # fmt: skip
    dress(levels, "8 bits, Laplacian signal", "level, dB of full scale", "SNR, dB", grid="both")
    below(levels, 4)
    return figure


def codebooks(finding: Finding) -> Any:
    """NF4's levels on the values they are made for, and errors by distribution."""
    figure, (levels, errors) = panels(1, 2, (12, 4.8), width_ratios=(1.15, 1))
    blocks = finding.curves["blocks"].reshape(-1)
    levels.hist(blocks, 120, range=(-1, 1), density=True, color=SKY, alpha=0.45,
                label="normal values over the largest of their 64")  # fmt: skip
    top = float(np.histogram(blocks, 120, range=(-1, 1), density=True)[0].max())
    nf4, even = finding.curves["nf4"], np.arange(-7, 8) / 7
    for height, (name, places, colour) in enumerate(
        (("NF4, 16 levels", nf4, BLUE), ("symmetric int4, the 15 levels in use", even, VERMILION))
    ):
        base = -0.16 * top * (height + 1)
        levels.vlines(places, base, base + 0.11 * top, color=colour, linewidth=2, label=name)
    levels.set_ylim(bottom=-0.36 * top)
    levels.set_yticks([])
    dress(levels, "Where the levels stand", "value", "density", grid="x")
    below(levels, 2)
    table = finding.tables[0]
    names = table.columns[1:]
    grouped_bars(errors, table.column("distribution"), {name: table.column(name) for name in names})
    dress(errors, "16 levels", "distribution of the values", "relative error")
    below(errors, 5, columnspacing=1.0, handlelength=1.2)
    return figure


def packing(finding: Finding) -> Any:
    """Bits spent per code in either layout."""
    figure, (spent, held) = panels(1, 2, (11, 4.2))
    table = finding.tables[0]
    bits = table.column("bits")
    codes = int(table.title.split()[0])
    per_code = {
        "aligned to 32 bits": [8 * size / codes for size in table.column("aligned bytes")],
        "dense": [8 * size / codes for size in table.column("dense bytes")],
    }
    grouped_bars(spent, [str(b) for b in bits], per_code)
    dress(spent, f"{codes} codes, packed", "bits of a code", "bits spent on it")
    below(spent, 2)
    bars = held.bar([str(b) for b in bits], table.column("in 32 bits"), color=BLUE)
    held.bar_label(bars, fontsize=9, padding=2)
    dress(held, "Whole codes in a 32-bit word", "bits of a code", "codes")
    return figure


def accumulators(finding: Finding) -> Any:
    """Sums of worst and of random codes over their length, and the measured overflow."""
    figure, panel = panels(1, 1, (8.5, 4.8))
    lengths = finding.curves["lengths"]
    panel.loglog(lengths, finding.curves["worst"], color=VERMILION, marker="o", markersize=4,
                 label="every code at its worst")  # fmt: skip
    panel.loglog(lengths, finding.curves["typical"], color=BLUE, marker="s", markersize=4,
                 label="random codes, largest of 16 sums")  # fmt: skip
    for limit, name in ((2**15 - 1, "int16 ends"), (2**31 - 1, "int32 ends")):
        panel.axhline(limit, color=BLACK, linewidth=1, linestyle="--")
        panel.text(lengths[0], limit * 1.2, name, va="bottom", fontsize=9)
    rows = [row for row in finding.tables[0].rows if row[0] == "int8 x int8" and row[1] == 32]
    safe, over = rows
    panel.plot(over[2], over[3], color=BLACK, marker="x", markersize=10, markeredgewidth=2, linestyle="none",
               label=f"K = {over[2]:,}: the accumulator says {over[4]:,}")  # fmt: skip
    panel.annotate(f"K = {safe[2]:,} is the last safe one", (safe[2], safe[3]), (safe[2] / 60, safe[3] * 4),
                   fontsize=9, arrowprops={"arrowstyle": "->", "color": GREY})  # fmt: skip
    panel.set_ylim(2**13, 2**37)
    dress(panel, "int8 x int8", "number of products K", "magnitude of the sum", grid="both")
    below(panel, 3, columnspacing=1.2)
    return figure


def snr(finding: Finding) -> Any:
    """SNR over bits, and how far it is from the rule."""
    figure, (whole, rest) = panels(1, 2, (11, 4.6))
    bits = np.array(finding.curves["bits"])
    rules = {"uniform": 0.0, "sine": 10 * np.log10(1.5)}
    for colour, marker, (name, values) in zip(
        (BLUE, VERMILION, GREEN), MARKERS, finding.curves["measured"].items(), strict=False
    ):
        whole.plot(bits, values, color=colour, marker=marker, linestyle="none", label=f"{name}, measured")
        rest.plot(bits, np.array(values) - DB_PER_BIT * bits, color=colour, marker=marker, label=name)
        if name in rules:
            rest.axhline(rules[name], color=colour, linestyle=":", linewidth=1.2)
    whole.plot(bits, DB_PER_BIT * bits, color=GREY, linewidth=1, zorder=0, label="6.02 b")
    dress(whole, "SNR", "bits b", "dB", grid="both")
    below(whole, 2)
    rest.set_ylim(-12, 4)
    dress(rest, "Less 6.02 b; dotted: the rule, 0 and 1.76 dB", "bits b", "dB", grid="both")
    below(rest, 3)
    return figure


def noise(finding: Finding) -> Any:
    """Histograms of e, and its spectra with and without dither."""
    figure, axes = panels(1, 4, (14, 4.2), width_ratios=(1, 1, 1, 1.7))
    for panel, colour, (name, e) in zip(
        axes, (BLUE, VERMILION, GREEN), finding.curves["histograms"].items(), strict=False
    ):
        panel.hist(e, 64, range=(-0.5, 0.5), density=True, color=colour, alpha=0.7)
        panel.axhline(1, color=BLACK, linestyle=":", linewidth=1)
        dress(panel, name.replace(", subtractive", ",\nsubtractive"), "e / Δ", "density")
    spectra = axes[-1]
    for colour, (name, values) in zip(
        (VERMILION, GREEN, BLUE), finding.curves["spectra"].items(), strict=True
    ):
        label = "no dither" if name == "none" else f"{name} dither"
        spectra.plot(np.linspace(0, 0.5, len(values)), values, color=colour, linewidth=1.1, label=label)
    spectra.set_ylim(-25, 30)
    dress(spectra, "Spectrum of e, tone at 4 bits", "frequency, cycles per sample", "dB over white Δ²/12")
    spectra.legend(frameon=False, fontsize=8.5, loc="upper right")
    return figure
