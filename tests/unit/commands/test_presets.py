"""commands/presets.py"""

import json

import pytest
import yaml

from mlx_qlora.commands import presets as command
from mlx_qlora.config import RunConfig, build_config
from mlx_qlora.errors import ConfigError
from mlx_qlora.presets import GIB, PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_the_yaml_of_a_preset_is_its_whole_configuration(name, capsys):
    command.presets(yaml_of=name)
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree.keys() == RunConfig.model_fields.keys()
    assert build_config(tree) == build_config(preset(name))


def test_yaml_and_json_together_are_the_configuration_as_json(capsys):
    command.presets(yaml_of="mac-8gb", as_json=True)
    assert build_config(json.loads(capsys.readouterr().out)) == build_config(preset("mac-8gb"))


def test_json_has_every_preset_and_the_one_that_fits_this_machine(monkeypatch, capsys):
    memory = type("Memory", (), {"total": 8 * GIB})()
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: memory)
    command.presets(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == {"presets": {name: preset(name) for name in PRESETS}, "auto": "mac-8gb"}


def test_the_table_fits_80_columns_and_shows_each_setting_without_colour(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    command.presets()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    rows = {cells[1].strip(): [c.strip() for c in cells[2:5]] for cells in table_rows(out)}
    assert rows["batch size"] == ["1", "2", "4"]
    assert rows["accumulation"] == ["2", "2", "1"]
    assert rows["length, tokens"] == ["256", "512", "1024"]
    assert rows["checkpointing"] == ["yes", "yes", "yes"]
    assert rows["rank"] == ["8"] * 3
    assert rows["alpha"] == ["16"] * 3
    assert rows["modules"] == ["q_proj"] * 3
    assert rows["learning rate"] == ["0.0002"] * 3
    assert rows["warm-up, updates"] == ["100"] * 3
    assert rows["epochs"] == ["3"] * 3


def table_rows(out: str) -> list[list[str]]:
    return [line.split("│") for line in out.splitlines() if line.count("│") == 6]


def test_an_unknown_preset_is_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match="mac-8gb, mac-16gb, mac-32gb, auto"):
        command.presets(yaml_of="mac-64gb")
