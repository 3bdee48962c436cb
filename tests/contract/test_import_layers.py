"""Imports point downwards only, and heavy ones wait until they are needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_rooms_import_downwards_only():
    lint = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mlx_qlora", ["mlx.core", "mlx_lm", "transformers", "pydantic", "typer"]),
        ("import mlx_qlora.__main__", ["mlx.core", "mlx_lm", "transformers", "pydantic"]),
        ("import mlx_qlora.commands.train", ["mlx_lm", "transformers", "matplotlib"]),
        ("import mlx_qlora.commands.infer", ["mlx_lm", "transformers", "mlx.data", "matplotlib"]),
        ("import mlx_qlora.dataset, mlx_qlora.weights.loader", ["mlx_lm", "transformers", "huggingface_hub"]),
        ("import mlx_qlora.training.watching", ["mlx.core", "mlx_lm", "numpy"]),
        ("import mlx_qlora; mlx_qlora.load", ["mlx_lm", "transformers", "matplotlib"]),
    ],
)
def test_an_import_does_not_bring_what_it_does_not_need(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["presets", "--help"], ["infer", "--help"]])
def test_help_loads_no_model_library(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "mlx_qlora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mlx_qlora" in loaded
    assert loaded.isdisjoint({"mlx_lm", "transformers", "matplotlib", "huggingface_hub"})
