"""``mlx-qlora lab``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.output import Json, print_json, say

ALL = "all"


def lab(
    topic: Annotated[
        str | None, typer.Argument(help="One topic, or all; without it they are listed.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for figures; with all, for a page LAB.md too.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="What data, weights and orders are drawn by.")] = 0,
    data: Annotated[
        list[str] | None, typer.Option(help="For networks: iris, digits, …, mnist, fashion-mnist, cifar-10.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the theory of quantization by measurement: tables, figures, small networks.

    Example: mlx-qlora lab snr --figures figures
    """
    from mlx_qlora.lab.topics import TOPICS, find

    if topic is None:
        about = {name: text for name, (_, text) in TOPICS.items()}
        print_json({"topics": about}) if as_json else _list(about)
        return
    findings = []
    for name in TOPICS if topic == ALL else [topic]:
        finding = find(name, seed, data or ())
        findings.append(finding)
        if not as_json:
            _show(finding)
    saved = _saved(findings, figures, seed, has_page=topic == ALL) if figures is not None else []
    if as_json:
        found = [finding.as_dict() for finding in findings]
        print_json({"seed": seed, "findings": found, "files": [str(path) for path in saved]})
    for path in saved:
        say(f"{path}")


def _saved(findings: list[Any], folder: Path, seed: int, *, has_page: bool) -> list[Path]:
    from mlx_qlora.lab.figures import save_figure
    from mlx_qlora.lab.page import PAGE, page
    from mlx_qlora.storage import said_clearly, write_text

    with said_clearly(folder):
        folder.mkdir(parents=True, exist_ok=True)
    drawn = {finding.topic: save_figure(finding, folder) for finding in findings}
    saved = [path for path in drawn.values() if path is not None]
    if has_page:
        command = f"mlx-qlora lab all --seed {seed} --figures {folder}"
        pictures = {topic for topic, path in drawn.items() if path is not None}
        write_text(folder / PAGE, page(findings, command, pictures))
        saved.append(folder / PAGE)
    return saved


def _list(about: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Topics", title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in {**about, ALL: "all of them"}.items():
        table.add_row(name, text)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print("One of them: mlx-qlora lab snr")


def _show(finding: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    console.print(f"\n{finding.title}", style="bold")
    for found in finding.tables:
        table = Table(title=found.title, title_justify="left", title_style="")
        for number, column in enumerate(found.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for cells in found.cells():
            table.add_row(*cells)
        console.print(table)
    for note in finding.notes:
        console.print(f"- {note}", soft_wrap=True)
