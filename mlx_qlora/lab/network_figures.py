"""Figures of the topics on small networks and on memory."""

from __future__ import annotations

from typing import Any

from mlx_qlora.lab.calculator import devices
from mlx_qlora.lab.drawing import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    below,
    dress,
    grouped_bars,
    panels,
)
from mlx_qlora.lab.finding import Finding
from mlx_qlora.memory.plan import GIB

_FAMILIES = {
    "linear, per tensor": (", tensor", VERMILION, "o"),
    "linear, per channel": (", channel", BLUE, "s"),
    "linear, per group": ("sym, group", GREEN, "^"),
    "linear, asymmetric": ("asym, group", ORANGE, "v"),
    "NF4": ("NF4", BLACK, "*"),
    "k-means": ("k-means", PURPLE, "D"),
    "μ-law": ("μ-law", SKY, "P"),
}


def networks(finding: Finding) -> Any:
    """Accuracy and calibration over bits per weight, a column per data set."""
    rows = finding.tables[0].rows
    names = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = panels(2, len(names), (3.4 * len(names) + 0.4, 6.6), sharex=True, squeeze=False)
    for column, name in enumerate(names):
        own = [row for row in rows if row[0] == name]
        for line, (value, title, unit) in enumerate(
            ((3, f"{name}: accuracy", "%"), (4, f"{name}: calibration error", "points"))
        ):
            panel = axes[line, column]
            panel.axhline(100 * own[0][value], color=GREY, linestyle="--", linewidth=1.2, label="float32")
            for label, (part, colour, marker) in _FAMILIES.items():
                found = [row for row in own if _is_of(row[1], part)]
                points = [(row[2], 100 * row[value]) for row in found]
                size = 11 if marker == "*" else 6
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=size,
                           linewidth=1, alpha=0.9, label=label)  # fmt: skip
            dress(panel, title, "bits per weight" if line else "", unit if column == 0 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 * len(names), frameon=False, fontsize=9
    )
    return figure


def _is_of(name: str, part: str) -> bool:
    return part in name and not (part == "sym, group" and "asym" in name)


def activations(finding: Finding) -> Any:
    """Accuracy over bits of the activations, a line per calibration."""
    figure, panel = panels(1, 1, (7.5, 4.6))
    rows = [row for row in finding.tables[0].rows if row[1] != "none"]
    panel.axhline(
        100 * finding.curves["float_accuracy"], color=GREY, linestyle="--", linewidth=1.2, label="float32"
    )
    for colour, marker, name in zip(COLOURS, MARKERS, dict.fromkeys(row[1] for row in rows), strict=False):
        points = [(int(row[0].split()[0]), 100 * row[2]) for row in rows if row[1] == name]
        panel.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    panel.set_ylim(0, 102)
    panel.xaxis.get_major_locator().set_params(integer=True)
    dress(panel, "Digits: int8 weights, range of activations by", "bits of the activations", "accuracy, %")
    below(panel, 4)
    return figure


def pruning(finding: Finding) -> Any:
    """Accuracy over what was removed, as cut and tuned."""
    figure, axes = panels(1, 2, (11, 4.4), sharey=True)
    for panel, table in zip(axes, finding.tables, strict=True):
        removed = [100 * value for value in table.column("removed")]
        for column, colour, marker in (("accuracy as cut", VERMILION, "o"), ("accuracy tuned", BLUE, "s")):
            values = [100 * value for value in table.column(column)]
            panel.plot(removed, values, color=colour, marker=marker, label=column.removeprefix("accuracy "))
        dress(panel, table.title, "removed, %", "accuracy, %" if panel is axes[0] else "")
        panel.set_ylim(0, 102)
        below(panel, 2)
    return figure


