"""Try every fault, and write the table of what was tried and what survived.

    python -m tests.faults --output docs/RELIABILITY.md

Linux or macOS; as root on Linux small disks are mounted too. With --quick a few of each, in minutes.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from tests.conftest import tiny_llama
from tests.faults import experiments
from tests.faults.harness import FULL, QUICK, Bench, Row, make_data


def main(
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of experiments; all when not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few of each fault.")] = False,
    kills: Annotated[int | None, typer.Option(help="At random instants.")] = None,
    stages: Annotated[int | None, typer.Option(help="File operations at which something fails.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the long run.")] = None,
    add: Annotated[list[Path] | None, typer.Option(help="Rows of an earlier run (its --json).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Run, print, write."""
    chosen: dict[str, Callable] = {n: e for n, e in experiments.ALL.items() if not only or n in only}
    given = {"kills": kills, "stages": stages, "steps": steps}
    scale = replace(QUICK if quick else FULL, **{name: n for name, n in given.items() if n is not None})
    rows = [row for path in add or [] for row in _rows_in(path)]
    if add and not only:
        chosen = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        for number, (what, experiment) in enumerate(chosen.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            _say(f"{what} …")
            bench = Bench(tiny_llama(folder), make_data(folder / "data"), folder)
            found = experiment(bench, scale)
            for row in found:
                _say(f"  {row.fault}: {row.tried} tried, {len(row.lost)} lost")
                for problem in row.lost[:30]:
                    _say(f"    {problem.splitlines()[0]}")
            rows += found
            shutil.rmtree(folder, ignore_errors=True)
    _say(f"{(time.monotonic() - started) / 60:.1f} minutes")
    if as_json:
        print(json.dumps([{**vars(row), "survived": row.survived} for row in rows]))
    if output is not None:
        output.write_text(page(rows), encoding="utf-8")
    sys.exit(1 if any(row.lost for row in rows) else 0)


def _rows_in(path: Path) -> list[Row]:
    names = [field.name for field in fields(Row)]
    return [
        Row(**{name: row[name] for name in names}) for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def page(rows: list[Row]) -> str:
    """The table, as Markdown."""
    lines = [
        "# Faults tried and survived",
        "",
        "Real processes, real files, real faults. A row counts as lost when anything else came of it than",
        "the third column says. The whole table is made by",
        "",
        "    python -m tests.faults --output docs/RELIABILITY.md",
        "",
        f"Last made on {platform.system()} {platform.machine()}, Python " + platform.python_version() + ".",
        "",
        "| room | fault | survived means | tried | survived | lost |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row.room, row.fault, row.expected, row.tried, row.survived, len(row.lost)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    total, lost = sum(row.tried for row in rows), sum(len(row.lost) for row in rows)
    lines += [f"| | **all** | | **{total}** | **{total - lost}** | **{lost}** |", ""]
    for row in rows:
        lines += [f"- {row.fault}: {problem.splitlines()[0]}" for problem in row.lost[:20]]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    typer.run(main)
