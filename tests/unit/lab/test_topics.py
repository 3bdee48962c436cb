"""lab/topics.py, finding.py, figures.py, page.py and ``mlx-qlora lab``: what is told is what was found."""

import json
import re

import pytest
from typer.testing import CliRunner

from mlx_qlora.__main__ import load_command
from mlx_qlora.errors import ConfigError
from mlx_qlora.lab.figures import DRAWERS, figure_of
from mlx_qlora.lab.finding import Finding, Table
from mlx_qlora.lab.page import page
from mlx_qlora.lab.topics import TOPICS, find

QUICK = ("linear", "companding", "codebooks", "packing", "snr", "noise", "memory")


@pytest.fixture(scope="module")
def found():
    return {topic: find(topic, 0) for topic in QUICK}


@pytest.mark.parametrize("topic", QUICK)
def test_a_topic_has_tables_notes_and_a_figure(found, topic, tmp_path):
    finding = found[topic]
    assert finding.topic == topic
    assert finding.notes
    for table in finding.tables:
        assert all(
            len(row) == len(table.columns) == len(cells)
            for row, cells in zip(table.rows, table.cells(), strict=True)
        )
    figure = figure_of(finding)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for panel in figure.axes:
        assert panel.get_title(loc="left")
        assert panel.get_ylabel()


@pytest.mark.parametrize("topic", ["linear", "snr", "noise"])
def test_a_seed_gives_the_same_figures_and_another_gives_others(found, topic):
    assert find(topic, 0).as_dict() == found[topic].as_dict()
    assert find(topic, 1).as_dict() != found[topic].as_dict()


def test_the_figure_draws_the_tables_own_values(found):
    line = figure_of(found["linear"]).axes[1].lines[1]
    rows = [row for row in found["linear"].tables[1].rows if row[1] == "channel"]
    assert line.get_xdata().tolist() == [row[4] for row in rows]
    assert line.get_ydata().tolist() == [row[2] for row in rows]


def test_every_topic_is_there_and_every_figure_belongs_to_one():
    assert set(DRAWERS) < set(TOPICS)
    with pytest.raises(ConfigError, match="no topic 'magic'"):
        find("magic", 0)


def test_networks_take_data_of_choice_and_other_topics_none():
    table = find("networks", 0, ["iris"]).tables[0]
    assert set(table.column("data")) == {"iris"}
    by_scheme = {row["weights"]: row for row in table.records()}
    assert by_scheme["float32"]["accuracy"] > 0.9
    assert by_scheme["float32"]["predictions changed"] == 0
    assert by_scheme["int8 sym, channel"]["predictions changed"] <= 0.02
    assert by_scheme["int2 sym, tensor"]["accuracy"] < by_scheme["int4 sym, channel"]["accuracy"]
    with pytest.raises(ConfigError, match="no data set 'titanic'"):
        find("networks", 0, ["titanic"])
    with pytest.raises(ConfigError, match="data of its own"):
        find("snr", 0, ["iris"])


@pytest.mark.slow
@pytest.mark.parametrize("topic", sorted(set(TOPICS) - set(QUICK) - {"networks"}))
def test_a_topic_on_networks_has_tables_notes_and_its_figure(topic):
    finding = find(topic, 0)
    assert finding.tables
    assert finding.notes
    assert all(len(row) == len(table.columns) for table in finding.tables for row in table.rows)
    assert (figure_of(finding) is not None) == (topic in DRAWERS)


@pytest.mark.slow
def test_topics_that_share_a_network_leave_it_as_it_was():
    before = find("activations", 0).as_dict()
    for topic in ("eight-bit", "pruning", "pillars"):
        find(topic, 0)
    assert find("activations", 0).as_dict() == before


def test_a_table_writes_numbers_as_it_was_told_and_the_rest_with_four_digits():
    table = Table("t", ("a", "b", "c", "d", "e"), [(0.12345678, 1234567, True, None, 0.5)], (".2%", ""))
    assert table.cells() == [("12.35%", "1,234,567", "yes", "–", "0.5")]
    assert table.column("c") == [True]
    assert table.records() == [{"a": 0.12345678, "b": 1234567, "c": True, "d": None, "e": 0.5}]


def test_the_page_holds_every_note_every_row_and_the_figures_there_are():
    table = Table("Things", ("name", "a|b"), [(f"row {n}", n) for n in range(9)])
    text = page([Finding("x", "First", [table], ["It is so."])], "mlx-qlora lab all", {"x"})
    assert "- It is so." in text
    assert "![First](x.png)" in text
    assert "a\\|b" in text
    assert len(re.findall(r"^\| row ", text, re.MULTILINE)) == 9
    assert "(y.png)" not in page([Finding("y", "Second", [], ["So."])], "c", set())


def run(*arguments):
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(load_command("lab").callback)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_without_a_topic_the_command_lists_them():
    listed = run().stdout
    assert all(topic in listed for topic in (*TOPICS, "all"))
    assert set(json.loads(run("--json").stdout)["topics"]) == set(TOPICS)


def test_the_command_prints_one_json_object_and_saves_the_figure(tmp_path, found):
    done = run("snr", "--json", "--figures", str(tmp_path / "new"))
    told = json.loads(done.stdout)
    assert told["findings"][0] == json.loads(json.dumps(found["snr"].as_dict()))
    assert told["files"] == [str(tmp_path / "new" / "snr.png")]
    assert (tmp_path / "new" / "snr.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_tables_and_notes_for_people(found):
    shown = run("packing").stdout
    assert found["packing"].title in shown
    assert all(note in shown for note in found["packing"].notes)
