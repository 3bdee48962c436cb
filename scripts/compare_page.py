"""Put what ``mlx-qlora compare --json`` measured into the tables of docs/compare/COMPARE.md.

    python scripts/compare_page.py

Each table stands between ``<!-- NAME.json -->`` and ``<!-- end -->``; what is written around them stays.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compare" / "COMPARE.md"
TABLE = re.compile(r"(<!-- (?P<file>[\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = (
    *("scheme", "bytes", "bits per weight", "process peak MiB", "MLX peak MiB", "load s", "tokens/s"),
    *("perplexity", "change", "KL, nats", "same token", "exact match"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    if row["problem"] is not None:
        return [row["scheme"], f"not measured: {row['problem']}", *[""] * (len(COLUMNS) - 2)]
    mib, exact = 1024**2, row["exact_match"]
    return [
        row["scheme"],
        f"{row['bytes_on_disk']:,}",
        f"{row['bits_per_weight']:.3f}",
        f"{row['peak_footprint_bytes'] / mib:.0f}",
        f"{row['mlx_peak_bytes'] / mib:.2f}",
        f"{row['load_seconds']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['perplexity']:.4f}",
        "" if row["is_reference"] else f"{row['perplexity_change']:+.2%}",
        "" if row["is_reference"] else f"{row['divergence_nats']:.6f}",
        "" if row["is_reference"] else f"{row['agreement']:.1%}",
        "" if exact is None else f"{exact:.0%}",
    ]


def table(found: dict[str, Any]) -> str:
    """A comparison in Markdown, with what it was measured on."""
    first, size = found["rows"][0], f"{found['num_parameters']:,} parameters"
    head = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    lines = ["| " + " | ".join(row) + " |" for row in [*head, *map(cells, found["rows"])]]
    about = (
        f"{size}, {first['stored_as']} on disk, computed in {first['dtype']}; {first['num_rows']} rows "
        f"of {found['data']} ({first['split']}), {first['target_tokens']:,} labelled tokens."
    )
    return "\n".join([about, "", *lines]) + "\n"


def main() -> None:
    """Rewrite the page; 1 when a file it names is not there."""
    missing = []

    def filled(match: re.Match[str]) -> str:
        file = PAGE.parent / match["file"]
        if not file.is_file():
            missing.append(match["file"])
            return match[0]
        return f"{match[1]}{table(json.loads(file.read_text(encoding='utf-8')))}{match[3]}"

    PAGE.write_text(TABLE.sub(filled, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if missing:
        sys.exit(f"not in {PAGE.parent}: {', '.join(missing)}")


if __name__ == "__main__":
    main()
