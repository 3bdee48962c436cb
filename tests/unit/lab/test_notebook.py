"""notebooks/teoria_da_quantizacao: tests/contract runs it; here its two files are one."""

from pathlib import Path

import nbformat
import pytest

from mlx_qlora.lab.topics import TOPICS

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"


def test_the_notebook_and_its_script_hold_the_same_cells():
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(NOTEBOOKS / "teoria_da_quantizacao.py")
    notebook = nbformat.read(NOTEBOOKS / "teoria_da_quantizacao.ipynb", as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (script, notebook)]
    assert cells[0] == cells[1]


def test_the_notebook_shows_every_topic():
    text = (NOTEBOOKS / "teoria_da_quantizacao.py").read_text(encoding="utf-8")
    assert [topic for topic in TOPICS if f'mostrar("{topic}"' not in text] == []
