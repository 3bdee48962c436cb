"""commands/doctor.py"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mlx_qlora.__main__ import load_command, run
from mlx_qlora.commands.doctor import model_findings, show
from mlx_qlora.machine import checkup
from mlx_qlora.machine.finding import Finding, gathered, has_problem
from tests.macs import mac

ROOT = Path(__file__).parents[3]
LONG = "curl -sSI --max-time 10 https://a.very.long.name.of.a.mirror.example/with/a/path/that/does/not/end"
FINDINGS = [
    Finding("chip", "ok", "Apple M1, 4 performance and 4 efficiency cores"),
    Finding("swap", "warning", "3.0 GiB in use; " + "fewer programs would be faster " * 4, "top -o mem"),
    Finding("hub cache", "problem", "it does not answer", f"{LONG}   # a proxy?"),
    Finding("display", "ok", "is watched", "pmset displaysleepnow"),
]  # fmt: skip


def shown(findings, width=80, *, is_terminal=True, **settings):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=is_terminal, highlight=False, markup=False, **settings
    )
    show(findings, console)
    return console.file.getvalue()


@pytest.fixture
def found(monkeypatch):
    """Let the machine be found so."""

    def let(findings):
        monkeypatch.setattr(checkup, "examine", lambda: list(findings))

    return let


def test_this_machine_is_looked_at_and_nothing_on_it_prevents_work(capsys):
    code = run(load_command("doctor"), ["--json"])
    told = json.loads(capsys.readouterr().out)
    problems = [finding for finding in told["findings"] if finding["status"] == "problem"]
    assert (code, told["ok"], problems) == (0, True, [])
    assert len({finding["subject"] for finding in told["findings"]}) == len(told["findings"]) >= 12
    assert not [f for f in told["findings"] if "could not be found out" in f["text"]]


def test_every_warning_and_problem_of_a_mac_has_a_command(monkeypatch):
    from mlx_qlora.memory import monitor

    monkeypatch.setattr(monitor, "device_limit_bytes", lambda: 10 * 1024**3)
    sick = mac(wired_limit_mb="15000", memorystatus_vm_pressure_level="4", arm64=None)
    findings = checkup.examine(sick)
    assert has_problem(findings)
    assert not [finding for finding in findings if finding.status != "ok" and not finding.run]
    assert {finding.subject for finding in findings} >= {
        "chip", "system", "memory", "GPU memory", "memory pressure", "swap", "Python", "packages", "Metal",
        "display", "cache", "hub cache", "this folder", "hub",
    }  # fmt: skip


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_only_a_problem_is_an_exit_code(found, capsys, status, code):
    found([Finding("x", status, "text", "command")])
    assert run(load_command("doctor"), []) == code
    assert f"{status}: x: text\n" in capsys.readouterr().out


def test_a_check_that_fails_says_so_and_stops_no_other():
    def breaks():
        raise OSError("gone")

    def lacks():
        raise ModuleNotFoundError("No module named 'mlx'")

    first, second, third = gathered(
        [("a", breaks), ("b", lacks), ("c", lambda: [Finding("c", "ok", "fine")])]
    )
    assert (first.subject, first.status) == ("a", "warning")
    assert (second.status, "No module named 'mlx'" in second.text) == ("problem", True)
    assert third.text == "fine"


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_only_commands_may_be_longer_than_a_line(width):
    lines = shown(FINDINGS, width, no_color=True).splitlines()
    too_long = [line for line in lines if len(line) > width]
    assert all(LONG in line for line in too_long)
    assert sum(LONG in line for line in lines) == 1  # to be copied whole, and without the remark
    assert any(line.strip() == "a proxy?" for line in lines)


def test_marks_and_words_say_it_without_colour():
    colour = re.compile(r"\x1b\[(\d+;)*[34]\d[;m]")
    assert colour.search(shown(FINDINGS, color_system="standard"))
    text = shown(FINDINGS, color_system="standard", no_color=True)
    assert not colour.search(text)
    for begin in ("✓ ok       chip", "! warning  swap", "✗ problem  "):
        assert begin in text.replace("\x1b[1m", "").replace("\x1b[0m", "")


def test_off_a_terminal_each_finding_is_a_sentence_on_a_line_of_its_own():
    lines = shown(FINDINGS, width=40, is_terminal=False).splitlines()
    assert lines[0] == "ok: chip: Apple M1, 4 performance and 4 efficiency cores"
    assert lines[2] == "    Run: top -o mem"
    assert f"    Run: {LONG}   # a proxy?" in lines
    assert "    Tip: pmset displaysleepnow" in lines


@pytest.mark.parametrize(
    ("findings", "last"),
    [
        (FINDINGS, "1 problem to solve first; the commands stand above."),
        (FINDINGS[:2], "Nothing prevents work. 1 warning."),
        (FINDINGS[:1], "Everything is as it should be."),
    ],
)
def test_the_last_lines_say_what_it_comes_to(findings, last):
    assert last in shown(findings, is_terminal=False)


def test_a_terminal_that_knows_no_marks_gets_none():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80, force_terminal=True, no_color=True, highlight=False, markup=False)
    show(FINDINGS[:1], console)
    file.flush()
    assert b"ok" in file.buffer.getvalue()


def test_a_model_that_fits_gets_the_command_to_train_it(tiny_llama_folder):
    (finding,) = model_findings(str(tiny_llama_folder))
    assert finding.status == "ok"
    assert finding.run.startswith(f"mlx-qlora train --model {tiny_llama_folder} ")
    assert 0 < finding.facts["needed_bytes"] <= finding.facts["budget_bytes"]


def test_a_model_that_does_not_fit_is_a_problem(tiny_llama_folder, monkeypatch):
    from mlx_qlora.memory import monitor

    monkeypatch.setattr(monitor, "device_limit_bytes", lambda: 1024**2)
    (finding,) = model_findings(str(tiny_llama_folder))
    assert (finding.status, finding.run) == (
        "problem",
        f"mlx-qlora plan --model {tiny_llama_folder} --advise",
    )


def test_a_model_that_is_nowhere_is_a_problem(tmp_path):
    (finding,) = model_findings(str(tmp_path / "none"))
    assert finding.status == "problem"
    assert finding.run


@pytest.mark.slow
def test_where_mlx_cannot_be_loaded_the_rest_is_still_told(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('incompatible architecture')")
    command = [sys.executable, "-m", "mlx_qlora", "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert done.stderr == ""
    assert "incompatible architecture" in findings["backend"]["text"]
    assert findings["backend"]["status"] == "problem"
    assert findings["Python"]["status"] == findings["packages"]["status"] == "ok"
