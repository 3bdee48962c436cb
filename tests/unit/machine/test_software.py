"""machine/software.py"""

import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mlx_qlora.machine import software
from mlx_qlora.machine.system import System
from tests.macs import mac

ROOT = Path(__file__).parents[3]
LINUX = System("linux")


def only(findings):
    (finding,) = findings
    return finding


def other(**changed):
    """Versions as installed here, but for these; None is not installed."""

    def installed(name):
        key = name.replace("-", "_")
        if key in changed and changed[key] is None:
            raise PackageNotFoundError(name)
        return changed.get(key) or version(name)

    return installed


def test_the_tested_versions_are_those_of_the_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.partition(";")[0].split("==") for line in lines if not line.startswith("#"))
    tested = json.loads(software.TESTED.read_text())
    assert tested == {name: pins[name] for name in tested}


def test_every_package_that_is_needed_to_run_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in project["dependencies"]}
    assert names <= software.tested_versions().keys()


def test_this_environment_is_the_tested_one():
    found = only(software.packages())
    assert found.status == "ok"
    assert "mlx 0." in found.text


def test_another_version_is_a_warning_that_names_both_and_the_command():
    found = only(software.packages(other(pydantic="2.10.0")))
    assert found.status == "warning"
    assert f"pydantic 2.10.0 ({version('pydantic')})" in found.text
    assert found.run == f'python -m pip install "pydantic=={version("pydantic")}"'


def test_a_version_that_is_not_allowed_and_a_missing_package_are_one_problem():
    found = only(software.packages(other(mlx_lm="0.20.0", tqdm=None)))
    assert found.status == "problem"
    assert "tqdm is missing" in found.text
    assert "mlx-lm 0.20.0 is not " in found.text
    tested = software.tested_versions()
    assert f'"tqdm=={tested["tqdm"]}"' in found.run
    assert f'"mlx-lm=={tested["mlx-lm"]}"' in found.run


def test_an_intel_python_on_apple_silicon_is_a_problem():
    found = only(software.python(mac(), machine="x86_64"))
    assert found.status == "problem"
    assert "Rosetta" in found.text
    assert found.run.startswith("arch -arm64 ")


@pytest.mark.parametrize(("system", "machine"), [(mac(), "arm64"), (LINUX, "x86_64")])
def test_a_python_of_the_machine_s_own_architecture_is_right(system, machine):
    assert only(software.python(system, machine)).status == "ok"


def test_a_python_that_is_too_old_is_a_problem(monkeypatch):
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.9.6")
    found = only(software.python(LINUX))
    assert (found.status, found.run) == ("problem", "sudo apt install python3.13")


def test_mlx_without_metal_on_a_mac_is_a_problem(monkeypatch):
    import mlx.core as mx

    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert only(software.backend(mac())).status == "problem"
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert only(software.backend(mac())).status == "ok"


def test_two_backends_in_one_folder_are_a_problem(monkeypatch):
    monkeypatch.setattr(software, "_backends", lambda: ["mlx-cpu", "mlx-cuda-13"])
    found = only(software.backend(LINUX))
    assert found.status == "problem"
    assert found.run.startswith("python -m pip uninstall -y mlx mlx-cpu mlx-cuda-13 && ")


def test_a_slow_blas_is_a_warning_with_the_distribution_s_command(monkeypatch):
    monkeypatch.setattr(software, "_backends", lambda: ["mlx-cpu"])
    monkeypatch.setattr(software, "blas_is_fast", lambda: False)
    monkeypatch.delenv(software.SWITCH, raising=False)
    assert "libopenblas0" in only(software.blas(System("linux", root=Path("/nowhere")))).run
    monkeypatch.setenv(software.SWITCH, "off")
    assert only(software.blas(LINUX)).run == "unset MLX_QLORA_BLAS"
    monkeypatch.setattr(software, "blas_is_fast", lambda: True)
    assert only(software.blas(LINUX)).status == "ok"
    assert list(software.blas(mac())) == []


def test_a_missing_compiler_is_a_warning():
    found = only(software.compiler(System("linux", root=Path("/nowhere")), which=lambda _name: None))
    assert (found.status, found.run) == ("warning", "sudo apt install g++")
    assert only(software.compiler(LINUX, which=lambda name: f"/usr/bin/{name}")).status == "ok"
    assert list(software.compiler(mac())) == []
