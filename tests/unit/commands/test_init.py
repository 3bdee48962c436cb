"""commands/init.py"""

import json

import pytest

from mlx_qlora.__main__ import load_command, run
from mlx_qlora.config import build_config, read_config
from mlx_qlora.config_page import SCHEMA_NAME, run_schema
from mlx_qlora.presets import name_for, preset


def init(*arguments):
    return run(load_command("init"), [str(argument) for argument in arguments])


def test_a_file_and_its_schema_are_written_and_the_file_is_the_preset_with_model_and_data(tmp_path, capsys):
    path = tmp_path / "new" / "run.yaml"
    assert init(path, "--preset", "mac-8gb", "--model", "ana/model", "--data", "rows.jsonl") == 0
    expected = build_config(
        preset("mac-8gb"), {"model": {"path": "ana/model"}, "data": {"path": "rows.jsonl"}}
    )
    assert build_config(read_config(path)) == expected
    assert json.loads((path.parent / SCHEMA_NAME).read_text()) == run_schema()
    assert f"Run: mlx-qlora train --config {path} --adapter-path" in capsys.readouterr().err


def test_without_model_and_data_it_says_that_they_are_missing(tmp_path, capsys):
    assert init(tmp_path / "run.yaml") == 0
    assert "Set model.path and data.path in it first" in capsys.readouterr().err


def test_auto_is_this_machine_s_preset_and_the_file_names_it(tmp_path, monkeypatch):
    from mlx_qlora.commands import init as command

    memory = type("Memory", (), {"total": 8 * 1024**3})()
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: memory)
    init(tmp_path / "run.yaml")
    assert name_for(memory.total) == "mac-8gb"
    assert "of the preset mac-8gb" in (tmp_path / "run.yaml").read_text()


@pytest.mark.parametrize("name", ["run.yaml", SCHEMA_NAME])
def test_somebody_s_file_is_not_replaced_without_force(name, tmp_path, capsys):
    (tmp_path / name).write_text("{}")
    assert init(tmp_path / "run.yaml") == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"
    assert "--force" in capsys.readouterr().err
    assert init(tmp_path / "run.yaml", "--force") == 0
    assert (tmp_path / name).read_text() != "{}"


def test_a_schema_of_ours_is_made_again(tmp_path):
    assert init(tmp_path / "one.yaml") == 0
    (tmp_path / SCHEMA_NAME).write_text(json.dumps({**run_schema(), "$defs": {}}))
    assert init(tmp_path / "two.yaml") == 0
    assert json.loads((tmp_path / SCHEMA_NAME).read_text()) == run_schema()


def test_a_folder_is_refused_with_a_file_in_it(tmp_path, capsys):
    assert init(tmp_path) == 2
    assert f"Run: mlx-qlora init {tmp_path / 'run.yaml'}" in capsys.readouterr().err


def test_a_preset_that_is_none_leaves_nothing(tmp_path):
    assert init(tmp_path / "x" / "run.yaml", "--preset", "mac-9gb") == 2
    assert list(tmp_path.iterdir()) == []


def test_the_schema_alone_goes_to_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert init("--schema") == 0
    assert json.loads(capsys.readouterr().out) == run_schema()
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_with_the_configuration(tmp_path, capsys):
    assert init(tmp_path / "run.yaml", "--preset", "mac-16gb", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert build_config(told["config"]) == build_config(preset("mac-16gb"))
    assert told["path"] == str(tmp_path / "run.yaml")


def test_the_file_is_taken_by_other_commands(tmp_path, tiny_llama_folder, capsys):
    assert init(tmp_path / "run.yaml", "--preset", "mac-8gb", "--model", tiny_llama_folder) == 0
    assert run(load_command("plan"), ["--config", str(tmp_path / "run.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True
