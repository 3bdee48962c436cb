"""What the repository promises about itself."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from mlx_qlora.__main__ import COMMANDS, load_command
from mlx_qlora.config import RunConfig, build_config, read_config
from mlx_qlora.presets import PRESETS, preset

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "mlx_qlora").rglob("*.py"))


def tracked_texts() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", ".txt", ".sh", ".json", ".jsonl", ""}
    return [ROOT / name for name in listing.stdout.splitlines() if Path(name).suffix in suffixes]


@pytest.mark.parametrize(
    "name",
    ["pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt", "notebooks",
     "mlx_qlora", "adapters", "data/demo", "tests", "docs/ARCHITECTURE.md", "docs/LOG.md", ".ci/run"],
)  # fmt: skip
def test_the_top_level_holds_what_it_promises(name):
    assert (ROOT / name).exists()


def test_no_file_names_a_machine_or_a_registry():
    # /home/ana is the tests' own invention.
    pattern = re.compile(
        r"/(?:work|farm|root|Users|home)/(?!ana\b)[a-z]|https?://(?:pypi|files\.pythonhosted|registry)\."
    )
    found = [f"{path.relative_to(ROOT)}: {match.group()}" for path in tracked_texts()
             if path != Path(__file__) and path.is_file()
             and (match := pattern.search(path.read_text(errors="ignore")))]  # fmt: skip
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_and_every_public_name_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), "the module has no docstring"
    public = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    nested = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if inner is not node
    }
    assert not [node.name for node in public if id(node) not in nested and not ast.get_docstring(node)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_users_errors_are_not_asserts(path):
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert isinstance(build_config(read_config(path)), RunConfig)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    assert isinstance(build_config(preset(name)), RunConfig)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    assert "Example: " in (load_command(name).help or "")


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readmes_two_commands_are_targets(target):
    assert f"make {target}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
