"""commands/data.py"""

import json
from pathlib import Path

import pytest

from mlx_qlora.__main__ import COMMANDS, load_command, run
from tests.conftest import REPOSITORY

DEMO = REPOSITORY / "data" / "demo"


def data(*arguments: object) -> int:
    return run(load_command("data"), [str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "perguntas.jsonl"
    lines = [
        {"question": f"Quem não venceu a partida {n}?", "answer": f"O time {n}, com dois gols."}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_it_is_one_of_the_commands_and_each_of_its_own_has_an_example():
    assert "data" in COMMANDS
    group = load_command("data")
    assert list(group.commands) == ["check", "convert", "split"]
    assert all(
        "Example: mlx-qlora data" in (command.help or "") for command in [group, *group.commands.values()]
    )


def test_a_good_file_exits_with_0_and_a_broken_one_with_2_and_the_problem(rows, capsys):
    assert data("check", rows) == 0
    out = capsys.readouterr().out
    assert "Language of the rows: Portuguese (certainty" in out
    assert out.endswith("It can be trained on.\n")
    with rows.open("a") as file:
        file.write("{broken\n")
    assert data("check", rows) == 2
    shown = capsys.readouterr()
    assert "perguntas.jsonl:61: it is not JSON" in shown.out
    assert shown.err.count("rows that cannot be used: 1") == 1
    assert data("check", rows, "--set", "data.skip_bad_rows=true") == 0


def test_json_is_one_object_on_stdout_also_when_it_exits_with_2(rows, capsys):
    rows.write_text(rows.read_text() + "{broken\n")
    assert data("check", rows, "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is False
    assert told["splits"]["train"]["rows"] == 60


def test_strict_takes_warnings_for_problems(rows, capsys):
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    assert data("check", rows) == 0
    capsys.readouterr()
    assert data("check", rows, "--strict", "--json") == 2
    assert json.loads(capsys.readouterr().out)["usable"] is False


def test_with_a_model_its_tokens_are_counted_and_the_presets_updates(capsys):
    assert data("check", DEMO / "club", "--model", DEMO / "model", "--preset", "mac-8gb", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "tokens"
    assert told["splits"]["train"]["tokens"] == 3621
    assert (told["max_seq_length"], told["epoch"]["batch_size"], told["epoch"]["updates"]) == (256, 1, 75)


def test_the_page_fits_80_columns_but_for_paths_and_sentences(rows, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    data("check", rows)
    lines = capsys.readouterr().out.splitlines()
    table = lines[1:3]
    assert table[0].split() == [
        "file",
        "rows",
        "schema",
        "characters",
        "median",
        "90",
        "%",
        "99",
        "%",
        "longest",
    ]
    assert all(len(line) <= 80 for line in table)
    assert "…" not in table[1]
    assert not [line for line in lines if "\x1b" in line]


def test_from_a_table_to_three_files_that_can_be_trained_on(tmp_path, capsys):
    table = tmp_path / "perguntas.csv"
    table.write_bytes(
        ("Dúvida;Solução\r\n" + "".join(f"Quem não venceu {n}?;O time {n}\r\n" for n in range(60))).encode(
            "cp1252"
        )
    )
    names = ("--columns", "question=Dúvida,answer=Solução")
    assert data("convert", table, tmp_path / "a.jsonl", *names) == 2
    assert "--encoding cp1252" in capsys.readouterr().err
    assert data("convert", table, tmp_path / "a.jsonl", *names, "--encoding", "cp1252", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["form"], told["rows"], told["bad"]) == ("table", 60, [])
    assert data("split", tmp_path / "a.jsonl", tmp_path / "out", "--valid", "0.2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["rows"].values()) == 60
    assert data("check", tmp_path / "out") == 0
    assert data("convert", table, tmp_path / "a.jsonl", "--encoding", "cp1252") == 2
    assert data("split", tmp_path / "a.jsonl", tmp_path / "out") == 2


@pytest.mark.parametrize("columns", ["question", "=x", "question="])
def test_columns_that_are_no_pairs_are_refused_with_an_example(rows, tmp_path, columns, capsys):
    assert data("convert", rows, tmp_path / "o.jsonl", "--columns", columns) == 2
    assert "--columns question=pergunta" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(rows, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((DEMO / "model" / "config.json").read_text())
    assert data("check", rows, "--model", folder) == 2
    assert "no tokenizer" in capsys.readouterr().err
