"""The findings as one page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_qlora.lab.finding import Finding, Table

PAGE = "LAB.md"


def page(findings: Sequence[Finding], command: str, pictures: set[str]) -> str:
    """Every finding: what it says, its figure, its tables.

    Args:
        command: What was typed.
        pictures: Topics whose figure stands beside the page as ``<topic>.png``.
    """
    parts = [
        "# The lab",
        f"Measured by `{command}`. The same seed gives the same figures on the same machine.",
    ]
    for finding in findings:
        parts.append(f"## {finding.title}")
        parts.append("\n".join(f"- {note}" for note in finding.notes))
        if finding.topic in pictures:
            parts.append(f"![{finding.title}]({finding.topic}.png)")
        parts += [_markdown(table) for table in finding.tables]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    """A table that is folded up when it is long."""
    rows = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.cells()]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    if len(table.rows) <= 8:
        return f"**{table.title}**\n\n{text}"
    return f"<details><summary>{table.title}</summary>\n\n{text}\n\n</details>"
