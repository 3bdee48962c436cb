"""Completion as a shell asks for it: bash runs the script that it is given, which runs the command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qlora.__main__ import COMMANDS

SCRIPTS = Path(sys.executable).parent
HEAVY = ("mlx.core", "mlx_lm", "transformers", "huggingface_hub", "matplotlib", "rich.table")
BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def script():
    """What --show-completion prints in bash; that finds out the shell it is typed in, here it is told."""
    asked = {**os.environ, "_MLX_QLORA_COMPLETE": "source_bash"}
    command = [SCRIPTS / "mlx-qlora"]
    return subprocess.run(command, env=asked, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def complete(script):
    """The words that bash offers after a line: complete("mlx-qlora tra")."""
    if BASH is None or not (SCRIPTS / "mlx-qlora").exists():
        pytest.skip("there is no bash, or the command is not installed")

    def offered(line):
        words = line.split(" ")
        asked = f"{script}\nCOMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}\n"
        asked += '_mlx_qlora_completion mlx-qlora; printf "%s\\n" "${COMPREPLY[@]}"'
        environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            [BASH, "-c", asked], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_sub_commands_come_in_the_order_of_a_users_day(complete):
    assert complete("mlx-qlora ") == list(COMMANDS)


def test_a_sub_commands_own_options_are_offered(complete):
    assert complete("mlx-qlora watch --o") == ["--once"]


def test_a_path_is_left_to_the_shell(complete):
    assert complete("mlx-qlora watch adap") == []


@pytest.mark.parametrize(("line", "word"), [("mlx-qlora ", 1), ("mlx-qlora train --", 2)])
def test_completing_imports_no_library_that_takes_time(line, word):
    code = (
        "import atexit, sys; sys.argv = ['mlx-qlora']\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        "from mlx_qlora.__main__ import main; main()"
    )
    asked = {"_MLX_QLORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert done.stderr.strip() == "[]"
