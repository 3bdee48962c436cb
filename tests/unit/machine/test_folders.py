"""machine/folders.py"""

import os
from types import SimpleNamespace

import pytest

from mlx_qlora.machine import folders
from mlx_qlora.machine.system import GIB


def look(path, variable="MLX_QLORA_CACHE"):
    return folders.folder("cache", path, "du -sh x", variable)


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above_and_not_made(tmp_path):
    found = look(tmp_path / "a" / "b")
    assert found.facts["is_writable"]
    assert found.facts["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_a_problem(tmp_path):
    (tmp_path / "cache").write_text("x")
    found = look(tmp_path / "cache")
    assert (found.status, "it is no folder" in found.text) == ("problem", True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_one_may_not_write_to_is_a_problem(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert look(tmp_path / "cache").status == "problem"


def test_a_refused_write_is_a_problem_with_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "why_not_writable", lambda _path: "permission denied")
    found = look(tmp_path)
    assert found.status == "problem"
    assert found.run.startswith('sudo chown -R "$(id -un)" ')
    assert found.run.endswith("# or: export MLX_QLORA_CACHE=FOLDER")


def test_a_folder_where_no_file_can_be_made_is_refused_by_the_system():
    assert folders.why_not_writable(folders.Path("/proc/self")) is not None


@pytest.mark.parametrize(("free", "status"), [(1, "problem"), (10, "warning"), (100, "ok")])
def test_the_less_room_the_worse(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _path: SimpleNamespace(free=free * GIB))
    found = look(tmp_path)
    assert (found.status, found.run) == (status, None if status == "ok" else "du -sh x")


def test_all_three_places_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "models"))
    found = {finding.subject: finding for finding in folders.folders(tmp_path)}
    assert list(found) == ["cache", "hub cache", "this folder"]
    assert found["cache"].facts["path"] == str(tmp_path / "models")