def distillation(finding: Finding) -> Any:
    """Mean accuracy and its deviation, by size and way."""
    figure, panel = panels(1, 1, (7.5, 4.6))
    rows = finding.tables[0].rows
    units = list(dict.fromkeys(row[0] for row in rows))
    for number, (way, colour) in enumerate((("labels", GREY), ("distilled", BLUE))):
        own = [row for row in rows if row[1] == way]
        places = [place + (number - 0.5) * 0.38 for place in range(len(units))]
        label = "by labels alone" if way == "labels" else "by labels and three teachers"
        panel.bar(places, [100 * row[2] for row in own], 0.35, yerr=[100 * row[3] for row in own],
                  color=colour, capsize=4, label=label)  # fmt: skip
    panel.axhline(100 * finding.curves["teacher_accuracy"], color=BLACK, linestyle="--", linewidth=1.2,
                  label="the teachers")  # fmt: skip
    panel.set_xticks(range(len(units)), [str(unit) for unit in units])
    lowest = min(100 * (row[2] - row[3]) for row in rows)
    panel.set_ylim(max(0, lowest - 8), 101)
    dress(panel, "Digits: mean and deviation over seeds (axis does not begin at 0)", "units of the student",
          "accuracy, %")  # fmt: skip
    below(panel, 3)
    return figure


def pillars(finding: Finding) -> Any:
    """Accuracy over bytes, and how each model was made."""
    figure, panel = panels(1, 1, (9.5, 5.4))
    rows = finding.tables[0].rows
    for colour, marker, pillar in zip(
        (BLACK, *COLOURS), ("*", *MARKERS), dict.fromkeys(r[1] for r in rows), strict=False
    ):
        own = [row for row in rows if row[1] == pillar]
        label = "as trained" if pillar == "none" else pillar
        panel.plot([row[2] for row in own], [100 * row[3] for row in own], color=colour, marker=marker,
                   markersize=12 if marker == "*" else 8, linestyle="none", label=label)  # fmt: skip
    # Names above and below in turn: neighbours on the axis are often neighbours in accuracy too.
    for number, row in enumerate(sorted(rows, key=lambda row: row[2])):
        above = number % 2 == 0
        panel.annotate(row[0], (row[2], 100 * row[3]), (0, 9 if above else -10), textcoords="offset points",
                       ha="center", va="bottom" if above else "top", fontsize=8.5)  # fmt: skip
    panel.set_xscale("log")
    low, high = min(row[2] for row in rows), max(row[2] for row in rows)
    panel.set_xlim(low / 1.6, high * 1.6)
    panel.set_ylim(100 * min(row[3] for row in rows) - 3, 100)
    dress(panel, "Digits", "bytes, as stored", "accuracy, % (axis does not begin at 0)", grid="both")
    below(panel, 6, columnspacing=1.0, handletextpad=0.3)
    return figure


def memory(finding: Finding) -> Any:
    """Memory by use and model, against what devices have."""
    figure, (course, uses) = panels(1, 2, (13, 5), width_ratios=(1, 1.5))
    table = finding.tables[0]
    formats = {"FP32": "FP32", "FP16, BF16": "FP16", "INT8": "INT8", "INT4": "INT4"}
    grouped_bars(
        course, table.column("parameters"), {name: table.column(key) for name, key in formats.items()}
    )
    course.set_yscale("log")
    dress(course, "Weights alone", "parameters", "GB of 10⁹ bytes")
    below(course, 4)
    rows = finding.tables[2].rows
    models, kinds = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    series = {kind: [row[2] for row in rows if row[1] == kind] for kind in kinds}
    grouped_bars(uses, models, series)
    uses.set_yscale("log")
    for device in devices():
        uses.axhline(device.usable_bytes / GIB, color=GREY, linestyle=":", linewidth=1)
        uses.text(len(models) - 0.42, device.usable_bytes / GIB, device.name, fontsize=8, va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    uses.set_xlim(-0.55, len(models) + 0.15)
    dress(uses, "By use; dotted: what a device has for it", "", "GiB")
    below(uses, 5, columnspacing=1.0, handlelength=1.2)
    return figure
