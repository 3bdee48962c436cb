"""Every notebook runs from top to bottom on the embedded model, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

RUNS = [pytest.param(p, marks=pytest.mark.slow) if p.stem.startswith("teoria") else p for p in NOTEBOOKS]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("Path.cwd().parent", f'Path("{path.parents[1]}")')
    monkeypatch.chdir(tmp_path)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "Depois:" in printed
    answers = {
        line.split(":", 1)[0]: line.split(":", 1)[1].strip() for line in printed.splitlines() if ":" in line
    }
    assert answers["Depois"] != answers["Antes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(
        not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code"
    )
