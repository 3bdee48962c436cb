"""Put what ``mlx-qlora compare-training --json`` measured into docs/compare/TRAINING.md, and draw it.

    python scripts/training_page.py

The tables stand between ``<!-- NAME.json -->`` and ``<!-- end -->``; what is written around them stays.
Beside each NAME.json its figure is drawn, NAME.png.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mlx_qlora.errors import MlxQloraError
from mlx_qlora.studies.training_comparison import TrainingComparison, read_comparison
from mlx_qlora.studies.training_figure import save_figure
from mlx_qlora.studies.training_table import legend, tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compare" / "TRAINING.md"
PLACE = re.compile(r"(<!-- (?P<file>[\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def section(found: TrainingComparison) -> str:
    """A comparison's tables and legend in Markdown."""
    parts = []
    for title, columns, rows in tables(found):
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        parts.append("\n".join([*([title, ""] if title else []), *map(_row, lines)]))
    parts.append("\n".join(f"- {line}" for line in _sentences(found)))
    return "\n\n".join(parts) + "\n"


def main(page: Path = PAGE) -> None:
    """Rewrite the page and draw its figures; 1 when a file it names cannot be used."""

    def filled(match: re.Match[str]) -> str:
        file = page.parent / match["file"]
        found = read_comparison(file)
        save_figure(found, file.with_suffix(".png"))
        return f"{match[1]}{section(found)}{match[3]}"

    try:
        page.write_text(PLACE.sub(filled, page.read_text(encoding="utf-8")), encoding="utf-8")
    except MlxQloraError as error:
        sys.exit(str(error))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _sentences(found: TrainingComparison) -> list[str]:
    """The legend and where it was measured."""
    there = found.environment
    where = f"{there['device']}; mlx {there['mlx']}, mlx-lm {there['mlx-lm']}, Python {there['Python']}."
    return [*legend(found), where]


if __name__ == "__main__":
    main()
